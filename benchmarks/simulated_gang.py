"""This file is where workers are not started: gangs on simulated nodes that take as long as was measured.

A gang has the real mailbox, so what a death costs a lease, and when it is given up, is decided by the real code.
"""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.simulated_nodes import Nodes
from cluster.errors import SystemFailure
from cluster.mailbox import LEAVE, SYSTEM, Event, Mailbox, failure
from orchestrator.controller import POLL_S
from training.lease import Bank

_FIGURES = {"loss_subject": 0.5, "loss_class": 0.5}


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
