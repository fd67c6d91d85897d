"""This file is where nodes are lost and come back, by a clock that does not wait, and how long work on them takes."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Protocol

GAIN = {1: 1.0, 2: 1.39, 4: 1.54, 8: 1.72}
"""How much cheaper a subject is in a bank of that width than alone: `python -m benchmarks.bank`, 2026-11-23."""


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


class Guest(Protocol):
    """What is on a node."""

    def placed(self) -> None:
        """There is room for it."""
        ...

    def lost(self, noticed: bool) -> None:
        """Its node is gone."""
        ...


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
        self._on: dict[int, list[Guest]] = {node: [] for node in range(number)}
        self._waiting: list[Guest] = []
        self._held_s = 0.0
        for node in range(number):
            self._lose_later(node)

    @property
    def held_s(self) -> float:
        """Seconds that nodes were there, of all together."""
        return self._held_s + sum(self.clock.now - since for since in self._up_since.values())

    def place(self, gang: Guest) -> None:
        """Start a gang's workers where there is room, as soon as there is any."""
        self._waiting.append(gang)
        self._fill()

    def free(self, gang: Guest) -> None:
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
