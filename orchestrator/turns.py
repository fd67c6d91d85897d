"""This file is where it is minded whose turn it is: runs are grouped, measured, and given to gangs that are free."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from orchestrator.campaign_settings import Schedule
from orchestrator.labour import Works
from orchestrator.order import Group, Queue, prior_order
from orchestrator.roster import Roster

MOST_MEASURED = 3  # tries to measure how many runs of a kind train together; then they train alone


class Turns:
    """Who trains next, of a campaign's runs.

    Args:
        roster: The runs.
        schedule: The campaign's settings.
        works: Trains them.
        act: Takes what is to be done once the decision is on record.
    """

    def __init__(
        self, roster: Roster, schedule: Schedule, works: Works, act: Callable[[Callable[[], None]], None]
    ) -> None:
        self._roster, self._works, self._act, self._bank = roster, works, act, schedule.bank
        self._queue = Queue(schedule.per_tenant)
        self._measuring: dict[str, int] = {}  # by bank key the run that is measured
        self._failed_to_measure: Counter[str] = Counter()

    def measured(self, run: int) -> None:
        """It is known how many runs such as this one train together."""
        self._measuring = {key: other for key, other in self._measuring.items() if other != run}
        self._group()

    def not_measured(self, run: int) -> None:
        """A run that was measured did not come to its end: another is taken, or in the end all are trained alone."""
        for key in [key for key, measured in self._measuring.items() if measured == run]:
            del self._measuring[key]
            self._failed_to_measure[key] += 1
            self._roster.ungrouped = True

    def settle(self) -> None:
        """Let groups wait for their turn that are ready, and let go of those that have ended."""
        if self._roster.ungrouped:
            self._group()
        for group in self._roster.settle():
            self._queue.ended(group)
        for group in self._roster.complete():
            self._queue.push(group, self._roster.kind(group))

    def assign(self) -> None:
        """Give free gangs the groups whose turn it is."""
        self._works.staff(*self._roster.demand())
        taken: Counter[Any] = Counter()
        for bank_key, run in self._roster.unmeasured(self._width).items():
            kind = self._roster.outlines[run].kind
            if bank_key not in self._measuring and self._works.free(kind) > taken[kind]:
                taken[kind] += 1
                self._measuring[bank_key] = run
                self._roster.note(run, phase="measuring how many train together")
                self._act(partial(self._works.measure, kind, run))
        for kind in self._roster.kinds:
            while self._works.free(kind) > taken[kind] and (group := self._queue.pop(kind)):
                slots = self._roster.slots(group)
                if any(run is not None for run in slots):
                    taken[kind] += 1
                    self._lease(group, kind, slots)
                else:
                    self._queue.ended(group)
                    self._roster.unqueue(group)

    def _group(self) -> None:
        """Group the runs that are not, wherever it is known how many train together."""
        self._roster.group(self._width)
        groups, missing = self._roster.groups.values(), self._roster.priors_missing()
        self._works.draw_first(prior_order(groups, missing))

    def _width(self, bank_key: str | None) -> int | None:
        if bank_key is None or self._bank == 1 or self._failed_to_measure[bank_key] == MOST_MEASURED:
            return 1
        return self._works.width(bank_key) if self._bank == "auto" else self._bank

    def _lease(self, group: Group, kind: Any, slots: Sequence[int | None]) -> None:
        now = time.time()
        runs = [run for run in slots if run is not None]
        for run in runs:
            row = self._roster[run]
            began, attempts = row.started_at or now, row.attempts + 1
            self._roster.change(run, state="training", phase="starting", attempts=attempts, started_at=began)
        self._roster.lease(group, runs)

        def act() -> None:
            name = self._works.train(kind, slots)
            for run in runs:
                self._roster.note(run, gang=name)

        self._act(act)
