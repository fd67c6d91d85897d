"""This file is where predictions are asked for over HTTP: images that nobody waits for."""

import asyncio
import re
import secrets
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, Field

from cluster.errors import UserError
from serving.answers import ApiError, documented
from serving.booth import Booth
from serving.door import AdminCaller, ImagesCaller
from serving.ordering import SEEDS, Asked, ImageInput, check
from serving.outbound import Outbound
from serving.prediction_answers import PredictionAnswer, PredictionsAnswer, shown
from serving.prediction_work import PredictionWork
from serving.predictions import Prediction, new_id
from serving.webhooks import WebhookSecrets

Event = Literal["start", "completed"]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key with the same body is the same object, with another body 409.",
    ),
]
Cursor = Annotated[str, Query(max_length=64, description="`next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=200, description="The most to list.")]
_WAIT = re.compile(r"\s*wait(?:=(\d{1,4}))?\s*")


class PredictionRequest(Asked):
    """The body of `POST /v1/predictions`."""

    model: str = Field(max_length=128)
    """`rex`, its champion at this moment; `rex@v2`, one version; or `base`, the base itself."""
    input: ImageInput
    """The images that are wanted."""
    webhook: str | None = Field(default=None, max_length=2000)
    """An https URL that is told of it, signed: see `GET /v1/webhooks/secret`."""
    webhook_events_filter: list[Event] = Field(default=["completed"], max_length=2)
    """What it is told of."""
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=500)]] = Field(
        default_factory=dict, max_length=16
    )
    """Anything of yours; it is given back."""


class Removed(BaseModel):
    """What was removed."""

    deleted: int
    """Predictions, with their images."""
    left: list[str]
    """Ids of those that another process draws: cancel them, and ask again."""


class Secret(BaseModel):
    """What webhooks are signed with."""

    key: str
    """`whsec_` and base64, as the standard-webhooks libraries take it."""


def prediction_routes(
    booth: Booth, work: PredictionWork, hooks: WebhookSecrets, outbound: Outbound
) -> APIRouter:
    """The routes about predictions.

    Args:
        booth: What they work with.
        work: Draws.
        hooks: Secrets that webhooks are signed with.
        outbound: Reaches webhooks.
    """
    router = APIRouter(prefix="/v1", tags=["predictions"])

    def answer(prediction: Prediction) -> PredictionAnswer:
        return shown(prediction, booth.outputs, work.steps(prediction.id))

    @router.post(
        "/predictions",
        status_code=202,
        responses={
            200: {"model": PredictionAnswer, "description": "It has ended already"},
            **documented(404, 409),
        },
        summary="Draw images without waiting for them",
    )
    async def predict(
        asked: PredictionRequest,
        request: Request,
        response: Response,
        caller: ImagesCaller,
        prefer: Annotated[
            str | None,
            Header(max_length=255, description="`wait=5` waits up to five seconds for the end."),
        ] = None,
        key: Key = None,
    ) -> PredictionAnswer:
        model = await asyncio.to_thread(booth.catalog.find, caller.tenant, asked.model)
        check(asked.input, model, booth.settings, "input.")
        if asked.webhook:
            await _check_webhook(outbound, asked.webhook)
        work.check_room(caller.tenant)
        now, address = booth.clock(), booth.address(request)
        settled = {
            **asked.input.model_dump(mode="json"),
            "seed": secrets.randbelow(SEEDS - asked.input.n)
            if asked.input.seed is None
            else asked.input.seed,
            "guidance_scale": asked.input.guidance_scale or model.guidance,
            "sampler": asked.input.sampler or booth.catalog.sampler,
        }

        def make() -> str:
            identity = new_id(now)
            keep_s = booth.settings.predictions.deadline_s + booth.settings.retention.outputs_s
            work.store.create(
                Prediction(
                    id=identity,
                    tenant=caller.tenant,
                    model=asked.model,
                    subject=model.stored,
                    version=model.version,
                    input=settled,
                    address=address,
                    created=now,
                    expires=now + keep_s,
                    webhook=asked.webhook,
                    webhook_events=tuple(dict.fromkeys(asked.webhook_events_filter)),
                    metadata=asked.metadata,
                )
            )
            return identity

        body = asked.model_dump(mode="json")
        identity, is_new = await asyncio.to_thread(
            booth.idempotency.once, caller.tenant, "predictions", key, body, make
        )
        prediction = await work.find(caller.tenant, identity)
        if is_new:
            work.begin(prediction)
        seconds = _wait(prefer, booth.settings.predictions.wait_s)
        if seconds is not None:
            response.headers["preference-applied"] = f"wait={seconds:g}"
            await work.wait(identity, seconds)
            prediction = await work.find(caller.tenant, identity)
        response.status_code = 200 if prediction.ended else 202
        return answer(prediction)

    @router.get("/predictions", responses=documented(), summary="List predictions, the newest first")
    async def predictions(caller: ImagesCaller, cursor: Cursor = "", limit: Limit = 50) -> PredictionsAnswer:
        found, more = await asyncio.to_thread(work.store.page, caller.tenant, cursor, limit)
        return PredictionsAnswer(data=[answer(each) for each in found], next=more)

    @router.get("/predictions/{id}", responses=documented(404), summary="Look at a prediction")
    async def one_prediction(id: str, caller: ImagesCaller) -> PredictionAnswer:
        return answer(await work.find(caller.tenant, id))

    @router.post("/predictions/{id}/cancel", responses=documented(404), summary="Give a prediction up")
    async def cancel(id: str, caller: ImagesCaller) -> PredictionAnswer:
        await work.cancel(await work.find(caller.tenant, id))
        return answer(await work.find(caller.tenant, id))

    @router.delete(
        "/predictions/{id}", responses=documented(404, 409), summary="Remove a prediction and its images"
    )
    async def remove(id: str, caller: ImagesCaller) -> Removed:
        await work.remove(await work.find(caller.tenant, id))
        return Removed(deleted=1, left=[])

    @router.delete(
        "/predictions",
        responses=documented(),
        summary="Remove all predictions of the tenant, with their images",
    )
    async def remove_all(caller: AdminCaller) -> Removed:
        deleted, left = 0, list[str]()
        cursor: str | None = ""
        while cursor is not None:
            found, cursor = await asyncio.to_thread(work.store.page, caller.tenant, cursor, 200)
            for prediction in found:
                try:
                    await work.remove(prediction)
                    deleted += 1
                except ApiError:
                    left.append(prediction.id)
        await asyncio.to_thread(booth.storage.remove, f"outputs/{caller.tenant}")
        return Removed(deleted=deleted, left=left)

    @router.get("/webhooks/secret", responses=documented(), summary="What webhooks are signed with")
    async def secret(caller: AdminCaller) -> Secret:
        return Secret(key=(await asyncio.to_thread(hooks.of, caller.tenant))[0])

    @router.post(
        "/webhooks/secret/rotate",
        responses=documented(),
        summary="Sign with a new secret; the one before signs too for a day",
    )
    async def rotate(caller: AdminCaller) -> Secret:
        return Secret(key=await asyncio.to_thread(hooks.rotate, caller.tenant))

    return router


async def _check_webhook(outbound: Outbound, url: str) -> None:
    try:
        await outbound.check(url)
    except UserError as error:
        raise ApiError(422, f"webhook: {error}", param="webhook") from error


def _wait(prefer: str | None, most: float) -> float | None:
    """Seconds that a client wants to wait; `None` when it does not. Other preferences are not ours."""
    for part in (prefer or "").split(","):
        match = _WAIT.fullmatch(part)
        if match:
            return min(float(match[1]) if match[1] else most, most)
    return None
