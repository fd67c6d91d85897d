"""This file is where a stage of pretraining keeps its budget of time, its learning rate and its checkpoints."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

CHECKPOINT_EVERY_S = 180.0
WARMUP_STEPS = 100
REPORT_EVERY_S = 20.0


class Stage:
    """A training loop's clock: it runs for a budget of seconds, over as many restarts as it takes."""

    def __init__(self, name: str, path: Path, budget_s: float, batch_size: int) -> None:
        self.name = name
        self.path = path
        self.budget_s = budget_s
        self.batch_size = batch_size
        self.step = 0
        self.trained_s = 0.0

    @property
    def progress(self) -> float:
        """The part of the budget that is spent, 0 to 1."""
        return min(1.0, self.trained_s / self.budget_s)

    def lr(self, peak: float, decay_from: float) -> float:
        """A trapezoid: up over WARMUP_STEPS, flat, then linearly to zero from `decay_from` (0 to 1) of the budget."""
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        left = (1.0 - self.progress) / (1.0 - decay_from)
        return peak * warm * max(0.01, min(1.0, left))

    def restore(self) -> dict[str, Any] | None:
        """The tensors of the last checkpoint, or None at the very beginning."""
        if not self.path.exists():
            return None
        state: dict[str, Any] = torch.load(self.path, weights_only=True)
        self.step, self.trained_s = state["step"], state["trained_s"]
        return state

    def save(self, **tensors: Any) -> None:
        """Replaces the checkpoint; a kill at any moment leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({"step": self.step, "trained_s": self.trained_s, **tensors}, partial)
        partial.replace(self.path)

    def steps(self) -> Iterator["Tick"]:
        """One tick per step until the budget is spent; between steps it tells when to save and reports to people."""
        saved = time.monotonic()
        with _Report(self) as report:
            while self.progress < 1.0:
                began = time.monotonic()
                tick = Tick(self.step)
                yield tick
                now = time.monotonic()
                self.step += 1
                self.trained_s += now - began
                report.add(tick.loss, now)
                if now - saved > CHECKPOINT_EVERY_S:
                    saved, tick.save_due = now, True
                    yield tick


class Tick:
    """One step, or (with `save_due`) the moment to save between two steps."""

    def __init__(self, step: int) -> None:
        self.step = step
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
        self.task = self.bar.add_task(
            stage.name, total=stage.budget_s, completed=int(stage.trained_s), facts=""
        )

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
        facts = f"step {stage.step}  loss {sum(self.losses) / len(self.losses):.4f}  {rate:.0f}/s"
        self.bar.update(self.task, completed=stage.trained_s, facts=facts)
        if self.bar.disable:
            left = (stage.budget_s - stage.trained_s) / 60
            clock = time.strftime("%H:%M:%S")
            print(f"{clock} {stage.name}: {stage.progress:5.1%}  {facts}  {left:.0f} min left", flush=True)
        self.losses, self.since = [], now
