"""This file is where trainings are asked for and followed over HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response, StreamingResponse

from cluster.errors import RayboothError
from cluster.storage import sha256
from serving.answers import ApiError, ErrorDetail, documented
from serving.booth import Booth
from serving.door import Caller, TrainingsCaller
from serving.outbound import Outbound
from serving.prediction_answers import iso
from serving.prediction_routes import Cursor, Key, Limit
from serving.predictions import new_id
from serving.protocol import PRISTINE
from serving.tenancy import is_free, stored_name
from serving.trainer import ENDED, TrainingOrder, TrainingState
from serving.training_order import Training, TrainingRequest
from serving.training_work import TrainingWork
from serving.uploads import asked_with_photos, checked


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class TrainingLinks(_Answer):
    """What can be done with it."""

    get: str
    """To look at it."""
    cancel: str
    """To end it, with POST."""
    events: str
    """To follow it."""


class TrainingAnswer(_Answer):
    """A training."""

    id: str
    """Its name."""
    object: Literal["training"] = "training"
    """What this is."""
    subject: str
    """Who is trained; what to give as `model` afterwards."""
    class_noun: str
    """The class noun."""
    status: Literal["starting", "processing", "succeeded", "failed", "canceled"]
    """`starting` waits for its turn, or is made ready."""
    phase: str
    """Within the status: `queued`, `preparing`, `training`, `publishing`, ..."""
    step: int
    """Optimizer steps done."""
    steps: int
    """Of so many."""
    steps_per_second: float | None
    """While it trains."""
    version: str | None
    """What it became, once it has succeeded."""
    photos: list[str]
    """By the names that they were given with."""
    notes: list[str]
    """About the photos."""
    params: dict[str, Any]
    """As given."""
    metadata: dict[str, str]
    """As given."""
    metrics: dict[str, float]
    """Its last figures."""
    error: ErrorDetail | None
    """Why it failed."""
    created_at: str
    """ISO 8601, as the other times."""
    started_at: str | None
    """When it was first worked on."""
    completed_at: str | None
    """When it ended."""
    urls: TrainingLinks
    """What can be done with it."""


class TrainingsAnswer(_Answer):
    """A page of trainings."""

    object: Literal["list"] = "list"
    """What this is."""
    data: list[TrainingAnswer]
    """The newest first."""
    next: str | None
    """The cursor of the next page; `null` when there is none."""


def _body() -> dict[str, Any]:
    """The body for OpenAPI: JSON with URLs, or a form with files."""
    schema = TrainingRequest.model_json_schema(by_alias=True, ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    schema["properties"]["params"] = definitions["TrainingParams"]
    text = {"type": "string"}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {
        "type": "object",
        "required": ["subject", "class", "images"],
        "properties": {"subject": text, "class": text, "images": files, "params": text, "metadata": text},
    }
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def training_routes(booth: Booth, work: TrainingWork, outbound: Outbound) -> APIRouter:
    """The routes about trainings.

    Args:
        booth: What they work with.
        work: Keeps them going.
        outbound: Fetches photos.
    """
    router = APIRouter(prefix="/v1", tags=["trainings"])
    trainer, store, limits = work.trainer, work.store, booth.settings.limits

    async def found(caller: Caller, identity: str) -> Training:
        training = await asyncio.to_thread(store.find, caller.tenant, identity)
        if training is None:
            raise ApiError(404, f"there is no training {identity[:64]!r}", "no_training")
        return training

    async def answer(training: Training) -> TrainingAnswer:
        return _shown(training, await asyncio.to_thread(trainer.state, training.id))

    @router.post(
        "/trainings",
        status_code=202,
        responses=documented(409),
        summary="Train a subject from photos",
        openapi_extra=_body(),
    )
    async def train(request: Request, caller: TrainingsCaller, key: Key = None) -> TrainingAnswer:
        asked, photos = await asked_with_photos(request, limits, outbound)
        if asked.subject == PRISTINE or not is_free(caller.tenant, asked.subject):
            raise ApiError(
                422, f"a subject cannot be called {asked.subject}. Give another name", param="subject"
            )
        if (asked.params.steps or 0) > limits.training_steps:
            said = f"params.steps is too large: {asked.params.steps}, at most {limits.training_steps}"
            raise ApiError(422, said, param="params.steps")
        body = {
            **asked.model_dump(mode="json", by_alias=True),
            "photos": [sha256(data) for _, data in photos],
        }
        named, notes = await checked(photos, int(booth.settings.sizes[0].partition("x")[0]))
        now = booth.clock()
        training = Training(
            id=new_id(now),
            tenant=caller.tenant,
            subject=asked.subject,
            stored=stored_name(caller.tenant, asked.subject),
            class_noun=asked.class_noun,
            photos=tuple(name for name, _ in photos),
            notes=tuple(notes),
            params=asked.params.model_dump(mode="json", exclude_unset=True),
            metadata=asked.metadata,
            address=booth.address(request),
            created=now,
        )
        await asyncio.to_thread(trainer.check, _order(training, ("photo.png",)))

        def make() -> str:
            _check_room(booth, work, caller)
            order = _order(training, store.keep_photos(training.id, named))
            store.create(training)
            trainer.enroll(order)
            return training.id

        identity, is_new = await asyncio.to_thread(
            booth.idempotency.once, caller.tenant, "trainings", key, body, make
        )
        if is_new:
            work.wake()
        return await answer(await found(caller, identity))

    @router.get("/trainings", responses=documented(), summary="List trainings, the newest first")
    async def trainings(caller: TrainingsCaller, cursor: Cursor = "", limit: Limit = 50) -> TrainingsAnswer:
        page, more = await asyncio.to_thread(store.page, caller.tenant, cursor, limit)
        return TrainingsAnswer(data=[await answer(each) for each in page], next=more)

    @router.get("/trainings/{id}", responses=documented(404), summary="Look at a training")
    async def one_training(id: str, caller: TrainingsCaller) -> TrainingAnswer:
        return await answer(await found(caller, id))

    @router.post("/trainings/{id}/cancel", responses=documented(404), summary="End a training")
    async def cancel(id: str, caller: TrainingsCaller) -> TrainingAnswer:
        training = await found(caller, id)
        await asyncio.to_thread(trainer.cancel, id)
        work.wake()
        return await answer(training)

    @router.get(
        "/trainings/{id}/events",
        response_class=Response,
        responses={
            200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
            **documented(404),
        },
        summary="Follow a training until it ends",
    )
    async def events(id: str, request: Request, caller: TrainingsCaller) -> Response:
        training = await found(caller, id)
        last = request.headers.get("last-event-id", "")
        seen = int(last) + 1 if last.isascii() and last.isdigit() and len(last) < 9 else 0
        headers = {"cache-control": "no-store"}
        return StreamingResponse(follow(training, seen), media_type="text/event-stream", headers=headers)

    async def follow(training: Training, seen: int) -> AsyncIterator[bytes]:
        """States as they come, with ids, and progress between them; the last event is the training as it ended."""
        before: tuple[Any, ...] = ()
        while True:
            try:
                state = await asyncio.to_thread(trainer.state, training.id)
                happened = await asyncio.to_thread(trainer.history, training.id)
            except RayboothError as error:
                yield ApiError(503, error.what).event()
                return
            for number, each in enumerate(happened[seen:], seen):
                about = {
                    "at": iso(each.at),
                    "state": each.state,
                    "phase": each.phase,
                    "attempt": each.attempt,
                }
                yield _event("state", {**about, "reason": each.reason}, number)
            seen = max(seen, len(happened))
            shown = _shown(training, state)
            if shown.status in ENDED:
                yield _event("completed", shown.model_dump(mode="json"))
                return
            now = (shown.status, shown.phase, shown.step)
            if now != before:
                fields = {"status", "phase", "step", "steps", "steps_per_second"}
                yield _event("progress", shown.model_dump(mode="json", include=fields))
            else:
                yield b": still here\n\n"
            before = now
            await asyncio.sleep(booth.settings.trainings.follow_s)

    return router


def _check_room(booth: Booth, work: TrainingWork, caller: Caller) -> None:
    most = booth.settings.trainings.per_tenant
    waiting = sum(tenant == caller.tenant for tenant in work.store.unended().values())
    if waiting >= most:
        said = (
            f"{waiting} trainings have not ended, and a tenant may have {most}. Wait for one, or cancel one"
        )
        raise ApiError(429, said, "too_many_trainings", retry_after_s=60)


def _order(training: Training, photos: tuple[str, ...]) -> TrainingOrder:
    return TrainingOrder(
        training.id, training.tenant, training.stored, training.class_noun, photos, training.params
    )


def _shown(training: Training, state: TrainingState | None) -> TrainingAnswer:
    at = f"{training.address}/v1/trainings/{training.id}"
    now = state or TrainingState("failed", "forgotten", 0, 0, held=False)
    error = None
    if now.status == "failed":
        reason = now.reason or {"what": "nothing is on record of it any more"}
        said = ". ".join(str(reason[part]).rstrip(".") for part in ("what", "seen", "do") if reason.get(part))
        error = ErrorDetail(
            message=said, type="training_error", param=None, code=str(reason.get("kind", "failed"))
        )
    return TrainingAnswer(
        id=training.id,
        subject=training.subject,
        class_noun=training.class_noun,
        status=now.status,
        phase=now.phase,
        step=now.step,
        steps=now.steps,
        steps_per_second=now.rate,
        version=now.version,
        photos=list(training.photos),
        notes=list(training.notes),
        params=training.params,
        metadata=training.metadata,
        metrics=dict(now.metrics),
        error=error,
        created_at=iso(training.created),
        started_at=iso(now.started) if now.started else None,
        completed_at=iso(now.finished) if now.finished else None,
        urls=TrainingLinks(get=at, cancel=f"{at}/cancel", events=f"{at}/events"),
    )


def _event(name: str, about: dict[str, Any], number: int | None = None) -> bytes:
    identity = f"id: {number}\n" if number is not None else ""
    return f"{identity}event: {name}\ndata: {json.dumps(about)}\n\n".encode()
