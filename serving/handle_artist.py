"""This file is where the replicas behind a handle of Serve are an `Artist` that loses no image with a replica.

An image is a function of its order, so one whose replica is lost is drawn again elsewhere, and nobody notices.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

from grpc import RpcError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.context import _set_request_context
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from cluster.errors import SystemFailure
from serving.protocol import (
    DeadlinePassed,
    Draining,
    Drawn,
    Event,
    ImageOrder,
    QueueFull,
    ReplicasLost,
    Stepped,
)

NAME, REPLICA = "raybooth", "replica"  # of Serve's application, and of the deployment that draws
TRIES = 8  # of an image whose replica is lost, within its deadline
PAUSE_S = 0.25  # until the next one, doubled each time
ANSWER_S = 3.0  # for replicas to say how they are
RETRY_S = 5.0
WAITING_REQUESTS = 1000  # at the proxy, beside those that an ingress works on
# What a replica itself raises comes as it is: an error of gRPC is one of the way to it.
_LOST = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError, RpcError)


class HandleArtist:
    """The replicas behind a handle of Serve.

    Args:
        handle: Of their deployment.
        may_sleep: Whether there may be none of them: nothing is wrong then. They are asked how they are only while
            they draw, because a question would wake them, or keep them awake.
        tries: Of an image whose replica is lost.
    """

    def __init__(self, handle: Any, may_sleep: bool = False, tries: int = TRIES) -> None:
        self._may_sleep, self._tries = may_sleep, tries
        # by gRPC, in which a call costs half of one of an actor's; orders are plain data
        self._handle = handle.options(_by_reference=False, request_serialization="pickle")
        self._stream = self._handle.options(stream=True)
        self._open = 0  # images that are drawn for this ingress
        self._last: dict[str, float] = {}

    async def draw(self, order: ImageOrder) -> AsyncIterator[Event]:
        """As `Artist.draw`; an image whose replica is lost begins anew at another one, and only its steps further
        than before are told."""
        self._open += 1
        try:
            async for event in self._again(order):
                yield event
        finally:
            self._open -= 1

    async def _again(self, order: ImageOrder) -> AsyncIterator[Event]:
        began, done = time.monotonic(), 0
        for attempt in range(self._tries):
            left = None if order.deadline_s is None else order.deadline_s - (time.monotonic() - began)
            if left is not None and left <= 0:
                raise DeadlinePassed(time.monotonic() - began, done, order.request.steps)
            try:
                async for event in self._once(replace(order, deadline_s=left)):
                    if isinstance(event, Stepped):
                        if event.step <= done:
                            continue
                        done = event.step
                    yield event
                return
            except (Draining, *_LOST):
                if attempt == self._tries - 1:
                    raise ReplicasLost(self._tries) from None
            await asyncio.sleep(min(PAUSE_S * 2**attempt, RETRY_S))

    async def stats(self) -> Mapping[str, float]:
        """As `Artist.stats`: of all replicas together, and how many there are; of those that are not to be disturbed,
        what they said last."""
        if self._may_sleep:
            running = await asyncio.to_thread(_running)
            if not running:
                return {**dict.fromkeys(self._last, 0.0), "replicas": 0}
            if not self._open:
                return {**self._last, "running": 0, "waiting": 0, "replicas": running}
        try:
            async with asyncio.timeout(ANSWER_S):
                told = await self._handle.broadcast("stats").results_async()
        except (TimeoutError, *_LOST, RayTaskError) as error:
            raise SystemFailure("the replicas do not answer", type(error).__name__, "ask again") from error
        total: dict[str, float] = {"replicas": len(told)}
        for stats in told:
            for name, value in stats.items():
                total[name] = total.get(name, 0) + value
        if told:
            total["step_seconds"] /= len(told)
        self._last = total
        return total

    async def _once(self, order: ImageOrder) -> AsyncIterator[Event]:
        # The images of one HTTP request would share its internal id, by which Serve's routers tell calls that wait
        # for a replica apart: all but one of them would be lost.
        _set_request_context(_internal_request_id=uuid4().hex)
        followed = order.progress or order.preview_every
        answer = self._stream.follow.remote(order) if followed else self._handle.draw.remote(order)
        try:
            if not followed:
                yield await answer
                return
            async for event in answer:
                yield event
                if isinstance(event, Drawn):
                    return
        except RayTaskError as error:
            raise error.cause from None
        except BackPressureError as error:
            raise QueueFull(WAITING_REQUESTS, RETRY_S) from error
        finally:
            with suppress(Exception):
                answer.cancel()


def _running() -> int:
    """Replicas that draw, as Serve's controller has it."""
    application = serve.status().applications.get(NAME)
    replica = application.deployments.get(REPLICA) if application else None
    return replica.replica_states.get("RUNNING", 0) if replica else 0
