"""This file is where the figures of steps wait until they are read, are checked, and are sent and kept as rows.

They are read some steps late, so that no step waits for the device. All ranks read the same figures after the same
step: what they say, such as a wish or that the run diverged, all ranks hear together.
"""

import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.errors import UserError
from cluster.storage import Storage
from training.engine import StepReport
from training.wish import Wish

LAG = 2  # steps: by then a device is done with them
REPORT_S = 0.25  # a bar feels live at 4 Hz
MEAN_OF_LAST = 50  # steps that the final losses are a mean of: a single one is mostly its timestep

Report = Callable[[str, Any], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class _Waiting:
    """The figures of a step on their way from the device."""

    step: StepReport
    values: torch.Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, step: StepReport) -> "_Waiting":
        if step.figures.device.type == "cpu":
            return cls(step, step.figures, None)
        values, arrived = step.figures.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(step, values, arrived)

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class Figures:
    """The figures of a run.

    Args:
        report: Takes the rows; `None` on ranks that report nothing.
        world: Ranks.
        images: Names the images of a step (from 1), for people.
        device: Whose memory is told.
    """

    def __init__(
        self, report: Report | None, world: int, images: Callable[[int], str], device: torch.device
    ) -> None:
        self._report, self._world, self._images, self._device = report, world, images, device
        self._waiting: deque[_Waiting] = deque()
        self._unsent: list[Row] = []
        self._sent: list[str] = []  # every row since the first step, as a line of JSON
        self._last: deque[tuple[float, float]] = deque(maxlen=MEAN_OF_LAST)
        self._since = time.monotonic()

    def go_on(self, rows: list[Row]) -> None:
        """Take the rows of the steps before this process, and send them: a driver that died may lack some."""
        self._last.extend((row["loss_subject"], row["loss_class"]) for row in rows)
        self._send(rows)

    def take(self, step: StepReport) -> Wish:
        """Take a step's figures; returns what any rank wished `LAG` steps before.

        Raises:
            UserError: The losses of that step are no numbers.
        """
        self._waiting.append(_Waiting.of(step))
        wish = self._read(LAG)
        if time.monotonic() - self._since >= REPORT_S:
            self._flush()
        return wish

    def settle(self) -> Wish:
        """Read what is waiting and send all; returns what any rank wished in these steps; raises as `take` does."""
        wish = self._read(0)
        self._flush()
        return wish

    def rest(self) -> None:
        """Count the steps per second from here: what was done since the last step was none."""
        self._since = time.monotonic()

    def keep(self, storage: Storage, path: str) -> None:
        """Write down every row since the first step, for `rows_kept`; only a rank that reports calls this."""
        storage.write(path, "".join(self._sent).encode())

    def final(self) -> dict[str, float]:
        """The mean losses of the last steps; none where no step is known."""
        if not self._last:
            return {}
        subject, of_class = (math.fsum(part) / len(self._last) for part in zip(*self._last, strict=True))
        return {"loss_subject": subject, "loss_class": of_class}

    def _read(self, lag: int) -> Wish:
        wish = Wish.NONE
        while len(self._waiting) > lag:
            waiting = self._waiting.popleft()
            subject, of_class, norm, *wished = waiting.read()
            self._check(
                waiting.step.step, {"loss_subject": subject, "loss_class": of_class, "grad_norm": norm}
            )
            self._last.append((subject, of_class))
            if self._report is not None:
                self._unsent.append(self._row(waiting.step, subject, of_class, norm))
            wish = max(wish, *(Wish(n) for n, ranks in enumerate(wished, start=1) if ranks), Wish.NONE)
        return wish

    def _check(self, step: int, figures: Row) -> None:
        wrong = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
        if wrong:
            self._flush()
            raise UserError(
                f"the training diverged at step {step}",
                f"{' and '.join(wrong)}; its images are {self._images(step)}",
                "lower train.lr or set a warm-up; if it is always these images, look at them",
            )

    def _row(self, step: StepReport, subject: float, of_class: float, norm: float) -> Row:
        return {
            "step": step.step,
            "loss_subject": subject,
            "loss_class": of_class,
            "grad_norm": norm,
            "lr": step.lr,
            "lr_text": step.lr_text,
            "workers": self._world,
        }

    def _flush(self) -> None:
        """Send every row that was read and not sent yet."""
        if not self._unsent:
            return
        now = time.monotonic()
        rate = len(self._unsent) / max(now - self._since, 1e-9)
        memory = {"steps_per_second": round(rate, 4), "memory_mb": round(peak_memory_mb(self._device), 1)}
        rows, self._unsent, self._since = [row | memory for row in self._unsent], [], now
        self._send(rows)

    def _send(self, rows: list[Row]) -> None:
        if rows and self._report is not None:
            self._sent += [json.dumps(row) + "\n" for row in rows]
            self._report("steps", rows)


def rows_kept(storage: Storage, path: str, last_step: int) -> list[Row]:
    """The rows of steps 1 to `last_step` that `Figures.keep` wrote; those that are there."""
    if not last_step or not storage.exists(path):
        return []
    rows = (json.loads(line) for line in storage.read(path).splitlines())
    return [row for row in rows if row["step"] <= last_step]


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has had: allocated by torch on a GPU, resident on a CPU; in 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    # not getrusage's, which on Linux counts what the parent held when it started this process
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6
