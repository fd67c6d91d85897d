"""This file is where a stage of pretraining keeps its budget of samples, its learning rate and its checkpoints."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

CHECKPOINT_EVERY_S = 180.0
WARMUP_SAMPLES = 3200
REPORT_EVERY_S = 20.0


class Stage:
    """A training loop's clock: it counts samples up to a budget, over as many restarts as it takes.

    Everything is a function of the samples seen, never of the time, so that a run can be repeated to the bit.
    """

    def __init__(self, name: str, path: Path, samples: int, batch_size: int) -> None:
        self.name = name
        self.path = path
        self.samples = samples
        self.batch_size = batch_size
        self.seen = 0

    @property
    def progress(self) -> float:
        """The part of the budget that is spent, 0 to 1."""
        return min(1.0, self.seen / self.samples)

    def lr(self, peak: float, decay_from: float) -> float:
        """A trapezoid: up over WARMUP_SAMPLES, flat, then linearly to zero from `decay_from` (0 to 1) of the budget."""
        warm = min(1.0, (self.seen + self.batch_size) / WARMUP_SAMPLES)
        left = (1.0 - self.progress) / (1.0 - decay_from)
        return peak * warm * max(0.01, min(1.0, left))

    def restore(self) -> dict[str, Any] | None:
        """The tensors of the last checkpoint, or None at the very beginning."""
        if not self.path.exists():
            return None
        state: dict[str, Any] = torch.load(self.path, weights_only=True)
        self.seen = state["seen"]
        return state

    def save(self, **tensors: Any) -> None:
        """Replaces the checkpoint; a kill at any moment leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({"seen": self.seen, **tensors}, partial)
        partial.replace(self.path)

    def steps(self) -> Iterator["Tick"]:
        """One tick per step until the budget is spent; between steps it tells when to save and reports to people."""
        saved = time.monotonic()
        with _Report(self) as report:
            while self.progress < 1.0:
                tick = Tick(self.seen)
                yield tick
                now = time.monotonic()
                self.seen += self.batch_size
                report.add(tick.loss, now)
                if now - saved > CHECKPOINT_EVERY_S:
                    saved, tick.save_due = now, True
                    yield tick


class Tick:
    """One step, or (with `save_due`) the moment to save between two steps."""

    def __init__(self, first: int) -> None:
        self.first = first
        """Number of the step's first sample."""
        self.loss = float("nan")
        self.save_due = False


class _Report:
    """Loss, rate and time left: a bar on a terminal, a line now and then in a log."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.losses: list[float] = []
        self.since = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task(stage.name, total=stage.samples, completed=stage.seen, facts="")

    def __enter__(self) -> "_Report":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def add(self, loss: float, now: float) -> None:
        """Takes the loss of the step that just ended."""
        self.losses.append(loss)
        if now - self.since < REPORT_EVERY_S:
            return
        stage = self.stage
        rate = len(self.losses) * stage.batch_size / (now - self.since)
        facts = f"{stage.seen:,} samples  loss {sum(self.losses) / len(self.losses):.4f}  {rate:.0f}/s"
        self.bar.update(self.task, completed=stage.seen, facts=facts)
        if self.bar.disable:
            left = (stage.samples - stage.seen) / rate / 60
            clock = time.strftime("%H:%M:%S")
            print(f"{clock} {stage.name}: {stage.progress:5.1%}  {facts}  {left:.0f} min left", flush=True)
        self.losses, self.since = [], now
