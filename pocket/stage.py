"""This file is where a stage of pretraining keeps its budget of time, its learning rate and its checkpoints."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

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
        """One tick per step until the budget is spent; tells when to save and reports loss, rate and time left."""
        saved = reported = time.monotonic()
        reported_step, losses = self.step, list[float]()
        while self.progress < 1.0:
            began = time.monotonic()
            tick = Tick(self.step)
            yield tick
            now = time.monotonic()
            self.step += 1
            self.trained_s += now - began
            losses.append(tick.loss)
            if now - saved > CHECKPOINT_EVERY_S:
                saved, tick.save_due = now, True
                yield tick
            if now - reported > REPORT_EVERY_S:
                rate = (self.step - reported_step) * self.batch_size / (now - reported)
                left = (self.budget_s - self.trained_s) / 60
                print(
                    f"{time.strftime('%H:%M:%S')} {self.name}: {self.progress:5.1%}  step {self.step}  "
                    f"loss {sum(losses) / len(losses):.4f}  {rate:.0f}/s  {left:.0f} min left",
                    flush=True,
                )
                reported, reported_step, losses = now, self.step, []


class Tick:
    """One step, or (with `save_due`) the moment to save between two steps."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.loss = float("nan")
        self.save_due = False
