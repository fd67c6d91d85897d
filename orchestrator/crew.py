"""This file is where a campaign's gangs are: started, given leases, listened to, and let go."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from cluster.errors import SystemFailure
from cluster.mailbox import LOST_NODE, NOBODY, SYSTEM, Event, MailboxClient, create
from orchestrator.events import GangThread
from orchestrator.facts import Began, Fact, Failed, Measured, Published, Said, Stepped, Stopped
from training.gang import GangShape, run_gang
from training.lease import Bank, Calibrate, Lease

STOP_S = 10.0  # an idle gang that was told to stop ends within a moment
PATIENCE_S = 60.0  # for a run to be left or dropped; a gang that cannot even start again never answers
SPARE_S = 5.0  # without work, until a gang makes room for one of another kind
STILLBORN = 3  # gangs in a row that end before their workers are there


@dataclass(frozen=True)
class Kind:
    """Who can train a run: gangs of this base and shape."""

    base_revision: str
    shape: GangShape


@dataclass
class Gang:
    """One gang. A single lease is with it at a time, of one run or of a bank's."""

    name: str
    kind: Kind
    mailbox: MailboxClient
    thread: GangThread
    began: float = field(default_factory=time.monotonic)
    awake: bool = False
    """Whether its workers are there."""
    lease: int = -1
    runs: dict[int, int] = field(default_factory=dict)
    """Runs that have not ended, by slot."""
    measuring: bool = False
    leaving: bool = False
    """Whether its runs were asked to be saved and left."""
    answer_by: float | None = None
    """When what was asked of it must have happened."""
    taken: int = 0
    """Runs it was given."""
    idle_since: float = field(default_factory=time.monotonic)

    @property
    def idle(self) -> bool:
        """Whether it can be given a lease."""
        return self.awake and not self.runs and not self.leaving


class Crew:
    """The gangs of a campaign.

    Args:
        name: Of the campaign, for people who look at Ray.
        limit: Gangs at a time.
        runs_per_gang: Runs after which a gang is replaced by a fresh one.
        scratch: For Ray Train's notes: a folder of all nodes or a URI; `None` is a temporary folder.
        heard: Takes a run's events, to be written down.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        runs_per_gang: int,
        scratch: str | None,
        heard: Callable[[int, Sequence[Event]], None],
    ) -> None:
        self.limit = limit
        self._name, self._runs_per_gang, self._scratch, self._heard = name, runs_per_gang, scratch, heard
        self._gangs: list[Gang] = []
        self._ended: list[Gang] = []
        self._told: list[Fact] = []
        self._stillborn = 0
        self._not_before = 0.0
        self._spent = dict.fromkeys(("worker", "cpu", "gpu"), 0.0)

    # -- who is there --------------------------------------------------------------------------------------

    def idle(self, kind: Kind) -> list[Gang]:
        """Gangs that can be given a lease now."""
        return [gang for gang in self._gangs if gang.kind == kind and gang.idle]

    def want(self, wanted: Mapping[Kind, int], active: Mapping[Kind, int]) -> None:
        """Have as many gangs of each kind as there is work for, as far as the limit goes.

        Those that wait for room in the cluster count: its autoscaler sees them. A gang of another kind that has nothing
        to do at the moment makes room for one that has.
        """
        now = time.monotonic()
        for kind, work in wanted.items():
            there = sum(gang.kind == kind for gang in self._gangs)
            while there < work and now >= self._not_before:
                if len(self._gangs) >= self.limit:
                    spare = (gang for gang in self._gangs if gang.idle and not active.get(gang.kind))
                    other = next((gang for gang in spare if now - gang.idle_since > SPARE_S), None)
                    if other is None or not active.get(kind):
                        break
                    self._retire(other)
                self._start(kind)
                there += 1

    def rest(self, after_s: float) -> None:
        """Let gangs go that had nothing to do for as long; their room may be what others wait for."""
        for gang in list(self._gangs):
            if gang.idle and time.monotonic() - gang.idle_since >= after_s:
                self._retire(gang)

    def __iter__(self) -> Iterator[Gang]:
        return iter(self._gangs)

    @property
    def spent(self) -> dict[str, float]:
        """Seconds that workers, CPU cores (`cpu`) and GPUs (`gpu`) were held so far."""
        total = dict(self._spent)
        for gang in self._gangs:
            for unit, seconds in _seconds(gang).items():
                total[unit] += seconds
        return total

    # -- what they do --------------------------------------------------------------------------------------

    def lease(self, gang: Gang, slots: Sequence[tuple[int, Lease] | None]) -> None:
        """Give an idle gang its next runs: by slot the run and its lease; one slot is a run alone."""
        gang.runs, gang.measuring = {slot: of[0] for slot, of in enumerate(slots) if of}, False
        leases = tuple(of[1] if of else None for of in slots)
        gang.taken += len(gang.runs)
        gang.lease = gang.mailbox.post(Bank(leases) if len(leases) > 1 else leases[0], list(gang.runs))

    def measure(self, gang: Gang, run: int, lease: Lease, room: int | None) -> None:
        """Ask an idle gang how many runs such as this one are best trained together."""
        gang.runs, gang.measuring = {0: run}, True
        gang.lease = gang.mailbox.post(Calibrate(lease, room), [0])

    def drop(self, run: int) -> None:
        """End a run that trains, without a checkpoint."""
        for gang in self._gangs:
            for slot, found in gang.runs.items():
                if found == run:
                    gang.mailbox.drop(gang.lease, slot)
                    gang.answer_by = gang.answer_by or time.monotonic() + PATIENCE_S

    def forget(self, run: int) -> None:
        """Nothing is wanted of a run any more, and nothing more is told of it, should it still train."""
        for gang in self._gangs:
            for slot in [slot for slot, found in gang.runs.items() if found == run]:
                del gang.runs[slot]
                gang.mailbox.drop(gang.lease, slot)

    def leave(self) -> bool:
        """Have every run that trains saved and left; `False` when none does."""
        for gang in self._gangs:
            if gang.runs and not gang.leaving:
                gang.leaving, gang.answer_by = True, time.monotonic() + PATIENCE_S
                if not gang.mailbox.retire():  # it has not begun: nothing is lost
                    self._told += [Stopped(run, kept=True) for run in gang.runs.values()]
                    gang.runs.clear()
        return bool(self._told) or any(gang.runs for gang in self._gangs)

    def listen(self) -> list[Fact]:
        """What happened since the last call.

        Raises:
            SystemFailure: One gang after the other ends before its workers are there.
        """
        facts, self._told = self._told, []
        for gang in list(self._gangs):
            alive = gang.thread.is_alive()
            events = gang.mailbox.drain()
            facts += self._take(gang, events)
            if not gang.runs:
                gang.answer_by = None
            if not alive:
                facts += self._dead(gang)
            elif gang.answer_by is not None and time.monotonic() > gang.answer_by:
                facts += self._lost(gang)
            elif not gang.runs and gang.taken >= self._runs_per_gang and gang.awake:
                self._retire(gang)
        self._ended = [gang for gang in self._ended if not self._gone(gang)]
        return facts

    def close(self) -> None:
        """End all gangs; what they train goes on from its last checkpoint some time."""
        for gang in self._gangs:
            self._retire(gang)
        until = time.monotonic() + STOP_S
        while self._ended and time.monotonic() < until:
            self._ended = [gang for gang in self._ended if not self._gone(gang)]
            time.sleep(0.05)
        for gang in self._ended:
            gang.mailbox.close()

    def _start(self, kind: Kind) -> None:
        name = f"raybooth-{self._name}-{uuid4().hex[:8]}"
        thread = GangThread(lambda: run_gang(name, kind.shape, self._scratch))
        gang = Gang(name.rpartition("-")[2], kind, create(name), thread)
        self._gangs.append(gang)
        thread.start()

    def _retire(self, gang: Gang) -> None:
        if gang.runs:
            gang.mailbox.close()
        else:
            gang.mailbox.stop()
            self._ended.append(gang)
        self._count(gang)

    def _count(self, gang: Gang) -> None:
        for unit, seconds in _seconds(gang).items():
            self._spent[unit] += seconds
        self._gangs = [other for other in self._gangs if other is not gang]

    def _gone(self, gang: Gang) -> bool:
        if gang.thread.is_alive():
            return False
        gang.mailbox.close()
        return True

    def _dead(self, gang: Gang) -> list[Fact]:
        """A gang that ended by itself: its runs have failed unless it was asked to leave them."""
        seen = (str(gang.thread.error or "").strip().splitlines() or [""])[-1]
        text = "the gang ended before the run did"
        lost: list[Fact] = [
            Stopped(run, kept=True) if gang.leaving else Failed(run, SYSTEM, text, seen)
            for run in gang.runs.values()
        ]
        gang.mailbox.close()
        self._count(gang)
        self._stillborn = 0 if gang.awake else self._stillborn + 1
        self._not_before = time.monotonic() + SPARE_S * self._stillborn
        if self._stillborn == STILLBORN:
            raise SystemFailure(
                "no gang comes up", seen, "see that its workers can start on the cluster's nodes"
            )
        return lost

    def _lost(self, gang: Gang) -> list[Fact]:
        """A gang that does not answer, as when it waits for a node that is gone: its runs go on elsewhere."""
        text = "the gang does not answer"
        lost: list[Fact] = [
            Stopped(run, kept=True) if gang.leaving else Failed(run, LOST_NODE, text)
            for run in gang.runs.values()
        ]
        gang.mailbox.close()
        self._count(gang)
        return lost

    # -- what they say -------------------------------------------------------------------------------------

    def _take(self, gang: Gang, events: Sequence[Event]) -> list[Fact]:
        facts: list[Fact] = []
        by_run: dict[int, list[Event]] = {}
        steps: dict[int, Stepped] = {}
        for event in events:
            if event.lease == NOBODY:
                if not gang.awake:
                    gang.awake, gang.began = True, time.monotonic()
                gang.idle_since = time.monotonic()
                continue
            run = gang.runs.get(event.slot) if event.lease == gang.lease else None
            if run is None:
                continue
            if not gang.measuring:
                by_run.setdefault(run, []).append(event)
            if event.kind == "step":
                steps[run] = Stepped(run, event.payload)
            else:
                facts += self._fact(gang, run, event)
        for run, said in by_run.items():
            self._heard(run, said)
        return [*steps.values(), *facts]

    def _fact(self, gang: Gang, run: int, event: Event) -> list[Fact]:
        said: Mapping[str, Any] = event.payload
        if event.kind == "started":
            return [Began(run, int(said["from_step"]))]
        if event.kind == "note":
            return [Said(run, str(said["text"]))]
        if event.kind == "left" and not gang.leaving:
            return [Said(run, f"the workers change: saved at step {said['step']}")]
        if event.kind not in ("published", "failed", "dropped", "left"):
            return []
        del gang.runs[event.slot]
        gang.idle_since = time.monotonic()
        measuring, gang.measuring = gang.measuring, gang.measuring and bool(gang.runs)
        if event.kind == "failed":
            parts = {part: str(said.get(part, "")) for part in ("what", "seen", "do")}
            return [Failed(run, str(said["kind"]), **parts)]
        if event.kind == "published" and measuring:
            return [Measured(run, int(said["metrics"]["width"]), dict(said["metrics"]))]
        if event.kind == "published":
            return [Published(run, dict(said["metrics"]))]
        return [Stopped(run, kept=event.kind == "left")]


def _seconds(gang: Gang) -> dict[str, float]:
    """What a gang has held so far, from when its workers were there."""
    held, shape = time.monotonic() - gang.began if gang.awake else 0.0, gang.kind.shape
    workers = held * shape.workers
    return {"worker": workers, "cpu": workers * shape.cpus_per_worker, "gpu": workers * shape.gpus_per_worker}
