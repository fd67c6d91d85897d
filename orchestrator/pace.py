"""This file is where it is estimated how long a campaign takes, from how fast its runs came on lately."""

from collections import deque
from collections.abc import Sequence

from orchestrator.records import ENDED, RunRow

WINDOW_S = 180.0  # a drawing of class images or a restart should not make the estimate jump
SETTLE_S = 4.0  # less than this says nothing yet


def span(seconds: float | None) -> str:
    """A span of time for people: `42 s`, `3:20 min`, `1:02 h`; empty when it is not known."""
    if seconds is None:
        return ""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def left_of(run: RunRow) -> float | None:
    """Seconds until a run that is training has done its steps."""
    if run.state != "training" or not run.rate:
        return None
    return max(run.steps - run.step, 0) / run.rate


def taken_by(run: RunRow) -> float | None:
    """Seconds that a run took from its start to its end; `None` before that."""
    if run.started_at is None or run.finished_at is None:
        return None
    return run.finished_at - run.started_at


class Pace:
    """The steps that all runs together have done, over the last minutes."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._left = 0

    def take(self, now: float, rows: Sequence[RunRow]) -> None:
        """Take where the runs stand at `now`, in seconds of any clock that goes on evenly."""
        done = sum(row.step for row in rows)
        self._left = sum(max(row.steps - row.step, 0) for row in rows if row.state not in ENDED)
        if self._seen and done < self._seen[-1][1]:  # one went back to its checkpoint, or begins anew
            lost = self._seen[-1][1] - done
            self._seen = deque((at, before - lost) for at, before in self._seen)
        self._seen.append((now, done))
        while now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()

    @property
    def speed(self) -> float | None:
        """Steps per second of all runs together; `None` before anything is known."""
        if not self._seen:
            return None
        (since, before), (now, done) = self._seen[0], self._seen[-1]
        if now - since < SETTLE_S or done <= before:
            return None
        return (done - before) / (now - since)

    @property
    def left_s(self) -> float | None:
        """Seconds until every run has done its steps; `None` before anything is known, or when none is left."""
        speed = self.speed
        return self._left / speed if speed and self._left else None
