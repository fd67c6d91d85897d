"""This file is where the figures of steps wait until they are sent, so that no step waits for the device."""

import time
from collections.abc import Callable
from typing import Any

import torch

from cluster.errors import UserError
from training.engine import StepReport

REPORT_S = 0.25  # a bar feels live at 4 Hz, and reading figures waits for the device
MEAN_OF_LAST = 50  # steps that the final losses are a mean of: a single one is mostly its timestep

Report = Callable[[str, Any], None]


class Figures:
    """Keeps the figures of steps on the device and reads them a few times a second, without a barrier."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self._waiting: list[StepReport] = []
        self._recent: list[torch.Tensor] = []
        self._since = time.monotonic()

    def add(self, step: StepReport) -> None:
        """Take a step's figures; send what has gathered when it is time."""
        self._recent = [*self._recent[1 - MEAN_OF_LAST :], step.figures]
        if self._report is None:
            return
        self._waiting.append(step)
        if time.monotonic() - self._since >= REPORT_S:
            self.flush()

    def flush(self) -> None:
        """Send every step that was not sent yet."""
        if self._report is None or not self._waiting:
            return
        rows = torch.stack([step.figures for step in self._waiting]).tolist()
        now = time.monotonic()
        rate = len(rows) / max(now - self._since, 1e-9)
        payload = [
            {
                "step": step.step,
                "loss_subject": subject,
                "loss_class": of_class,
                "grad_norm": norm,
                "lr": step.lr,
                "lr_text": step.lr_text,
                "steps_per_second": round(rate, 4),
            }
            for step, (subject, of_class, norm) in zip(self._waiting, rows, strict=True)
        ]
        self._report("steps", payload)
        self._waiting, self._since = [], now

    def check_finite(self) -> None:
        """Send the rest, and end the run when its losses are no numbers; all ranks see the same and end together.

        Raises:
            UserError: They are not.
        """
        self.flush()
        if self._recent and not torch.isfinite(torch.stack(self._recent)).all():
            raise UserError(
                "the training diverged",
                "its loss or gradient is not a number",
                "lower train.lr or set a warm-up",
            )

    def final(self) -> dict[str, float]:
        """The mean losses of the last steps."""
        if not self._recent:
            return {}
        subject, of_class, _ = torch.stack(self._recent).mean(dim=0).tolist()
        return {"loss_subject": subject, "loss_class": of_class}
