"""Campaigns whose drivers and workers are killed: the same artifacts, and nothing trained twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.storage import Storage
from orchestrator.ledger import Ledger
from orchestrator.records import ENDED, RunRow
from pocket.subject import subject_photos

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(3600)]
PATIENCE_S = 900  # for one start on a machine that is busy elsewhere
POLL_S = 0.1
FREED_S = 60  # seconds on such a machine until the workers of a cancelled run are free; else two
GOOD = ("ada", "bob", "cat", "dot")
STEPS = 120
LONG = {"steps": 100_000, "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of four subjects, a folder with a damaged JPEG among good photos, and one without any image."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(GOOD):
        subject = folder / name
        subject.mkdir()
        for number, photo in enumerate(subject_photos("cup", seed)):
            photo.save(subject / f"{number}.png")
    broken = folder / "broken"
    broken.mkdir()
    (broken / "good.png").write_bytes((folder / "ada" / "0.png").read_bytes())
    (broken / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(500))
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("nothing to see")
    return folder


class Night:
    """A campaign in a storage root of its own, and the command that runs it."""

    def __init__(self, root: str, photos: Path, base: Path, folder: Path, runs_per_gang: int = 50) -> None:
        self.root, self.folder = root, folder
        subjects = [{"name": name, "images": str(photos / name)} for name in (*GOOD, "broken", "empty")]
        for subject in subjects[2:4]:
            subject["class"] = "cat"
        # trained alone, after the others, for longer than anybody waits
        subjects.append({"name": "eve", "images": str(photos / "ada"), "priority": -1, "train": LONG})
        described = {
            "name": "night",
            "defaults": {
                "base": {"model": str(base)},
                "subject": {"class": "dog"},
                "prior": {"num_images": 4, "steps": 4},
                "train": {"steps": STEPS, "lora": {"rank": 4, "alpha": 4}},
                "checkpoint": {"every": 10},
                "validate": {"every": 0},
            },
            "subjects": subjects,
            "schedule": {"bank": 2, "gangs": 1, "runs_per_gang": runs_per_gang},
            "prompts": ["a photo of {subject} in the snow"],
            "images": {"num_images": 1, "steps": 3},
        }
        folder.mkdir(exist_ok=True)
        self.manifest = folder / "campaign.yaml"
        self.manifest.write_text(yaml.safe_dump(described))

    def start(self, *command: str) -> subprocess.Popen[str]:
        with (self.folder / f"stderr-{time.time():.3f}.txt").open("w") as said:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "orchestrator",
                    "campaign",
                    *command,
                    "--storage",
                    self.root,
                    "--json",
                ],
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,
                cwd=self.folder,
            )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
        out, _ = process.communicate(timeout=PATIENCE_S)
        answer = json.loads(out.splitlines()[-1]) if out else {}
        assert answer, "\n".join(file.read_text()[-3000:] for file in sorted(self.folder.glob("stderr-*")))
        return process.returncode, answer

    def run(self) -> tuple[int, dict[str, Any]]:
        return self.finish(self.start("run", str(self.manifest)))

    def eve(self) -> RunRow:
        """The long run, as it is on record."""
        folder = self.folder if "://" in self.root else Path(self.root)
        with Ledger(f"sqlite:///{folder / 'campaigns.db'}") as ledger:
            [row] = [row for row in ledger.runs("night") if row.name == "eve"]
        return row

    def artifacts(self, storage: Storage) -> dict[str, Any]:
        """The sha256 of every file of every subject's artifact."""
        return {
            name: {file: entry["sha256"] for file, entry in manifest["files"].items()}
            for name in GOOD
            if (manifest := storage.manifest(f"artifacts/{name}/v1"))
        }

    def steps(self, storage: Storage, name: str) -> list[int]:
        """The steps that a subject's log tells of, in order."""
        lines = storage.read(f"runs/{name}/v1/events.jsonl").decode().splitlines()
        said = [json.loads(line) for line in lines]
        return [event["step"] for event in said if event["event"] == "step"]


def states(answer: Mapping[str, Any]) -> dict[str, str]:
    return {subject["name"]: subject["state"] for subject in answer["subjects"]}


def wait(until: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and not until():
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


def test_a_campaign_in_an_object_store_whose_driver_and_worker_are_killed_ends_as_a_calm_one_on_a_disk(
    tmp_path: Path, photos: Path, tiny_base: Path, bucket: str, tell: Any, workers: Callable[..., list[int]]
) -> None:
    """Eight subjects: four good ones, a damaged photo, no photo, a long run that is cancelled."""
    calm = Night(str(tmp_path / "calm"), photos, tiny_base, tmp_path / "calm-out", runs_per_gang=2)
    process = calm.start("run", str(calm.manifest))
    on_record = Path(calm.root) / "campaigns.db"
    wait(lambda: on_record.exists() and (tmp_path / "calm" / "runs").exists(), process)
    assert calm.finish(calm.start("cancel", "night", "eve"))[1]["cancelled"] == ["eve"]
    code, answer = calm.finish(process)
    expected = dict.fromkeys(GOOD, "succeeded") | {"broken": "failed", "empty": "failed", "eve": "cancelled"}
    assert (code, answer["state"], states(answer)) == (3, "failed", expected)
    reasons = {s["name"]: s["reason"] for s in answer["subjects"] if s["reason"]}
    assert "torn.jpg is damaged" in reasons["broken"]["what"] and "no photos" in reasons["empty"]["what"]
    drawn = [(prior["class"], prior["images"], prior["drawn"]) for prior in answer["priors"]]
    assert sorted(drawn) == [("cat", 4, 4), ("dog", 4, 4)]
    assert answer["images"]["drawn"] == 4
    page = Path(answer["report"]).read_text()
    assert all(name in page for name in (*GOOD, "torn.jpg"))

    hurt = Night(f"{bucket}/booth", photos, tiny_base, tmp_path / "hurt-out")
    storage, seed = Storage(hurt.root), random.Random(4)

    def saved(name: str, step: int) -> bool:
        return storage.exists(f"runs/{name}/v1/checkpoints/step_{step:06d}/manifest.json")

    code, answer = hurt.finish(hurt.start("run", str(hurt.manifest), "--detach"))
    pid = int(answer["controller"].split()[1])
    try:
        assert f"process {pid} " in f"{hurt.finish(hurt.start('status', 'night'))[1]['controller']} "
        code, error = hurt.finish(hurt.start("resume", "night"))
        assert code == 2 and f"by process {pid}" in error["error"]["seen"]
        deadline = time.monotonic() + PATIENCE_S
        while not (saved("ada", 20) or saved("cat", 20)):
            assert time.monotonic() < deadline and Path(f"/proc/{pid}").exists()
            time.sleep(POLL_S)
        time.sleep(seed.random() / 2)
    finally:
        os.killpg(pid, signal.SIGKILL)
    before = {name: storage.manifest(f"artifacts/{name}/v1") for name in GOOD}

    process = hurt.start("run", str(hurt.manifest))
    late = range(50, STEPS, 10)
    # whatever this process misses while others have the machine, the long run is not over
    wait(lambda: any(saved(n, step) for n in ("ada", "cat") for step in late) or hurt.eve().step > 0, process)
    for worker in workers(process.pid):
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    wait(lambda: hurt.eve().state == "training" and hurt.eve().step > 0, process)
    assert hurt.finish(hurt.start("cancel", "night", "eve"))[0] == 0
    asked = time.monotonic()
    wait(lambda: hurt.eve().state in ENDED, process)
    freed_s = time.monotonic() - asked
    code, answer = hurt.finish(process)
    assert (code, states(answer)) == (3, expected) and freed_s < FREED_S
    assert hurt.artifacts(storage) == calm.artifacts(Storage(calm.root))
    again = {name: storage.manifest(f"artifacts/{name}/v1") for name in GOOD}
    assert all(again[name] == found for name, found in before.items() if found)  # published once
    assert all(hurt.steps(storage, name) == list(range(1, STEPS + 1)) for name in GOOD)
    assert {tuple(storage.names(f"artifacts/{name}")) for name in (*GOOD, "eve")} == {("v1",), ()}
    tell("campaign on S3: detached driver and its worker killed", "equal")

    code, answer = hurt.run()
    assert (code, states(answer)) == (3, expected) and answer["images"]["drawn"] == 0
