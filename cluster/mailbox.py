"""This file is where a campaign and its gangs exchange letters: leases one way, events the other.

A named actor that lives as long as the campaign. Every rank asks for lease n itself, so that idle ranks wait in no
collective; a gang that restarts asks where it was.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import RayboothError, SystemFailure

GIVE_UP_AFTER = 3  # deaths of a gang on one lease without going further than it ever was
_FINAL = ("published", "failed")  # the kinds of events that end a lease
CHECKPOINT, LEAVE = "checkpoint", "leave"  # what can be asked of the workers that train


@dataclass(frozen=True)
class Event:
    """What a gang reports: `started, step, checkpoint, validation, sample, left, published, failed, note`."""

    lease: int
    rank: int
    kind: str
    payload: Mapping[str, Any]


@dataclass
class _Attempts:
    """How a lease fared so far."""

    deaths: int = 0
    """Since a step went further than any before."""
    furthest: int = 0
    """Steps."""
    error: str = ""
    """What a worker died of last, if it could tell."""
    told: bool = False
    """Whether a worker told it since the last start: the first is the cause, the others lost that one."""


class Mailbox:
    """The actor's state. Plain, so that it is tested without Ray."""

    def __init__(self) -> None:
        self._leases: list[Any] = []
        self._stopped = False
        self._finished: set[int] = set()
        self._events: list[Event] = []
        self._attempts: dict[int, _Attempts] = defaultdict(_Attempts)
        self._training = False
        self._asked: list[str] = []
        self._changed = asyncio.Condition()

    async def post(self, lease: Any) -> int:
        """Add a lease; returns its number."""
        async with self._changed:
            self._leases.append(lease)
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
        """Lease `n`, as soon as it is posted; `None` when there will be none."""
        async with self._changed:
            await self._changed.wait_for(lambda: n < len(self._leases) or self._stopped)
        return self._leases[n] if n < len(self._leases) else None

    async def resume(self) -> int:
        """Where a gang that (re)starts goes on: the first lease that is not finished. One rank of it asks.

        A lease on which the gang died too often without getting further is failed, with what a worker died of. One
        that the gang left on purpose has cost it no life.
        """
        self._training, self._asked = False, []
        here = self._first_open()
        if here >= len(self._leases):
            return here
        died, attempts = here in self._attempts, self._attempts[here]
        attempts.deaths, attempts.told = attempts.deaths + died, False
        if attempts.deaths < GIVE_UP_AFTER:
            return here
        error = SystemFailure(
            "the workers of this run die again and again",
            f"{attempts.deaths} times without getting further than step {attempts.furthest}; "
            + (attempts.error or "none could tell why, as when a machine is out of memory"),
            "mend that and run the same command again: it goes on from the last checkpoint",
        )
        await self.report(here, 0, "failed", failure(error))
        return await self.resume()

    async def report(self, n: int, rank: int, kind: str, payload: Any) -> None:
        """Record an event of lease `n`.

        Kind `steps` brings a list that becomes one `step` each. A `note` with `died` set says what a worker died of.
        """
        async with self._changed:
            attempts = self._attempts[n]
            if kind == "steps":
                self._events += [Event(n, rank, "step", step) for step in payload]
                reached = max(step["step"] for step in payload)
                if reached > attempts.furthest:
                    attempts.furthest, attempts.deaths = reached, 0
            else:
                if kind == "note" and payload.get("died") and not attempts.told:
                    attempts.error, attempts.told = payload["text"], True
                self._events.append(Event(n, rank, kind, payload))
            if kind == "started":
                self._training = True
            elif kind == "left":
                self._training = False
                del self._attempts[n]
            elif kind in _FINAL:
                self._training = False
                self._finished.add(n)
            self._changed.notify_all()

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

    def _first_open(self) -> int:
        return next((n for n in range(len(self._leases)) if n not in self._finished), len(self._leases))


class MailboxClient:
    """A mailbox as both sides see it: plain calls.

    Args:
        actor: The handle of a `Mailbox` actor.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._sent: Any = None

    def post(self, lease: Any) -> int:
        """Add a lease; returns its number."""
        return int(ray.get(self._actor.post.remote(lease)))

    def stop(self) -> None:
        """After the leases that are posted there are no more."""
        ray.get(self._actor.stop.remote())

    def retire(self) -> bool:
        """Hand out no lease any more and ask for the one in training to be left; `False` when there is none."""
        return bool(ray.get(self._actor.retire.remote()))

    def ask(self, wish: str) -> bool:
        """Ask the workers for a `CHECKPOINT`, or to `LEAVE`; `False`, and nothing asked, when none trains."""
        return bool(ray.get(self._actor.ask.remote(wish)))

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
        """Lease `n`, as soon as it is posted; `None` when there will be none."""
        return ray.get(self._actor.take.remote(n))

    def resume(self) -> int:
        """Where a gang that (re)starts goes on."""
        return int(ray.get(self._actor.resume.remote()))

    def report(self, n: int, rank: int, kind: str, payload: Any) -> None:
        """Send an event. Steps are sent without waiting for their arrival; any other kind has arrived afterwards."""
        # Ray may run an async actor's calls in another order than they were sent, so there is one under way at most
        if self._sent is not None:
            ray.get(self._sent)
        self._sent = self._actor.report.remote(n, rank, kind, payload)
        if kind != "steps":
            ray.get(self._sent)

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


def create(name: str) -> MailboxClient:
    """A new mailbox on the node of this process: it must not die with another; `name` is unique to the campaign."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": name, "num_cpus": 0, "max_concurrency": 4096, "scheduling_strategy": here}
    return MailboxClient(ray.remote(Mailbox).options(**options).remote())


def connect(name: str) -> MailboxClient:
    """The mailbox of that name, from another process of the same session."""
    return MailboxClient(ray.get_actor(name))


def failure(error: RayboothError) -> dict[str, Any]:
    """The payload of a `failed` event; `failure_of` makes the error of it again."""
    return {**error.as_json(), "exit_code": error.exit_code}


def put(value: Any) -> Any:
    """A reference to `value` in Ray's object store."""
    return ray.put(value)


def fetch(references: Sequence[Any]) -> list[Any]:
    """The objects behind references into Ray's object store, in order."""
    return list(ray.get(list(references)))
