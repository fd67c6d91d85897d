"""This file is where workers are not started: a clock, nodes that are lost, and gangs that take as long as measured.

A gang here has the real mailbox, so what a death costs a lease, and when it is given up, is decided by the real code.
"""

import heapq
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from cluster.errors import SystemFailure
from cluster.mailbox import LEAVE, SYSTEM, Event, Mailbox, failure
from orchestrator.controller import POLL_S
from training.lease import Bank

GAIN = {1: 1.0, 2: 1.39, 4: 1.54, 8: 1.72}
"""How much cheaper a subject is in a bank of that width than alone: `python -m benchmarks.bank`, 2026-11-23."""
_FIGURES = {"loss_subject": 0.5, "loss_class": 0.5}


@dataclass(frozen=True)
class Stages:
    """How long things take, in seconds, and how often they go wrong."""

    start_s: float = 8.0
    """A worker's start."""
    subject_s: float = 4.1
    """A subject in a bank of 8, from lease to artifact, for `steps` steps."""
    steps: int = 100
    encode_s: float = 0.1
    """A subject in the one encoder there is, its photos checked."""
    every: int = 50
    """Steps between checkpoints; they take no time of their own here."""
    detect_s: float = 15.0
    """Until Ray misses a node that is gone; its default."""
    lost_h: float = 6.0
    """Mean hours until a node is lost (exponential law)."""
    back_s: float = 300.0
    """Until another comes in its place."""
    notice: float = 0.0
    """Share of losses with a notice, upon which a gang saves and leaves."""
    bad: float = 0.001
    """Share of subjects whose photos cannot be used."""
    failing: float = 0.001
    """Share of a lease's runs that fail by no fault of their own."""

    def step_s(self, width: int) -> float:
        """Of a step of a bank, whoever is left of it."""
        return width * self.subject_s * GAIN[8] / GAIN[width] / self.steps


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = count()

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Have something happen then."""
        heapq.heappush(self._due, (when, next(self._count), act))

    def advance(self, to: float) -> None:
        """Have everything happen until then, in order."""
        while self._due and self._due[0][0] <= to:
            when, _, act = heapq.heappop(self._due)
            self.now = max(self.now, when)
            act()
        self.now = to


class Nodes:
    """Nodes with room for some workers each, which are lost and come back.

    Args:
        clock: Passes.
        number: Of nodes.
        room: Workers on each.
        stages: When they are lost.
        rng: Draws when.
    """

    def __init__(self, clock: Clock, number: int, room: int, stages: Stages, rng: random.Random) -> None:
        self.clock, self.stages, self.rng = clock, stages, rng
        self.losses = 0
        self._room, self._up_since = room, dict.fromkeys(range(number), 0.0)
        self._on: dict[int, list[SimulatedGang]] = {node: [] for node in range(number)}
        self._waiting: list[SimulatedGang] = []
        self._held_s = 0.0
        for node in range(number):
            self._lose_later(node)

    @property
    def held_s(self) -> float:
        """Seconds that nodes were there, of all together."""
        return self._held_s + sum(self.clock.now - since for since in self._up_since.values())

    def place(self, gang: "SimulatedGang") -> None:
        """Start a gang's workers where there is room, as soon as there is any."""
        self._waiting.append(gang)
        self._fill()

    def free(self, gang: "SimulatedGang") -> None:
        """A gang needs its room no more."""
        for there in (self._waiting, *self._on.values()):
            if gang in there:
                there.remove(gang)
        self._fill()

    def _fill(self) -> None:
        for node in self._up_since:
            while self._waiting and len(self._on[node]) < self._room:
                gang = self._waiting.pop(0)
                self._on[node].append(gang)
                gang.placed()

    def _lose_later(self, node: int) -> None:
        mean_s = self.stages.lost_h * 3600
        self.clock.at(self.clock.now + self.rng.expovariate(1 / mean_s), lambda: self._lose(node))

    def _lose(self, node: int) -> None:
        self.losses += 1
        self._held_s += self.clock.now - self._up_since.pop(node)
        there, self._on[node] = self._on[node], []
        for gang in there:
            gang.lost(self.rng.random() < self.stages.notice)
        self.clock.at(self.clock.now + self.stages.back_s, lambda: self._back(node))

    def _back(self, node: int) -> None:
        self._up_since[node] = self.clock.now
        self._lose_later(node)
        self._fill()


@dataclass
class Tally:
    """What is counted of all gangs together."""

    worker_s: float = 0.0
    """That workers were on nodes, their starts included."""
    training_s: float = 0.0
    steps_lost: int = 0
    steps: int = 0
    """Done, those that were lost included."""
    starts: int = 0


class SimulatedGang:
    """A gang of one worker: its mailbox as the controller sees it, and its thread.

    Args:
        nodes: Where it can be.
        saved: The step of the last checkpoint, by run.
        tally: Counts.
        began: Told each run that starts, and when.
    """

    def __init__(
        self, nodes: Nodes, saved: dict[int, int], tally: Tally, began: Callable[[int, float], None]
    ) -> None:
        self.error: BaseException | None = None
        self._nodes, self._clock, self._stages = nodes, nodes.clock, nodes.stages
        self._saved, self._tally, self._told_of = saved, tally, began
        self._box = Mailbox()
        self._lease, self._width, self._runs = -1, 1, dict[int, int]()
        self._alive, self._up = True, False
        self._life = 0  # what was planned in a life before is not done any more
        self._on_since: float | None = None
        self._free_since = self._began_at = 0.0
        self._from: dict[int, int] = {}
        nodes.place(self)

    # -- the thread and the mailbox, as the crew has them --------------------------------------------------

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._alive

    def post(self, lease: Any, slots: Sequence[int]) -> int:
        """Take a lease of runs, by their ids."""
        given = lease.slots if isinstance(lease, Bank) else (lease,)
        self._lease, self._width = _now(self._box.post(lease, slots)), len(given)
        self._runs = {slot: given[slot] for slot in slots}
        if self._up:  # the controller looks twice a second, however seldom it does here
            self._begin(min(self._clock.now, self._free_since + POLL_S))
        return self._lease

    def drain(self, wait_s: float = 0.0) -> list[Event]:
        """What happened."""
        return _now(self._box.drain())

    def drop(self, n: int, slot: int) -> None:
        """End a run without a checkpoint."""
        if n == self._lease and self._runs.pop(slot, None) is not None:
            self._report("dropped", {"step": 0}, slot)

    def ask(self, wish: str) -> bool:
        """Leave what trains."""
        return wish == LEAVE and self.retire()

    def retire(self) -> bool:
        """Save what trains and end; `False` when nothing does."""
        trains = _now(self._box.retire())
        if trains:
            self._interrupt(kept=True)
        self._end()
        return trains

    def stop(self) -> None:
        """End: there are no more leases."""
        self._end()

    close = stop

    # -- what happens to it --------------------------------------------------------------------------------

    def placed(self) -> None:
        """There is room: its worker starts."""
        self._on_since = self._clock.now
        self._tally.starts += 1
        self._later(self._stages.start_s, self._awake)

    def lost(self, noticed: bool) -> None:
        """Its node is gone. With a notice, a gang saves and leaves before."""
        if self._up and self._runs:
            self._interrupt(kept=noticed)
        self._off()
        self._later(0.0 if noticed else self._stages.detect_s, lambda: self._nodes.place(self))

    def _awake(self) -> None:
        here = _now(self._box.resume())
        self._up, self._free_since = True, self._clock.now
        if here == self._lease:
            self._begin(self._clock.now)
        else:  # it has none, or was given up on it
            self._runs = {}

    def _begin(self, at: float) -> None:
        self._began_at = at
        self._from = {slot: self._saved.get(run, 0) for slot, run in self._runs.items()}
        for slot, run in self._runs.items():
            self._told_of(run, at)
            self._report("started", {"from_step": self._from[slot], "workers": 1}, slot)
        left = self._stages.steps - min(self._from.values())
        life = self._life
        ends_at = at + left * self._stages.step_s(self._width)
        self._clock.at(ends_at, lambda: self._finish() if life == self._life else None)

    def _finish(self) -> None:
        steps = self._stages.steps
        self._tally.training_s += self._clock.now - self._began_at
        for slot, run in self._runs.items():
            self._tally.steps += steps - self._from[slot]
            self._step(slot, steps)
            self._saved[run] = steps // self._stages.every * self._stages.every
            if self._nodes.rng.random() < self._stages.failing:
                self._report(
                    "failed", failure(SystemFailure("it ended", "simulated", "try again"), SYSTEM), slot
                )
            else:
                self._report("published", {"metrics": {"loss_subject": 0.5}}, slot)
        self._runs, self._free_since = {}, self._clock.now

    def _interrupt(self, kept: bool) -> None:
        """What trains ends; what is not in a checkpoint is lost."""
        self._tally.training_s += self._clock.now - self._began_at
        done = max(int((self._clock.now - self._began_at) / self._stages.step_s(self._width)), 0)
        for slot, run in self._runs.items():
            reached = min(self._from[slot] + done, self._stages.steps)
            saved = (
                reached if kept else max(reached // self._stages.every * self._stages.every, self._from[slot])
            )
            self._tally.steps += reached - self._from[slot]
            self._tally.steps_lost += reached - saved
            self._saved[run] = saved
            self._step(slot, reached)
            if kept:
                self._report("left", {"step": reached}, slot)

    def _step(self, slot: int, step: int) -> None:
        rate = 1 / self._stages.step_s(self._width)
        self._report("steps", [{"step": step, **_FIGURES, "steps_per_second": rate}], slot)

    def _report(self, kind: str, payload: Mapping[str, Any] | list[Any], slot: int) -> None:
        _now(self._box.report(self._lease, 0, kind, payload, slot))

    def _later(self, after_s: float, act: Callable[[], None]) -> None:
        life = self._life
        self._clock.at(self._clock.now + after_s, lambda: act() if life == self._life else None)

    def _off(self) -> None:
        """It is on no node any more."""
        if self._on_since is not None:
            self._tally.worker_s += self._clock.now - self._on_since
        self._on_since, self._up, self._life = None, False, self._life + 1

    def _end(self) -> None:
        if self._alive:
            self._alive = False
            self._off()
            self._nodes.free(self)


def _now(asked: Coroutine[Any, Any, Any]) -> Any:
    """What a mailbox answers when it need not wait."""
    try:
        asked.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("the mailbox waits")
