"""This file is where a campaign and its gangs exchange letters: leases one way, events the other.

A named actor that lives as long as the campaign. Every rank asks for lease n itself, so that idle ranks wait in no
collective; a gang that restarts asks where it was.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import RayboothError, SystemFailure, UserError

GIVE_UP_AFTER = 3  # deaths of a gang on one lease without going further than it ever was
_FINAL = ("published", "failed", "dropped")  # the kinds of events that end a run of a lease
CHECKPOINT, LEAVE, DROP = "checkpoint", "leave", "drop"  # what can be asked of the workers that train
# Kinds of failures: what is done about one depends on it.
MEMORY, GANG_KILLED, BAD_INPUT, SYSTEM = "memory", "gang_killed", "bad_input", "system"
LOST_NODE = "lost_node"
NOBODY = -1  # the lease of events that are about the gang


class Withdrawn:
    """What a worker gets in place of a lease that was withdrawn before any worker took it."""


@dataclass(frozen=True)
class Event:
    """What a gang reports: `started, step, checkpoint, validation, sample, left, published, failed, dropped, note`.

    `awake` says that its workers are there, and is about no lease.
    """

    lease: int
    rank: int
    kind: str
    payload: Mapping[str, Any]
    slot: int = 0
    """The run, of a lease of several."""


@dataclass
class _Attempts:
    """How a lease fared so far."""

    deaths: int = 0
    """Since a step went further than any before."""
    furthest: dict[int, int] = field(default_factory=dict)
    """Steps, by slot."""
    error: str = ""
    """What a worker died of last, if it could tell."""
    kind: str = ""
    """The kind of that, such as `memory`, if it is a known one."""
    told: bool = False
    """Whether a worker told it since the last start: the first is the cause, the others lost that one."""


class Mailbox:
    """The actor's state. Plain, so that it is tested without Ray."""

    def __init__(self) -> None:
        self._leases: list[Any] = []
        self._open: list[set[int]] = []  # slots of each lease that have not ended
        self._taken: set[int] = set()
        self._stopped = False
        self._events: list[Event] = []
        self._attempts: dict[int, _Attempts] = defaultdict(_Attempts)
        self._training = False
        self._asked: list[str] = []
        self._changed = asyncio.Condition()

    async def post(self, lease: Any, slots: int | Sequence[int] = 1) -> int:
        """Add a lease of one run or of those in `slots`; returns its number."""
        async with self._changed:
            self._leases.append(lease)
            self._open.append(set(range(slots) if isinstance(slots, int) else slots))
            self._changed.notify_all()
        return len(self._leases) - 1

    async def stop(self) -> None:
        """After the leases that are posted there are no more."""
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    async def retire(self) -> bool:
        """Hand out no lease any more, not even an open one, and ask for the one in training to be left.

        Returns:
            Whether one is in training: it will end with an event `left`, unless it ends before.
        """
        self._leases = []
        await self.stop()
        return await self.ask(LEAVE)

    async def ask(self, wish: str) -> bool:
        """Ask the workers for a checkpoint, or to save one and leave; `False`, and nothing asked, when none trains."""
        async with self._changed:
            if self._training:
                self._asked.append(wish)
                self._changed.notify_all()
            return self._training

    async def drop(self, n: int, slot: int) -> None:
        """Have a run ended without a checkpoint. It ends with an event `dropped`, unless it ends before."""
        async with self._changed:
            if self._open[n] == {slot} and n not in self._taken:
                self._leases[n] = Withdrawn()
                self._open[n].clear()
                self._events.append(Event(n, 0, "dropped", {"step": 0}, slot))
            else:
                self._asked.append(f"{DROP} {n} {slot}")
            self._changed.notify_all()

    async def asked(self, after: int) -> list[str]:
        """What was asked of the gang that runs, but for the first `after` wishes; waits for the next."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._asked) > after)
            return self._asked[after:]

    async def quiet(self, wait_s: float) -> bool:
        """Whether no worker trains; waits for it up to `wait_s` seconds."""
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: not self._training), wait_s)
            return not self._training

    async def take(self, n: int) -> Any | None:
        """Lease `n`, as soon as it is posted, or that it is `Withdrawn`; `None` when there will be none."""
        async with self._changed:
            await self._changed.wait_for(lambda: n < len(self._leases) or self._stopped)
            self._taken.add(n)
        return self._leases[n] if n < len(self._leases) else None

    async def resume(self) -> int:
        """Where a gang that (re)starts goes on: the first lease that is not finished. One rank of it asks.

        A lease on which the gang died too often without getting further is failed, with what a worker died of. One
        that the gang left on purpose has cost it no life.
        """
        self._training, self._asked = False, [word for word in self._asked if word.startswith(DROP)]
        here = next((n for n, slots in enumerate(self._open) if slots), len(self._leases))
        if here >= len(self._leases):
            await self.report(NOBODY, 0, "awake", {})
            return here
        died, attempts = here in self._attempts, self._attempts[here]
        attempts.deaths, attempts.told = attempts.deaths + died, False
        if attempts.kind == MEMORY:
            error = SystemFailure(
                "the run needs more memory than its worker has",
                attempts.error,
                "lower train.pairs_per_step, raise train.accumulation or set engine.gradient_checkpointing: true",
            )
        elif attempts.deaths >= GIVE_UP_AFTER:
            error = SystemFailure(
                "the workers of this run die again and again",
                f"{attempts.deaths} times without getting further than step "
                f"{max(attempts.furthest.values(), default=0)}; "
                + (attempts.error or "none could tell why, as when a machine is out of memory"),
                "mend that and run the same command again: it goes on from the last checkpoint",
            )
        else:
            await self.report(NOBODY, 0, "awake", {})
            return here
        for slot in sorted(self._open[here]):
            await self.report(here, 0, "failed", failure(error, attempts.kind or GANG_KILLED), slot)
        return await self.resume()

    async def report(self, n: int, rank: int, kind: str, payload: Any, slot: int = 0) -> None:
        """Record an event of a run of lease `n`.

        Kind `steps` brings a list that becomes one `step` each. A `note` with `died` set says what a worker died of,
        and of what kind that is. What comes of a run that has ended is dropped, but for notes.
        """
        async with self._changed:
            if kind in _FINAL and slot not in self._open[n]:
                return
            if n == NOBODY:
                self._events.append(Event(n, rank, kind, payload))
            elif kind == "steps":
                self._count(n, slot, max(step["step"] for step in payload))
                self._events += [Event(n, rank, "step", step, slot) for step in payload]
            elif kind == "drawn":
                self._count(n, slot, payload["steps"])
                self._events.append(Event(n, rank, kind, payload, slot))
            else:
                attempts = self._attempts[n]
                if kind == "note" and payload.get("died") and not attempts.told:
                    attempts.error, attempts.told = payload["text"], True
                    attempts.kind = payload.get("kind", "")
                self._events.append(Event(n, rank, kind, payload, slot))
            if kind == "started":
                self._training = True
            elif kind == "left":
                self._training = False
                self._attempts.pop(n, None)
            elif kind in _FINAL:
                self._open[n].discard(slot)
                self._training = self._training and bool(self._open[n])
            self._changed.notify_all()

    def _count(self, n: int, slot: int, reached: int) -> None:
        """Progress: the deaths before it no longer count."""
        attempts = self._attempts[n]
        if reached > attempts.furthest.get(slot, 0):
            attempts.furthest[slot], attempts.deaths = reached, 0

    async def drain(self, wait_s: float = 0.0) -> list[Event]:
        """Events since the last call; waits up to `wait_s` seconds for the first one."""
        async with self._changed:
            if not self._events and wait_s > 0:
                try:
                    await asyncio.wait_for(self._changed.wait_for(lambda: self._events), wait_s)
                except TimeoutError:
                    return []
            events, self._events = self._events, []
        return events


class MailboxClient:
    """A mailbox as both sides see it: plain calls.

    Args:
        actor: The handle of a `Mailbox` actor.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._sent: Any = None

    def post(self, lease: Any, slots: int | Sequence[int] = 1) -> int:
        """Add a lease of one run or of those in `slots`; returns its number."""
        return int(ray.get(self._actor.post.remote(lease, slots)))

    def stop(self) -> None:
        """After the leases that are posted there are no more."""
        ray.get(self._actor.stop.remote())

    def retire(self) -> bool:
        """Hand out no lease any more and ask for the one in training to be left; `False` when there is none."""
        return bool(ray.get(self._actor.retire.remote()))

    def ask(self, wish: str) -> bool:
        """Ask the workers for a `CHECKPOINT`, or to `LEAVE`; `False`, and nothing asked, when none trains."""
        return bool(ray.get(self._actor.ask.remote(wish)))

    def drop(self, n: int, slot: int = 0) -> None:
        """Have a run ended without a checkpoint. It ends with an event `dropped`, unless it ends before."""
        ray.get(self._actor.drop.remote(n, slot))

    def asked(self, after: int) -> list[str]:
        """What was asked of the gang that runs, but for the first `after` wishes; waits for the next."""
        return list(ray.get(self._actor.asked.remote(after)))

    def quiet(self, wait_s: float) -> bool:
        """Whether no worker trains; waits for it up to `wait_s` seconds."""
        return bool(ray.get(self._actor.quiet.remote(wait_s)))

    def drain(self, wait_s: float = 0.0) -> list[Event]:
        """Events since the last call; waits up to `wait_s` seconds for the first one."""
        events: list[Event] = ray.get(self._actor.drain.remote(wait_s))
        return events

    def take(self, n: int) -> Any | None:
        """Lease `n`, as soon as it is posted, or that it is `Withdrawn`; `None` when there will be none."""
        return ray.get(self._actor.take.remote(n))

    def resume(self) -> int:
        """Where a gang that (re)starts goes on."""
        return int(ray.get(self._actor.resume.remote()))

    def report(self, n: int, rank: int, kind: str, payload: Any, slot: int = 0) -> None:
        """Send an event. Steps are sent without waiting for their arrival; any other kind has arrived afterwards."""
        # Ray may run an async actor's calls in another order than they were sent, so there is one under way at most
        if self._sent is not None:
            ray.get(self._sent)
        self._sent = self._actor.report.remote(n, rank, kind, payload, slot)
        if kind != "steps":
            ray.get(self._sent)

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


def create(name: str, kind: type[Mailbox] = Mailbox) -> MailboxClient:
    """A new mailbox on the node of this process: it must not die with another; `name` is unique to the campaign."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": name, "num_cpus": 0, "max_concurrency": 4096, "scheduling_strategy": here}
    return MailboxClient(ray.remote(kind).options(**options).remote())


def connect(name: str) -> MailboxClient:
    """The mailbox of that name, from another process of the same session."""
    return MailboxClient(ray.get_actor(name))


def failure(error: RayboothError, kind: str = "") -> dict[str, Any]:
    """The payload of a `failed` event, of which `failure_of` makes the error again; `kind` decides on a retry."""
    default = BAD_INPUT if isinstance(error, UserError) else SYSTEM
    return {**error.as_json(), "exit_code": error.exit_code, "kind": kind or default}


def put(value: Any) -> Any:
    """A reference to `value` in Ray's object store."""
    return ray.put(value)


def fetch(references: Sequence[Any]) -> list[Any]:
    """The objects behind references into Ray's object store, in order."""
    return list(ray.get(list(references)))
