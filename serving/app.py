"""This file is where the service runs on Ray Serve: ingresses that speak HTTP, and replicas that draw.

    client -> Serve's proxy -> Ingress (no torch, no GPU) -> AffinityRouter -> Replica (one engine)

What of it draws again after a loss is `HandleArtist`, in the ingress.
"""

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.errors import SystemFailure
from cluster.session import hush
from cluster.storage import Storage
from serving.handle_artist import NAME, REPLICA, RETRY_S, WAITING_REQUESTS, HandleArtist
from serving.protocol import Drawn, Event, ImageOrder, Stepped
from serving.replicas import Replicas
from serving.safety import SafetySettings
from serving.settings import ServingSettings
from training.request import FORWARD_ROWS

TELL_S = 0.25  # between two words about the steps of an image
SWITCH_S = 0.0005  # the thread that draws lets others speak: Python's 5 ms make 50 of a call to a replica
LOOK_S = 2.0  # how often replicas tell whom they know
# without a line of Serve's for each call of each process: `raybooth.access` has one for each request
ACCESS = logging.getLogger("raybooth.access")
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)

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
        if not self._guard.checks:  # a thread is dearer than nothing
            return
        asked = order.request
        await asyncio.to_thread(self._guard.prompt, asked.prompt, asked.negative_prompt)

    async def pid(self) -> int:
        """Its process, for people who look for it."""
        return os.getpid()

    def threads(self) -> Mapping[str, int]:
        """Its threads by name, as the system numbers them, for people who look for what they cost."""
        return {thread.name: thread.native_id or 0 for thread in threading.enumerate()}

    async def record_routing_stats(self) -> dict[str, Any]:
        """Whom this replica has in memory, for the router."""
        return {"resident": [f"{name}@{version}" for name, version in self._engine.resident()]}

    async def check_health(self) -> None:
        """Raises when the replica must be replaced."""
        if not self._engine.healthy:
            raise RuntimeError("the engine's thread has ended")


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
        _write_access_log()

    def __serve_build_asgi_app__(self) -> Any:
        return self._make(*self._parts)


def _write_access_log() -> None:
    """Have a line for each request written to standard error, which Ray keeps, unless it is written elsewhere."""
    if not ACCESS.handlers:
        ACCESS.addHandler(logging.StreamHandler())
        ACCESS.setLevel(logging.INFO)
        ACCESS.propagate = False


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
        name=REPLICA,
        logging_config=LOGGING,
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
        logging_config=LOGGING,
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
    serve.start(http_options={"host": host, "port": port}, logging_config=LOGGING)
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise SystemFailure(
            "the service does not come up", str(error).splitlines()[0], "see Ray's logs of its deployments"
        ) from error


def stop() -> None:
    """End the service; requests that were accepted are answered first."""
    hush()  # Serve's controller ends by being killed while it is asked to end
    serve.shutdown()
