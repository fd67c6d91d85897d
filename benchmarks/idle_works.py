"""This file is where the work of a campaign is not done: every run is ready, trained and published at once.

What is left is the control path, and what of it can go wrong.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from orchestrator.facts import (
    Began,
    Checked,
    Fact,
    Failed,
    Measured,
    Published,
    Ready,
    Registered,
    Stepped,
    Stopped,
)
from orchestrator.recovery import Size
from orchestrator.roster import Outline


class IdleWorks:
    """Does nothing, as fast as it can.

    Args:
        gangs: Groups that train at a time.
        outlines: What is known of a run; by default it trains alone and needs no prior set.
        fails: The failure that an attempt of a run ends with, by run and attempt (from 1); `None` succeeds.
        holds: Runs that train until they are dropped or left.
    """

    def __init__(
        self,
        gangs: int = 1,
        outlines: Callable[[int], Outline] = lambda run: Outline("cpu", None, None),
        fails: Callable[[int, int], Failed | None] = lambda run, attempt: None,
        holds: Sequence[int] = (),
    ) -> None:
        self.gangs, self._outlines, self._fails, self._holds = gangs, outlines, fails, set(holds)
        self.widths: dict[str, int] = {}
        self.leases: list[tuple[int | None, ...]] = []
        """Every lease, in order."""
        self.ended: dict[int, str] = {}
        self.drawn_first: list[str] = []
        self._facts: deque[Fact] = deque()
        self._attempts: dict[int, int] = {}
        self._training: dict[int, set[int]] = {}

    def outline(self, run: int, size: Size) -> Outline:
        return self._outlines(run)

    def width(self, bank_key: str) -> int | None:
        return self.widths.get(bank_key)

    def check(self, run: int, size: Size) -> None:
        self._facts += [Checked(run, "v1", f"{run:x}", None), Ready(run)]

    def draw_first(self, prior_keys: Sequence[str]) -> None:
        self.drawn_first = list(prior_keys)

    def staff(self, live: Mapping[object, int], active: Mapping[object, int]) -> None:
        pass

    def free(self, kind: object) -> int:
        return self.gangs - len(self._training)

    def train(self, kind: object, slots: Sequence[int | None]) -> str:
        self.leases.append(tuple(slots))
        number = len(self.leases)
        runs = [run for run in slots if run is not None]
        self._training[number] = set(runs)
        for run in runs:
            attempt = self._attempts[run] = self._attempts.get(run, 0) + 1
            self._facts += [
                Began(run, 0),
                Stepped(run, {"step": 1, "loss_subject": 0.5, "steps_per_second": 9.0}),
            ]
            if run not in self._holds:
                self._over(self._fails(run, attempt) or Published(run, {"loss_subject": 0.5}))
        return f"gang-{number}"

    def measure(self, kind: object, run: int) -> None:
        key = self._outlines(run).bank_key
        if key is not None:
            self.widths[key] = 4
        self._facts.append(Measured(run, 4))

    def drop(self, run: int) -> None:
        self._holds.discard(run)
        self._over(Stopped(run, kept=False))

    def publish(self, run: int, metrics: Mapping[str, float]) -> None:
        self._facts.append(Registered(run, "v1", f"/artifacts/{run}", metrics))

    def end(self, run: int, state: str, reason: str | None) -> None:
        self.ended[run] = state

    def facts(self, wait_s: float) -> list[Fact]:
        found, self._facts = list(self._facts), deque()
        return found

    def leave(self) -> bool:
        for run in [run for runs in self._training.values() for run in runs]:
            self._over(Stopped(run, kept=True))
        return bool(self._facts)

    @property
    def spent(self) -> Mapping[str, float]:
        return {"worker": 0.0, "cpu": 0.0, "gpu": 0.0}

    def _over(self, fact: Fact) -> None:
        self._facts.append(fact)
        for number, runs in list(self._training.items()):
            runs.discard(fact.run)
            if not runs:
                del self._training[number]
