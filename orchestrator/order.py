"""This file is where it is decided which runs train together and which go first. No clock, no cluster, no record."""

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby

WIDTHS = (1, 2, 4, 8)
"""What a bank can be wide: a bank of another width would have bits of its own."""


@dataclass(frozen=True)
class Facts:
    """What the order of a run depends on."""

    run_id: int
    position: int
    tenant: str
    priority: int
    steps: int
    bank_key: str | None
    """Runs of one key may share a bank; `None` trains alone."""
    prior_key: str | None
    group_no: int | None = None
    """As recorded; so is the width."""
    width: int | None = None


@dataclass(frozen=True)
class Group:
    """The unit that a gang takes: one run, or several in a bank."""

    number: int
    width: int
    run_ids: tuple[int, ...]
    """At most `width`, one for each slot from the first."""
    tenant: str
    priority: int
    steps: int
    """The most that one of its runs has."""
    position: int
    """The first of its runs'."""
    prior_keys: tuple[str, ...]
    """The prior sets it needs, in the order of its runs."""


def groups(rows: Iterable[Facts], width: int, per_tenant: int | None = None) -> list[Group]:
    """The groups of the runs that are still to be trained, in the order of their numbers.

    A function of the manifest and of what is recorded, never of what happens to be ready. Runs with a recorded group
    keep it and its width, whoever else is left of it. The others of one bank key, tenant and priority are ordered by
    prior set, steps and position and cut into banks; what remains gets the smallest width that holds it.

    Args:
        rows: In any order.
        width: The widest bank, one of `WIDTHS`; 1 trains every run alone.
        per_tenant: As many runs of a tenant at a time; no bank is made wider. `None` means no limit.
    """
    widest = _widest(width if per_tenant is None else min(width, per_tenant))
    kept: dict[int, list[Facts]] = {}
    free: list[Facts] = []
    for row in rows:
        if row.group_no is None:
            free.append(row)
        else:
            kept.setdefault(row.group_no, []).append(row)
    found = [
        _group(number, members, max(row.width or 1 for row in members)) for number, members in kept.items()
    ]
    cut = sorted(_cut(free, widest), key=lambda members: min(row.position for row in members))
    after = max(kept, default=-1) + 1
    found += [_group(after + i, members, _holding(len(members), widest)) for i, members in enumerate(cut)]
    return sorted(found, key=lambda group: group.number)


def _cut(rows: Iterable[Facts], width: int) -> list[list[Facts]]:
    """Runs that go together, each list in the order of its slots."""
    alone = [[row] for row in rows if row.bank_key is None or width == 1]
    if width == 1:
        return alone
    banked = sorted((row for row in rows if row.bank_key is not None), key=_bank)
    for _, alike in groupby(banked, key=_bank):
        ordered = sorted(alike, key=lambda row: (row.prior_key or "", row.steps, row.position))
        alone += [ordered[start : start + width] for start in range(0, len(ordered), width)]
    return alone


def _bank(row: Facts) -> tuple[str, str, int]:
    return row.bank_key or "", row.tenant, row.priority


def _widest(width: int) -> int:
    """The widest bank that is not wider than asked for."""
    return max(w for w in WIDTHS if w <= max(width, 1))


def _holding(runs: int, width: int) -> int:
    """The narrowest bank that holds as many runs."""
    return min(w for w in (*WIDTHS, width) if w >= runs)


def _group(number: int, members: Sequence[Facts], width: int) -> Group:
    first = members[0]
    priors = dict.fromkeys(row.prior_key for row in members if row.prior_key is not None)
    return Group(
        number=number,
        width=width,
        run_ids=tuple(row.run_id for row in members),
        tenant=first.tenant,
        priority=max(row.priority for row in members),
        steps=max(row.steps for row in members),
        position=min(row.position for row in members),
        prior_keys=tuple(priors),
    )


class Queue:
    """Groups that are ready to be trained, and whose turn it is.

    They wait in lanes, one for each kind of gang. In a lane a higher priority goes first; within one, tenants take
    turns; of a tenant's, the one with the fewest steps goes first, then the one listed first. A tenant that has as many
    runs training as it may waits; were one of its smaller groups let past the one whose turn it is, that one could wait
    for ever.

    Args:
        per_tenant: As many runs of a tenant train at a time, in all lanes together; `None` means no limit. A tenant of
            whom nothing trains may always have one group, whatever its width.
    """

    def __init__(self, per_tenant: int | None = None) -> None:
        self._per_tenant = per_tenant
        self._waiting: dict[
            tuple[Hashable, str], list[tuple[int, int, int, int]]
        ] = {}  # a heap a lane and tenant
        self._groups: dict[int, Group] = {}
        self._training: dict[str, int] = {}
        self._served: dict[str, int] = {}  # the turn at which a tenant had one last
        self._turn = 0
        self._next: dict[
            Hashable, list[tuple[int, int, int, int, str]]
        ] = {}  # heaps; entries may be out of date

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, number: int) -> bool:
        return number in self._groups

    def push(self, group: Group, lane: Hashable = None) -> None:
        """Have a group wait for its turn."""
        if group.number in self._groups:
            raise ValueError(f"group {group.number} waits already")
        self._groups[group.number] = group
        rank = (-group.priority, group.steps, group.position, group.number)
        heappush(self._waiting.setdefault((lane, group.tenant), []), rank)
        self._enter(lane, group.tenant)

    def pop(self, lane: Hashable = None) -> Group | None:
        """The group whose turn it is, which counts as training until it has `ended`; `None` when none may train."""
        entries = self._next.get(lane)
        while entries:
            entry = heappop(entries)
            tenant = entry[-1]
            if entry != self._entry(lane, tenant):
                continue
            group = self._groups.pop(heappop(self._waiting[lane, tenant])[-1])
            self._training[tenant] = self._training.get(tenant, 0) + len(group.run_ids)
            self._turn += 1
            self._served[tenant] = self._turn
            self._enter_all(tenant)
            return group
        return None

    def ended(self, group: Group) -> None:
        """A group that was popped trains no longer."""
        self._training[group.tenant] -= len(group.run_ids)
        self._enter_all(group.tenant)

    def _enter_all(self, tenant: str) -> None:
        for lane in self._next:
            self._enter(lane, tenant)

    def _enter(self, lane: Hashable, tenant: str) -> None:
        entries = self._next.setdefault(lane, [])
        entry = self._entry(lane, tenant)
        if entry:
            heappush(entries, entry)

    def _entry(self, lane: Hashable, tenant: str) -> tuple[int, int, int, int, str] | None:
        """The tenant's place in a lane; `None` when it has nothing to train there or must wait."""
        waiting = self._waiting.get((lane, tenant))
        if not waiting:
            return None
        priority, steps, position, number = waiting[0]
        training = self._training.get(tenant, 0)
        wanted = len(self._groups[number].run_ids)
        if self._per_tenant and training and training + wanted > self._per_tenant:
            return None
        return priority, self._served.get(tenant, 0), steps, position, tenant


def prior_order(waiting: Iterable[Group], missing: Collection[str]) -> list[str]:
    """The prior sets to draw, first the one that the group needs whose turn comes first.

    Args:
        waiting: Groups that have not been trained.
        missing: Keys of prior sets with images still to draw. Those that no group needs are left out.
    """
    queue = Queue()
    for one in waiting:
        if any(key in missing for key in one.prior_keys):
            queue.push(one)
    found: dict[str, None] = {}
    while group := queue.pop():
        found |= dict.fromkeys(key for key in group.prior_keys if key in missing)
    return list(found)
