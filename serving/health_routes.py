"""This file is where an ingress is asked how it is: alive, ready, its figures, and images behind signed URLs."""

import asyncio
import logging
from typing import Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.responses import Response

from cluster.errors import RayboothError
from serving.answers import ApiError, documented
from serving.booth import Booth
from serving.metrics import CONTENT_TYPE

LOG = logging.getLogger("raybooth.serving")
PATIENCE_S = 5.0  # for the replicas to say how they are


class Health(BaseModel):
    """How an ingress is."""

    status: Literal["ok"] = "ok"


def health_routes(booth: Booth) -> APIRouter:
    """The routes that need no key.

    Args:
        booth: What they look at.
    """
    router = APIRouter(tags=["operations"])

    @router.get("/healthz", responses=_open(405, 500), summary="Whether this process lives")
    async def healthz() -> Health:
        return Health()

    @router.get("/readyz", responses=_open(405, 500, 503), summary="Whether images can be drawn")
    async def readyz() -> Health:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await booth.artist.stats()
                await asyncio.to_thread(booth.storage.exists, "registry")
        except (RayboothError, OSError, TimeoutError) as error:
            LOG.warning("not ready: %s", error)
            raise ApiError(
                503, "no replica draws at the moment. Ask again", retry_after_s=PATIENCE_S
            ) from error
        return Health()

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_open(405, 500)},
        summary="Figures for Prometheus",
    )
    async def metrics() -> Response:
        stats = {}
        try:
            async with asyncio.timeout(PATIENCE_S):
                stats = dict(await booth.artist.stats())
        except (RayboothError, OSError, TimeoutError) as error:
            LOG.warning("the replicas say nothing of themselves: %s", error)
        return Response(booth.metrics.exposed(stats), media_type=CONTENT_TYPE)

    @router.get(
        "/v1/outputs/{path:path}",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
            **_open(403, 404, 405, 413, 422, 500, 503),
        },
        tags=["images"],
        summary="An image behind a signed URL",
    )
    async def output(
        path: str,
        expires: int = Query(ge=0, lt=2**53, description="As in the URL that was given out."),
        signature: str = Query(max_length=64, description="As in the URL that was given out."),
    ) -> Response:
        png = await asyncio.to_thread(booth.outputs.read, path, expires, signature)
        headers = {"cache-control": "private, max-age=3600", "x-content-type-options": "nosniff"}
        return Response(png, media_type="image/png", headers=headers)

    return router


def _open(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The errors of a route that asks for no key."""
    return {status: about for status, about in documented(*statuses).items() if status in statuses}
