"""This file is where the service runs on Ray Serve: ingresses that speak HTTP, and replicas that draw.

    client -> Serve's proxy -> Ingress (no torch, no GPU) -> AffinityRouter -> Replica (one engine)

An image is a function of its order, so one whose replica is lost is drawn again elsewhere, and nobody notices.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.context import _set_request_context
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from cluster.errors import SystemFailure
from cluster.storage import Storage
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
from serving.replicas import Replicas
from serving.safety import SafetySettings
from serving.settings import ServingSettings
from training.request import FORWARD_ROWS

NAME = "raybooth"
TRIES = 8  # of an image whose replica is lost, within its deadline
PAUSE_S = 0.25  # until the next one, doubled each time
ANSWER_S = 3.0  # for replicas to say how they are
TELL_S = 0.25  # between two words about the steps of an image
SWITCH_S = 0.0005  # the thread that draws lets others speak: Python's 5 ms make 50 of a call to a replica
LOOK_S = 2.0  # how often replicas tell whom they know
RETRY_S = 5.0
WAITING_REQUESTS = 1000  # at the proxy, beside those that an ingress works on
_LOST = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)

Signer = tuple[Path | None, Path | None]
"""Certificate chain and key in PEM, with which images are signed; twice `None` makes some for development."""


class Replica:
    """One engine. Its methods are called by Serve."""

    def __init__(
        self,
        base: str,
        revision: str | None,
        storage_uri: str,
        settings: Replicas,
        safety: SafetySettings,
        signer: Signer | None,
    ) -> None:
        # what an ingress need not load
        from serving.artists import EngineArtist
        from serving.credentials import open_credentials
        from serving.engine import Engine, EngineSettings
        from serving.provenance import Provenance
        from serving.safety import SafetyGuard, guarded
        from training.pipeline import open_base

        sys.setswitchinterval(SWITCH_S)
        held = EngineSettings(settings.waiting, int(settings.cache_gib * 1024**3), settings.exact)
        storage, self._guard = Storage(storage_uri), SafetyGuard.of(safety)
        credentials = open_credentials(storage, *signer) if signer else None
        self._engine = Engine(
            open_base(base, revision),
            storage,
            settings.device,
            settings.width,
            held,
            guarded(self._guard, Provenance(credentials=credentials).png),
        )
        self._artist = EngineArtist(self._engine)

    async def follow(self, order: ImageOrder) -> AsyncIterator[Event]:
        """As `Artist.draw`, but tells of steps only now and then."""
        await self._check(order)
        told = 0.0
        async for event in self._artist.draw(order):
            if isinstance(event, Stepped) and not event.preview:
                if time.monotonic() - told < TELL_S and event.step < event.steps:
                    continue
                told = time.monotonic()
            yield event

    async def draw(self, order: ImageOrder) -> Drawn:
        """An image of which nobody wants to hear before it is there: one answer costs a tenth of a stream."""
        await self._check(order)
        async for event in self._artist.draw(order):
            if isinstance(event, Drawn):
                return event
        raise SystemFailure("the engine ended without the image", f"order {order.id}", "ask again")

    async def stats(self) -> Mapping[str, float]:
        """As `Artist.stats`, and what the safety checks said."""
        refused = sum(
            number for (_, outcome, _), number in self._guard.counts().items() if outcome != "allowed"
        )
        return {**await self._artist.stats(), "unsafe": refused}

    async def _check(self, order: ImageOrder) -> None:
        asked = order.request
        await asyncio.to_thread(self._guard.prompt, asked.prompt, asked.negative_prompt)

    async def pid(self) -> int:
        """Its process, for people who look for it."""
        return os.getpid()

    def record_routing_stats(self) -> dict[str, Any]:
        """Whom this replica has in memory, for the router."""
        return {"resident": [f"{name}@{version}" for name, version in self._engine.resident()]}

    def check_health(self) -> None:
        """Raises when the replica must be replaced."""
        if not self._engine.healthy:
            raise RuntimeError("the engine's thread has ended")


class HandleArtist:
    """The replicas behind a handle of Serve.

    Args:
        handle: Of their deployment.
        may_sleep: Whether there may be none of them: nothing is wrong then. They are asked how they are only while
            they draw, because a question would wake them, or keep them awake.
        tries: Of an image whose replica is lost.
    """

    def __init__(self, handle: Any, may_sleep: bool = False, tries: int = TRIES) -> None:
        self._handle, self._may_sleep, self._tries = handle, may_sleep, tries
        self._stream = handle.options(stream=True)
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
    replica = application.deployments.get("replica") if application else None
    return replica.replica_states.get("RUNNING", 0) if replica else 0


MakeApp = Callable[[ServingSettings, Storage, HandleArtist], Any]
"""Makes the HTTP application, in ASGI."""


@serve.ingress()
class Ingress:
    """The HTTP application, over a handle to the replicas."""

    def __init__(
        self, settings: ServingSettings, storage_uri: str, make: MakeApp, replicas: Any, may_sleep: bool
    ) -> None:
        self._parts = (settings, Storage(storage_uri), HandleArtist(replicas, may_sleep))
        self._make = make

    def __serve_build_asgi_app__(self) -> Any:
        return self._make(*self._parts)


def service(
    settings: ServingSettings,
    replicas: Replicas,
    storage: Storage,
    make: MakeApp,
    revision: str | None = None,
    ingresses: int = 1,
    safety: SafetySettings = SafetySettings(),
    signer: Signer | None = None,
) -> Any:
    """The Serve application.

    Args:
        settings: Of the ingress.
        replicas: How many draw, with what.
        storage: Root, which every node reaches.
        make: Makes the HTTP application; it is called in the ingress.
        revision: Of the base.
        ingresses: Processes that speak HTTP.
        safety: Checks of prompts and images.
        signer: Signs C2PA manifests into images; `None` signs none.
    """
    images = (replicas.width or FORWARD_ROWS[replicas.device]) // 2  # that are drawn at a time
    drawing = serve.deployment(Replica).options(
        name="replica",
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        # more than the batch and what may wait beside it: the engine itself says when it is full, and for how long
        max_ongoing_requests=2 * images + replicas.waiting + 8,
        max_queued_requests=WAITING_REQUESTS,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min,
            initial_replicas=replicas.min,
            max_replicas=replicas.max,
            target_ongoing_requests=1.5 * images,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
            metrics_interval_s=1.0,
            look_back_period_s=max(2.0, min(replicas.upscale_delay_s, 30.0)),
        ),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=replicas.drain_s,
        health_check_period_s=2.0,
        request_router_config=RequestRouterConfig(
            request_router_class="serving.router:AffinityRouter",
            request_router_kwargs={"busy": images},
            request_routing_stats_period_s=LOOK_S,
        ),
    )
    talking = serve.deployment(Ingress).options(
        name="ingress",
        num_replicas=ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=WAITING_REQUESTS,
        max_queued_requests=WAITING_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_S),
        graceful_shutdown_timeout_s=replicas.drain_s,
    )
    engines = drawing.bind(settings.base, revision, storage.uri, replicas, safety, signer)
    return talking.bind(settings, storage.uri, make, engines, replicas.min == 0)


def start(application: Any, host: str, port: int) -> None:
    """Have an application served by the Ray that this process is connected to; returns when it answers.

    Raises:
        SystemFailure: It does not come up.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise SystemFailure(
            "the service does not come up", str(error).splitlines()[0], "see Ray's logs of its deployments"
        ) from error


def stop() -> None:
    """End the service; requests that were accepted are answered first."""
    serve.shutdown()
