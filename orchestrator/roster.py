"""This file is where a controller keeps the runs of its campaign in mind: their rows, their groups, who is ready.

It is what is on record and what changed since. It decides nothing, and has no clock, no cluster and no database.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from orchestrator.order import Facts, Group, groups
from orchestrator.records import ENDED, Change, RunRow
from orchestrator.recovery import Size


@dataclass(frozen=True)
class Outline:
    """What is known of a run before anything is done for it."""

    kind: Any
    """Which gangs can train it; runs of one kind compare equal."""
    bank_key: str | None
    """Runs of one key may be trained together; `None` is trained alone."""
    prior_key: str | None
    can: frozenset[Size] = frozenset()
    """How else than by a smaller bank it could need less memory."""


class Roster:
    """The runs of a campaign.

    Args:
        rows: As they are on record, in their order.
        per_tenant: No bank is wider than what a tenant may train at a time.
    """

    def __init__(self, rows: Sequence[RunRow], per_tenant: int | None = None) -> None:
        self._rows = {row.id: row for row in rows}
        self._per_tenant = per_tenant
        self.outlines: dict[int, Outline] = {}
        self.groups: dict[int, Group] = {}
        """Those with a run that has not ended, by number."""
        self.unfinished = {row.id for row in rows if row.state not in ENDED}
        self.urgent = False
        """Whether a state changed that is not on record yet."""
        self.ungrouped = False
        """Whether there are runs that could be put into groups."""
        self._changes: dict[int, dict[str, Any]] = {}
        self._ready: set[int] = set()
        self._training: dict[int, set[int]] = {}  # by group, the runs that its gang has not ended
        self._leased: dict[int, Group] = {}  # as they were when they were leased
        self._ended_leases: list[int] = []
        self._queued: set[int] = set()
        self._touched: set[int] = set()
        self._kinds: dict[int, Any] = {}  # by group
        self._live: Counter[Any] = Counter()  # groups by kind
        self._active: Counter[Any] = Counter()  # those of them that are queued or train
        self._loose: set[int] = set()  # that have not ended, are in no group, and could be
        self._regroup: dict[tuple[int, int], list[int]] = {}

    # -- rows ----------------------------------------------------------------------------------------------

    def __getitem__(self, run: int) -> RunRow:
        return self._rows[run]

    @property
    def rows(self) -> Sequence[RunRow]:
        """All of them, in the manifest's order."""
        return list(self._rows.values())

    def open(self) -> list[RunRow]:
        """Those that have not ended."""
        return [row for row in self._rows.values() if row.id in self.unfinished]

    def change(self, run: int, **fields: Any) -> None:
        """Change a row in a way that goes on record before anything else is done."""
        self.note(run, **fields)
        self.urgent = True
        if fields.get("state") in ENDED:
            self.unfinished.discard(run)
            self._loose.discard(run)
            self._touch(run)

    def note(self, run: int, **fields: Any) -> None:
        """Change a row in a way that can go on record later."""
        self._rows[run] = replace(self._rows[run], **fields)
        self._changes.setdefault(run, {}).update(fields)
        if fields.get("group_no") is not None:
            self._loose.discard(run)

    def take_changes(self) -> list[Change]:
        """What goes on record."""
        changes, self._changes, self.urgent = self._changes, {}, False
        return [Change(run, fields) for run, fields in changes.items()]

    def again(self, row: RunRow) -> None:
        """Take a run up again that was queued anew from outside."""
        self._rows[row.id] = row
        self._changes.pop(row.id, None)
        self._ready.discard(row.id)
        self.unfinished.add(row.id)

    # -- groups --------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> set[Any]:
        """The kinds of gangs that the groups need."""
        return set(self._live)

    def outline(self, run: int, outline: Outline) -> None:
        """What is known of a run; it can be grouped."""
        self.outlines[run] = outline
        number = self._rows[run].group_no
        if number is None:
            self._loose.add(run)
        # one that is tried again is in its group still, and to group looks at all runs
        group = None if number is None else self.groups.get(number)
        if group is None or run not in group.run_ids:
            self.ungrouped = True

    def group(self, width_of: Callable[[str | None], int | None]) -> None:
        """Put runs into groups wherever it is known how many of their bank key train together."""
        self.ungrouped = False
        kept, free = list[Facts](), dict[int, list[Facts]]()
        grouped = {run for group in self.groups.values() for run in group.run_ids}
        for run in self.unfinished - grouped:
            row, outline = self._rows[run], self.outlines.get(run)
            if outline is None:
                continue
            facts = _facts(row, outline)
            if row.group_no is not None:
                kept.append(facts)
            elif (width := width_of(outline.bank_key)) is not None:
                free.setdefault(width, []).append(facts)
        for group in groups(kept, 1):
            before = self.groups.get(group.number)
            self._add(replace(group, run_ids=(*before.run_ids, *group.run_ids)) if before else group)
        for width, facts_of in sorted(free.items()):
            first = 1 + max(
                (row.group_no for row in self._rows.values() if row.group_no is not None), default=-1
            )
            for group in groups(facts_of, width, self._per_tenant):
                self._add(replace(group, number=first + group.number))

    def regroup(self, run: int, width: int) -> None:
        """A run goes on in a group of another width, with those that left the same group for it."""
        self._regroup.setdefault((self._rows[run].group_no or 0, width), []).append(run)

    def unmeasured(self, width_of: Callable[[str | None], int | None]) -> dict[str, int]:
        """By bank key a ready run for which it is not known how many train together."""
        found: dict[str, int] = {}
        for run in sorted(self._loose & self._ready):
            key = self.outlines[run].bank_key
            if key is not None and key not in found and width_of(key) is None:
                found[key] = run
        return found

    def priors_missing(self) -> set[str]:
        """Prior sets of runs that are not ready."""
        keys = {self.outlines[run].prior_key for run in self.unfinished - self._ready if run in self.outlines}
        return {key for key in keys if key is not None}

    def demand(self) -> tuple[Counter[Any], Counter[Any]]:
        """By kind the groups that have not ended, and those of them that are ready or train."""
        live, active = Counter(self._live), +self._active
        for run in self._ungrouped_first():
            live[self.outlines[run].kind] += 1
            active[self.outlines[run].kind] += run in self._ready
        return live, active

    def _ungrouped_first(self) -> list[int]:
        """A run that is in no group, a ready one if there is any: one is enough for a gang that measures."""
        ready = next((run for run in self._loose if run in self._ready), None)
        return [ready] if ready is not None else list(islice(self._loose, 1))

    def kind(self, group: Group) -> Any:
        """The kind of gang that a group needs."""
        return self._kinds[group.number]

    def is_any(self, state: str) -> bool:
        """Whether any run is in a state."""
        return any(self._rows[run].state == state for run in self.unfinished)

    # -- who is ready, who trains --------------------------------------------------------------------------

    def ready(self, run: int) -> None:
        """Everything that a run needs is there."""
        self._ready.add(run)
        self._touch(run)

    def unready(self, run: int) -> None:
        """A run has to be made ready again."""
        self._ready.discard(run)

    def complete(self) -> Iterator[Group]:
        """Groups that can be trained now, all of their runs being ready; each is told once."""
        touched, self._touched = self._touched, set()
        for number in sorted(touched):
            group = self.groups.get(number)
            if group is None or number in self._training or number in self._queued:
                continue
            runs = [run for run in group.run_ids if run in self.unfinished]
            if not runs:
                self._remove(number)
            elif all(map(self._can_train, runs)):
                self._queued.add(number)
                self._active[self._kinds[number]] += 1
                yield group

    def slots(self, group: Group) -> list[int | None]:
        """The runs of a group by slot; one that has ended, or is not ready, leaves its slot empty."""
        runs = [run if self._can_train(run) else None for run in self.groups[group.number].run_ids]
        return [*runs, *[None] * (group.width - len(runs))]

    def _can_train(self, run: int) -> bool:
        return run in self.unfinished and run in self._ready and self._rows[run].state == "queued"

    def lease(self, group: Group, runs: Sequence[int]) -> None:
        """Runs of a group are with a gang."""
        self._queued.discard(group.number)
        self._training[group.number] = set(runs)
        self._leased[group.number] = group

    def unqueue(self, group: Group) -> None:
        """A group that was ready has no run left."""
        self._queued.discard(group.number)
        self._active[self._kinds[group.number]] -= 1
        self._touched.add(group.number)

    def members(self, run: int) -> int:
        """Runs that trained together with this one until now, itself among them."""
        number = self._rows[run].group_no
        return len(self._training.get(number, ())) or 1 if number is not None else 1

    def end_lease(self, run: int) -> None:
        """A run is not with its gang any more; known to `members` until `settle`."""
        self._ended_leases.append(run)

    def settle(self) -> list[Group]:
        """Groups of which no run is with a gang any more, and runs that go on in other groups."""
        ended: list[Group] = []
        for run in self._ended_leases:
            number = self._rows[run].group_no
            training = self._training.get(number) if number is not None else None
            if number is None or training is None or run not in training:
                continue
            training.discard(run)
            if not training:
                del self._training[number]
                self._active[self._kinds[number]] -= 1
                ended.append(self._leased.pop(number))
                self._touched.add(number)
        self._ended_leases = []
        moved, self._regroup = self._regroup, {}
        for (_, width), runs in moved.items():
            for start in range(0, len(runs), width):
                self._move(runs[start : start + width], width)
        return ended

    def _move(self, runs: Sequence[int], width: int) -> None:
        number = 1 + max(row.group_no for row in self._rows.values() if row.group_no is not None)
        for run in runs:
            old = self.groups[self._rows[run].group_no or 0]
            self.groups[old.number] = replace(old, run_ids=tuple(r for r in old.run_ids if r != run))
            self._touched.add(old.number)
            self.change(run, group_no=number, width=width)
        facts = [_facts(self._rows[run], self.outlines[run]) for run in runs]
        for group in groups(facts, width):
            self._add(group)

    def _add(self, group: Group) -> None:
        if group.number not in self.groups:
            kind = self._kinds[group.number] = self.outlines[group.run_ids[0]].kind
            self._live[kind] += 1
        self.groups[group.number] = group
        self._touched.add(group.number)
        for run in group.run_ids:
            if self._rows[run].group_no != group.number or self._rows[run].width != group.width:
                self.change(run, group_no=group.number, width=group.width)

    def _remove(self, number: int) -> None:
        del self.groups[number]
        self._live[self._kinds.pop(number)] -= 1
        self._live = +self._live

    def _touch(self, run: int) -> None:
        number = self._rows[run].group_no
        if number is not None:
            self._touched.add(number)


def _facts(row: RunRow, outline: Outline) -> Facts:
    return Facts(
        run_id=row.id,
        position=row.position,
        tenant=row.tenant,
        priority=row.priority,
        steps=row.steps,
        bank_key=outline.bank_key,
        prior_key=outline.prior_key,
        group_no=row.group_no,
        width=row.width,
    )
