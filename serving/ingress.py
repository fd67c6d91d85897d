"""This file is where the HTTP application is put together: everything of an ingress but what draws.

It imports neither torch nor Ray. Whoever draws, trains and deletes is handed in.
"""

import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import RayboothError
from cluster.objects import StorageError
from cluster.storage import Storage
from serving.answers import ApiError, answer_of, invalid
from serving.bodies import unpacked
from serving.booth import Booth
from serving.door import Door
from serving.envelope import LOG, Envelope
from serving.health_routes import health_routes
from serving.openai_routes import openai_routes
from serving.outbound import Outbound, Resolve
from serving.prediction_routes import prediction_routes
from serving.prediction_work import PredictionWork
from serving.protocol import Artist
from serving.removal_routes import removal_routes
from serving.settings import ServingSettings
from serving.trainer import Eraser, Trainer
from serving.training_routes import training_routes
from serving.training_work import TrainingWork
from serving.webhooks import WebhookSecrets

ABOUT = (
    "Guided images of any trained subject, drawn step by step together. OpenAI's images contract, predictions and \
trainings."
)
UPLOADS = ("/v1/trainings",)


class _App(FastAPI):
    """The application, which looks first whether it has the body already."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, unpacked(scope, receive), send)


def create_app(
    settings: ServingSettings,
    storage: Storage,
    artist: Artist,
    trainer: Trainer | None = None,
    eraser: Eraser | None = None,
    clock: Callable[[], float] = time.time,
    resolve: Resolve = socket.getaddrinfo,
) -> FastAPI:
    """The ingress, as an ASGI application.

    Args:
        settings: What it allows.
        storage: The root that holds the registry, the keys, and what the ingress keeps.
        artist: Draws.
        trainer: Trains; without one, nothing can be trained here.
        eraser: Deletes subjects; without one, none can be deleted here.
        clock: Seconds since the epoch.
        resolve: Resolves the names of webhooks.
    """
    booth = Booth.of(settings, storage, artist, clock)
    hooks, outbound = WebhookSecrets(storage, clock), Outbound(settings.outward, resolve)
    work = PredictionWork(booth, hooks, outbound)

    training = TrainingWork(booth, trainer) if trainer else None

    @asynccontextmanager
    async def living(_: FastAPI) -> AsyncIterator[None]:
        await work.start()
        if training:
            await training.start()
        try:
            yield
        finally:
            if training:
                await training.close()
            await work.close()
            outbound.close()

    app = _App(
        title="raybooth",
        version=version("raybooth"),
        description=ABOUT,
        lifespan=living,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(openai_routes(booth))
    app.include_router(prediction_routes(booth, work, hooks, outbound))
    if training:
        app.include_router(training_routes(booth, training, outbound))
    if eraser:
        app.include_router(removal_routes(booth, eraser))
    app.include_router(health_routes(booth))
    app.add_middleware(Door, settings=settings, keys=booth.keys, clock=clock)
    limits = settings.limits
    app.add_middleware(
        Envelope,
        metrics=booth.metrics,
        body_bytes=lambda path: limits.upload_bytes if path in UPLOADS else limits.body_bytes,
        clock=clock,
    )
    for kind in (ApiError, RayboothError, StorageError):
        app.add_exception_handler(kind, _answered)
    app.add_exception_handler(RequestValidationError, _answered)
    app.add_exception_handler(HTTPException, _answered)
    app.state.booth = booth
    return app


async def _answered(request: Request, error: Exception) -> Response:
    """The answer to an error that a route raised."""
    if isinstance(error, RequestValidationError):
        return invalid(error.errors()).response()
    if isinstance(error, HTTPException):
        return _of_http(request, error).response()
    answer = answer_of(error)
    if answer.status >= 500:
        LOG.error("request %s failed: %s", request.state.request_id, error)
    return answer.response()


def _of_http(request: Request, error: HTTPException) -> ApiError:
    """What the framework refuses by itself, in the same shape."""
    path = request.url.path[:64]
    match error.status_code:
        case 400:
            return ApiError(422, f"the body cannot be read: {error.detail}. Send JSON in UTF-8", "bad_body")
        case 404:
            return ApiError(
                404, f"there is nothing at {path}. GET /openapi.json lists what is", "no_such_path"
            )
        case 405:
            allowed = (error.headers or {}).get("Allow") or "GET"
            said = f"{path} cannot be asked with {request.method}. Use {allowed}"
            return ApiError(405, said, allow=allowed)
    return ApiError(error.status_code, str(error.detail))
