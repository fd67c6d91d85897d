"""Drivers that are interrupted, terminated and killed at any stage: the same command ends as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from pocket.subject import write_photos

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(3600)]
STEPS = 240
PATIENCE_S = 900  # for one start on a machine that is busy elsewhere; a free one takes 20 s
QUICK = [
    *("--set", "prior.num_images=4", "--set", "prior.steps=4", "--set", "validate.every=0"),
    *("--set", f"train.steps={STEPS}", "--set", "checkpoint.every=10"),
    *("--set", "validate.num_images=1", "--set", "validate.steps=3"),
]
Until = Callable[[subprocess.Popen[str]], bool]


@dataclass
class Life:
    """What one start of the command came to."""

    code: int
    answer: dict[str, Any]
    said: str
    ended: float
    """Seconds since the epoch."""


class Subject:
    """A subject and the one command that trains it, started as often as needed.

    Args:
        root: Storage root.
        arguments: Of `raybooth train`.
        name: Of the subject.
    """

    def __init__(self, root: Path, arguments: list[str], name: str) -> None:
        self.root, self.name, self.run = root, name, root / f"runs/{name}/v1"
        options = ["--name", name, "--storage", str(root), "--json", *QUICK]
        self.command = [sys.executable, "-m", "orchestrator", "train", *arguments, *options]

    def live(self, until: Until | None = None, blow: int = 0, alone: bool = False) -> Life:
        """Start the command; as soon as `until` holds, its process group, or the driver alone, is sent `blow`."""
        messages = self.root / f"stderr-{time.time():.3f}.txt"
        with messages.open("w") as stderr:
            process = subprocess.Popen(
                self.command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
                # a shell's background job ignores Ctrl-C, and so would its children
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        deadline = time.monotonic() + PATIENCE_S
        while until and process.poll() is None and not until(process):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if until and process.poll() is None:
            (os.kill if alone else os.killpg)(process.pid, blow)
        hit = time.time()
        out, _ = process.communicate(timeout=PATIENCE_S)
        said = messages.read_text()
        answer = json.loads(out.splitlines()[-1]) if out else {}
        return Life(process.returncode, answer, said, hit)

    @property
    def state(self) -> str:
        """The run's own record."""
        record = self.run / "run.json"
        return str(json.loads(record.read_text())["state"]) if record.exists() else "none"

    def events(self) -> list[dict[str, Any]]:
        """What is written whole of `events.jsonl`."""
        log = self.run / "events.jsonl"
        whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def saved(self, step: int) -> bool:
        return (self.run / f"checkpoints/step_{step:06d}/manifest.json").exists()

    def weights(self) -> dict[str, bytes]:
        file = self.root / f"artifacts/{self.name}/v1/pytorch_lora_weights.safetensors"
        return {name: tensor.tobytes() for name, tensor in sorted(load_file(file).items())}

    def registered(self) -> dict[str, Any]:
        """The registry's entry but for what names, places and dates it."""
        entry = json.loads((self.root / f"registry/{self.name}.json").read_text())["versions"]["v1"]
        return {key: value for key, value in entry.items() if key not in ("artifact", "created", "mlflow")}


def test_a_run_whose_driver_is_stopped_again_and_again_ends_as_one_that_was_left_alone(
    tmp_path: Path, tiny_base: Path, tell: Any
) -> None:
    """One subject, started again and again with the same command and stopped each time, at another stage."""
    write_photos(tmp_path / "photos")
    arguments = [str(tmp_path / "photos"), "--class", "dog", "--base", str(tiny_base)]
    root = tmp_path / "root"
    root.mkdir()
    rex, calm = Subject(root, arguments, "rex"), Subject(root, arguments, "calm")

    def interrupted(stage: str, until: Until) -> None:
        life = rex.live(until, signal.SIGINT)
        assert life.code == 130, (stage, life.said[-3000:])
        assert "same command" in life.answer["error"]["do"]
        assert rex.state == "cancelled"
        tell(f"Ctrl-C while {stage}", "equal")

    interrupted("drawing class images", lambda _: (root / "priors").exists())
    interrupted("training", lambda _: rex.saved(10))

    began = time.monotonic()
    saved, left_s = terminated(rex)
    took_s = time.monotonic() - began
    tell("SIGUSR1 to the driver", "equal", 0, 0.0)
    tell(f"SIGTERM to the driver, which left after {left_s:.1f} s", "equal", 0)

    moment = random.uniform(0, took_s)
    at = time.monotonic() + moment
    life = rex.live(lambda _: time.monotonic() > at, signal.SIGKILL, alone=True)
    assert life.code in (-signal.SIGKILL, 0)
    tell(f"kill -9 of the driver after {moment:.1f} s", "equal")
    starts = [event["from_step"] for event in rex.events() if event["event"] == "started"]
    assert all(step >= saved for step in starts[2:])

    life = rex.live()
    assert life.code == 0, life.said[-3000:]

    life = calm.live()
    assert life.code == 0, life.said[-3000:]
    assert rex.weights() == calm.weights()
    assert rex.registered() == calm.registered()
    steps = [event["step"] for event in rex.events() if event["event"] == "step"]
    assert steps == list(range(1, STEPS + 1))  # each once, in order, whatever died
    assert not (rex.run / "checkpoints").exists()


def terminated(subject: Subject) -> tuple[int, float]:
    """Ask a run for a checkpoint (SIGUSR1), then to leave (SIGTERM): the step it left at, and after how long."""
    asked: list[float] = []
    before = len(subject.events())

    def until(process: subprocess.Popen[str]) -> bool:
        now = subject.events()[before:]
        if not asked and any(event["event"] == "checkpoint" for event in now):
            asked.append(time.time())
            process.send_signal(signal.SIGUSR1)
        return any(event.get("why") == "asked" for event in now)

    life = subject.live(until, signal.SIGTERM, alone=True)  # as Kubernetes does
    assert life.code == 143, life.said[-3000:]
    assert "as asked" in life.said
    assert (life.answer["state"], subject.state) == ("interrupted", "interrupted")
    assert "same command" in life.answer["error"]["do"]
    [left] = [event for event in subject.events() if event["event"] == "left"]
    assert subject.saved(left["step"])
    left_s = datetime.fromisoformat(left["time"]).timestamp() - life.ended
    assert left_s < 25
    return left["step"], left_s
