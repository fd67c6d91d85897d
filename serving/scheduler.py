"""This file is where it is decided which rows take part in the next denoising step. It knows no torch, thread or clock.

Rows of one kind (the same whole weights, the same size) can share a forward pass. Within a kind, first come, first
served: a row stays in the batch until it is done, and the next one joins as soon as there is room. Between kinds,
turns: each has a number of steps, then those that waited longest. So no row waits for ever, whatever arrives.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field

TURN = 8  # steps of one kind while others wait: whole weights are not exchanged for every step


@dataclass(frozen=True)
class Entry:
    """One row that is wanted."""

    id: str
    cost: int
    """Rows of a forward pass that it takes."""
    deadline: float | None = None
    """When nobody wants it any more, on the caller's clock."""


@dataclass
class _Queue:
    """The entries of one kind."""

    waiting: deque[Entry] = field(default_factory=deque)
    running: list[Entry] = field(default_factory=list)


class Scheduler:
    """Who is drawn when.

    Args:
        width: Rows of a forward pass.
        turn: Steps that a kind has while others wait.
    """

    def __init__(self, width: int, turn: int = TURN) -> None:
        self.width, self._turn = width, turn
        self._kinds: OrderedDict[Hashable, _Queue] = OrderedDict()  # the one whose turn it is comes first
        self._of: dict[str, Hashable] = {}
        self._unready: dict[str, Entry] = {}
        self._deadlines: dict[str, float] = {}
        self._taken = 0  # steps of the present turn

    def __len__(self) -> int:
        return len(self._of) + len(self._unready)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to take a step of."""
        return not self._kinds

    @property
    def next_deadline(self) -> float | None:
        """The earliest one."""
        return min(self._deadlines.values(), default=None)

    @property
    def running(self) -> int:
        """Rows that have begun and are not done."""
        return sum(len(queue.running) for queue in self._kinds.values())

    @property
    def waiting(self) -> int:
        """Rows that have not begun."""
        return len(self) - self.running

    def add(self, entry: Entry) -> None:
        """Hold a row that cannot take part yet: its subject is not in memory, say.

        Raises:
            ValueError: It is wider than a forward pass, or there already.
        """
        if not 1 <= entry.cost <= self.width or entry.id in self._of or entry.id in self._unready:
            raise ValueError(f"{entry} cannot be scheduled at width {self.width}")
        self._unready[entry.id] = entry
        if entry.deadline is not None:
            self._deadlines[entry.id] = entry.deadline

    def ready(self, id: str, kind: Hashable) -> None:
        """Put a row that is held at the end of its kind's queue."""
        self._kinds.setdefault(kind, _Queue()).waiting.append(self._unready.pop(id))
        self._of[id] = kind

    def remove(self, id: str) -> None:
        """Take a row out, done or not; one that is not there is none of ours."""
        self._deadlines.pop(id, None)
        self._unready.pop(id, None)
        if id not in self._of:
            return
        kind = self._of.pop(id)
        queue = self._kinds[kind]
        queue.running = [entry for entry in queue.running if entry.id != id]
        queue.waiting = deque(entry for entry in queue.waiting if entry.id != id)
        if not queue.running and not queue.waiting:
            if next(iter(self._kinds)) == kind:
                self._taken = 0
            del self._kinds[kind]

    def expired(self, now: float) -> list[str]:
        """Rows whose deadline has passed; they stay until they are removed."""
        return [id for id, deadline in self._deadlines.items() if deadline <= now]

    def step(self) -> list[str]:
        """The rows of the next step, those that were in the last one first; empty when there are none."""
        if not self._kinds:
            return []
        if self._taken >= self._turn and len(self._kinds) > 1:
            self._kinds.move_to_end(next(iter(self._kinds)))
            self._taken = 0
        queue = next(iter(self._kinds.values()))
        room = self.width - sum(entry.cost for entry in queue.running)
        while queue.waiting and queue.waiting[0].cost <= room:
            room -= queue.waiting[0].cost
            queue.running.append(queue.waiting.popleft())
        self._taken += 1
        return [entry.id for entry in queue.running]
