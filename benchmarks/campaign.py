"""This file is where a campaign is measured beside a diffusers script that is run once per subject.

    python -m benchmarks.campaign --lora PATH/train_dreambooth_lora.py --full PATH/train_dreambooth.py
        [--subjects 8] [--steps 100] [--gangs 1] [--json]

Same base, photos and class images (drawn before, for both), the same steps, one pair a step, fp32, one thread per
worker. Ours is `raybooth campaign run` as a user types it, from nothing to registered artifacts: Ray's own processes
and their start count, and so do MLflow, encoding, checkpoints and the report. Theirs is the script alone. CPU seconds
of all processes together, which do not depend on what else the machine does.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.storage import Storage
from pocket.subject import SUBJECT_CLASS, subject_photos
from training.draw import Drawer
from training.pipeline import open_base
from training.png import encode_png
from training.prior import SHARD, image_seed, prior_key, prior_path, prior_pngs, prior_spec
from training.recipe import Prior
from training.request import DrawRequest

CLASS_IMAGES = 8
RANK = 4  # the peer's default
PRIOR = {"num_images": CLASS_IMAGES, "steps": 10, "guidance": 4.0}
LOOK_S = 0.1
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux: what outlives its parent becomes ours, to be waited for


class Descendants(threading.Thread):
    """Adds up the CPU seconds of all processes below this one, by looking often: Ray's raylet does not wait for its
    workers, so what the system adds up by itself lacks them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ticks: dict[tuple[int, str], int] = {}  # by process and when it began
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(LOOK_S):
            self._look()

    def stop(self) -> float:
        """The CPU seconds."""
        self._over.set()
        self.join()
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")

    def _look(self) -> None:
        parents: dict[int, int] = {}
        spent: dict[int, tuple[str, int]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            pid = int(folder.name)
            parents[pid] = int(fields[1])
            spent[pid] = fields[19], int(fields[11]) + int(fields[12])
        for pid, (began, ticks) in spent.items():
            ancestor = parents[pid]
            while ancestor in parents and ancestor != os.getpid():
                ancestor = parents[ancestor]
            if ancestor == os.getpid():
                self._ticks[pid, began] = ticks


def cpu_of(command: Sequence[str], log: Path, folder: Path | None = None) -> tuple[float, float]:
    """CPU and wall seconds of a command and of every process that it started, to the last one's end."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    began, watch = time.monotonic(), Descendants()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("ab") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=folder)
        watch.start()
        code = process.wait()
        took = time.monotonic() - began
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
    if code:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return watch.stop(), took


def prepare(work: Path, subjects: int, storage: Storage) -> None:
    """The photos of every subject, and the class images, for us as a prior set and for the peer as files."""
    for seed in range(subjects):
        folder = work / "photos" / f"s{seed}"
        folder.mkdir(parents=True)
        for number, photo in enumerate(subject_photos(SUBJECT_CLASS, seed)):
            photo.save(folder / f"{number}.png")
    base, prior = open_base("pocket"), Prior(**PRIOR)
    spec, key = prior_spec(base, prior, SUBJECT_CLASS), prior_key(base, prior, SUBJECT_CLASS)
    assert CLASS_IMAGES <= SHARD
    asked = [
        DrawRequest(spec["prompt"], image_seed(0, i), steps=prior.steps, guidance=prior.guidance)
        for i in range(CLASS_IMAGES)
    ]
    pngs = [encode_png(image, None) for image in Drawer(base, device="cpu").draw(asked)]
    name = f"images-000000-{CLASS_IMAGES - 1:06d}.parquet"
    columns = {"index": list(range(CLASS_IMAGES)), "seed": [request.seed for request in asked], "png": pngs}
    digest = storage.write_rows(f"{prior_path(key)}/{name}", columns)
    shard = {"name": name, "first": 0, "count": CLASS_IMAGES, "sha256": digest}
    told = {"kind": "raybooth-prior", "model": base.model, "class": SUBJECT_CLASS, "spec": spec}
    storage.write_json(f"{prior_path(key)}/manifest.json", {**told, "count": CLASS_IMAGES, "shards": [shard]})
    (work / "class").mkdir()
    for number, png in enumerate(prior_pngs(storage, key, CLASS_IMAGES)):
        (work / "class" / f"{number}.png").write_bytes(png)


def ours(
    work: Path, storage: Storage, method: str, subjects: int, steps: int, gangs: int, bank: Any
) -> list[str]:
    """Our command."""
    train: dict[str, Any] = {"method": method, "steps": steps, "pairs_per_step": 1, "lr": 1e-4}
    if method == "lora":
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        train |= {"lora": {"rank": RANK, "alpha": RANK, "targets": targets}}
    described = {
        "name": f"{method}-{gangs}",
        "defaults": {
            "subject": {"class": SUBJECT_CLASS},
            "prior": PRIOR,
            "train": train,
            "engine": {"precision": "fp32"},
            "checkpoint": {"every": 10 * steps},
            "validate": {"every": 0},
        },
        "subjects": [
            {"name": f"{method}{gangs}-{i}", "images": str(work / f"photos/s{i}")} for i in range(subjects)
        ],
        "prompts": [],
        "schedule": {"gangs": gangs, "bank": bank},
    }
    manifest = work / f"{method}-{gangs}.yaml"
    manifest.write_text(yaml.safe_dump(described))
    command = [sys.executable, "-m", "orchestrator", "campaign", "run", str(manifest), "--json"]
    return [*command, "--storage", storage.uri]


def theirs(work: Path, script: Path, method: str, subject: int, steps: int) -> list[str]:
    """The peer's command for one subject."""
    base, out = open_base("pocket").path, work / "peer" / f"{method}-{subject}"
    return [
        *(sys.executable, "-m", "benchmarks.peer", str(script)),
        *("--pretrained_model_name_or_path", str(base), "--output_dir", str(out)),
        *("--instance_data_dir", str(work / f"photos/s{subject}")),
        *("--instance_prompt", f"a photo of zwx {SUBJECT_CLASS}"),
        *("--class_data_dir", str(work / "class"), "--class_prompt", f"a photo of {SUBJECT_CLASS}"),
        *("--with_prior_preservation", "--num_class_images", str(CLASS_IMAGES)),
        *("--resolution", "64", "--center_crop", "--train_batch_size", "1", "--max_train_steps", str(steps)),
        *("--learning_rate", "1e-4", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
        *("--mixed_precision", "no", "--checkpointing_steps", "1000000", "--seed", "0"),
        *(("--train_text_encoder",) if method == "full" else ("--rank", str(RANK))),
    ]


def main() -> None:
    """Measure what was asked for, ours and theirs in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", type=Path, help="the peer's LoRA script")
    parser.add_argument("--full", type=Path, help="the peer's full script")
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--gangs", type=int, default=1)
    parser.add_argument("--bank", default="auto")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    bank: Any = asked.bank if asked.bank == "auto" else int(asked.bank)
    figures: dict[str, Any] = {"subjects": asked.subjects, "steps": asked.steps, "gangs": asked.gangs}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        storage = Storage(str(work / "root"))
        prepare(work, asked.subjects, storage)
        for method, script in (("lora", asked.lora), ("full", asked.full)):
            if script is None:
                continue
            load = os.getloadavg()[0]
            command = ours(work, storage, method, asked.subjects, asked.steps, asked.gangs, bank)
            cpu, wall = cpu_of(command, work / "ours.txt", work)
            print(f"{method}: ours {cpu:.1f} CPU s, {wall:.1f} s", file=sys.stderr, flush=True)
            peers = [
                cpu_of(theirs(work, script.absolute(), method, i, asked.steps), work / "theirs.txt")[0]
                for i in range(asked.subjects)
            ]
            figures[method] = {
                "ours_cpu_s": round(cpu, 1),
                "ours_wall_s": round(wall, 1),
                "theirs_cpu_s": round(sum(peers), 1),
                "ratio": round(sum(peers) / cpu, 2),
                "load": round(load, 1),
            }
            print(json.dumps({method: figures[method]}), flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
