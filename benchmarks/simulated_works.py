"""This file is where the work of a campaign is simulated: the real crew, over gangs and a clock that are not.

Prior sets are there already, and publishing takes no time: neither was measured alone.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.simulated_gang import SimulatedGang, Tally
from benchmarks.simulated_nodes import Clock, Nodes, Stages
from cluster.mailbox import BAD_INPUT
from orchestrator.crew import Crew, Gang, Kind
from orchestrator.facts import Checked, Fact, Failed, Ready, Registered
from orchestrator.recovery import Size
from orchestrator.roster import Outline
from training.gang import GangShape

KIND = Kind("pocket", GangShape())


class SimulatedCrew(Crew):
    """The real crew with gangs that are simulated.

    Args:
        make: Makes one.
        limit: Gangs at a time.
        runs_per_gang: Runs after which a gang is replaced.
    """

    def __init__(self, make: Callable[[], SimulatedGang], limit: int, runs_per_gang: int) -> None:
        super().__init__("fleet", limit, runs_per_gang, None, lambda run, events: None)
        self._make, self._started = make, 0

    def _start(self, kind: Kind) -> None:
        gang: Any = self._make()  # stands for the mailbox and for the thread
        self._started += 1
        self._gangs.append(Gang(f"{self._started:08x}", kind, gang, gang))


class SimulatedWorks:
    """Works that take the time that was measured, of a clock that does not.

    Args:
        outlines: What is known of a run, by its id.
        stages: How long everything takes.
        nodes: How many there are.
        room: Workers on each.
        runs_per_gang: As the schedule has it.
        quantum_s: Seconds that pass from one look of the controller to the next.
        seed: Of everything drawn by chance.
    """

    def __init__(
        self,
        outlines: Callable[[int], Outline],
        stages: Stages,
        nodes: int,
        room: int = 1,
        runs_per_gang: int = 50,
        quantum_s: float = 10.0,
        seed: int = 0,
    ) -> None:
        self._outlines, self._stages, self._quantum_s = outlines, stages, quantum_s
        self._rng = random.Random(seed)
        self.clock, self.tally = Clock(), Tally()
        self.nodes = Nodes(self.clock, nodes, room, stages, random.Random(seed + 1))
        self.began: dict[int, float] = {}
        """When each run's first step was first begun."""
        self.leases: list[Sequence[int | None]] = []
        """Every lease, in order."""
        self._saved: dict[int, int] = {}

        def began(run: int, at: float) -> None:
            self.began.setdefault(run, at)

        make = partial(SimulatedGang, self.nodes, self._saved, self.tally, began)
        self._crew = SimulatedCrew(make, nodes * room, runs_per_gang)
        self._facts: list[Fact] = []
        self._to_encode: deque[int] = deque()
        self._encoded_at = 0.0

    def outline(self, run: int, size: Size) -> Outline:
        return self._outlines(run)

    def width(self, bank_key: str) -> int | None:
        raise AssertionError("the width of banks is given")

    def measure(self, kind: Kind, run: int) -> None:
        raise AssertionError("the width of banks is given")

    def check(self, run: int, size: Size) -> None:
        self._to_encode.append(run)

    def draw_first(self, prior_keys: Sequence[str]) -> None:
        pass

    def staff(self, live: Mapping[Kind, int], active: Mapping[Kind, int]) -> None:
        self._crew.want(active, active)

    def free(self, kind: Kind) -> int:
        return len(self._crew.idle(kind))

    def train(self, kind: Kind, slots: Sequence[int | None]) -> str:
        gang = self._crew.idle(kind)[0]
        leases: Any = [None if run is None else (run, run) for run in slots]
        self._crew.lease(gang, leases)
        self.leases.append(slots)
        return gang.name

    def drop(self, run: int) -> None:
        self._crew.drop(run)

    def publish(self, run: int, metrics: Mapping[str, float]) -> None:
        self._facts.append(Registered(run, "v1", f"/artifacts/{run}", metrics))

    def end(self, run: int, state: str, reason: str | None) -> None:
        self._crew.forget(run)

    def facts(self, wait_s: float) -> list[Fact]:
        if wait_s:
            self.clock.advance(self.clock.now + self._quantum_s)
            self._encode()
        found, self._facts = [*self._facts, *self._crew.listen()], []
        return found

    def leave(self) -> bool:
        return self._crew.leave() or bool(self._facts)

    @property
    def spent(self) -> Mapping[str, float]:
        return {"worker": self.tally.worker_s, "cpu": self.tally.worker_s, "gpu": 0.0}

    def close(self) -> None:
        """Count what gangs still hold."""
        for gang in list(self._crew):
            gang.mailbox.stop()

    def _encode(self) -> None:
        """One encoder, one run after the other."""
        while self._to_encode and self._encoded_at + self._stages.encode_s <= self.clock.now:
            run = self._to_encode.popleft()
            self._encoded_at += self._stages.encode_s
            if self._rng.random() < self._stages.bad:
                self._facts.append(Failed(run, BAD_INPUT, "a photo is damaged", "simulated", "save it again"))
            else:
                self._facts += [Checked(run, "v1", f"{run:x}", self._outlines(run).prior_key), Ready(run)]
        if not self._to_encode:
            self._encoded_at = self.clock.now
