"""This file is where OpenAI's images contract is spoken: images at once, as a stream, and the list of models."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.answers import answer_of, documented
from serving.booth import Booth
from serving.catalog import Model
from serving.door import Caller, ImagesCaller
from serving.ordering import GenerationRequest, check, orders_of
from serving.painting import Painting, while_there
from serving.protocol import PRISTINE, Drawn, Event, ImageOrder, Stepped

OWNER = "raybooth"


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class ImageData(_Answer):
    """One image."""

    b64_json: str | None = None
    """A PNG in base64."""
    url: str | None = None
    """Where the PNG can be had for a while, without a key."""
    revised_prompt: str | None = None
    """The prompt in words, as the model read it."""
    seed: int
    """What draws the same image again."""


class ImagesAnswer(_Answer):
    """The answer with images."""

    created: int
    """Seconds since the epoch."""
    data: list[ImageData]
    """The images, in the order of their seeds."""
    model: str
    """What drew them, with its version."""
    size: str
    """Of each, in pixels."""
    output_format: Literal["png"] = "png"
    """Images are PNG."""


class ModelAnswer(_Answer):
    """A model."""

    id: str
    """What to give as `model`."""
    object: Literal["model"] = "model"
    """What this is."""
    created: int
    """Seconds since the epoch; 0 of the base."""
    owned_by: str
    """The tenant."""
    version: str | None
    """That is drawn with; `null` of the base."""
    versions: list[str]
    """All that can be asked for as `id@version`."""
    class_noun: str | None
    """Of the subject."""


class ModelsAnswer(_Answer):
    """Models."""

    object: Literal["list"] = "list"
    """What this is."""
    data: list[ModelAnswer]
    """The base, and the tenant's subjects by name."""
    has_more: bool
    """Whether there are more: ask with `after`."""


_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}


def openai_routes(booth: Booth) -> APIRouter:
    """The routes of OpenAI's contract.

    Args:
        booth: What they work with.
    """
    router = APIRouter(prefix="/v1", tags=["images"])

    @router.post(
        "/images/generations",
        response_model=ImagesAnswer,
        response_model_exclude_none=True,
        responses={200: {"content": _STREAM}, **documented(404, 504)},
        summary="Draw images and wait for them",
    )
    async def generate(asked: GenerationRequest, request: Request, caller: ImagesCaller) -> Any:
        find = booth.catalog.find
        if booth.catalog.holds(caller.tenant, asked.model):
            model = find(caller.tenant, asked.model)
        else:
            model = await asyncio.to_thread(find, caller.tenant, asked.model)
        check(asked, model, booth.settings)
        deadline = booth.settings.limits.deadline_s
        previews = asked.partial_images
        orders = orders_of(
            f"img-{uuid4().hex}", asked, model, deadline, previews, asked.stream, booth.settings.sizes[0]
        )
        request.state.log = {"user": asked.user} if asked.user else {}
        painting = booth.painting(orders, deadline)
        if asked.stream:
            return await _streamed(booth, request, painting, asked, orders)
        drawn = await while_there(request, _drawn(painting))
        return await _answer(booth, request, caller, asked, model, orders, drawn)

    @router.get("/models", responses=documented(), summary="List the models")
    async def models(
        caller: ImagesCaller,
        after: str = Query("", max_length=64, description="The last name of the page before."),
        limit: int = Query(1000, ge=1, le=1000, description="The most to list."),
    ) -> ModelsAnswer:
        found, more = await asyncio.to_thread(booth.catalog.all, caller.tenant, after, limit)
        return ModelsAnswer(data=[_shown(model, caller) for model in found], has_more=more)

    @router.get("/models/{model}", responses=documented(404), summary="Look at a model")
    async def one_model(model: str, caller: ImagesCaller) -> ModelAnswer:
        found = await asyncio.to_thread(booth.catalog.find, caller.tenant, model)
        return _shown(found, caller).model_copy(update={"id": model})

    return router


async def _drawn(painting: Painting) -> list[Drawn]:
    async with painting:
        return await painting.all()


async def _answer(
    booth: Booth,
    request: Request,
    caller: Caller,
    asked: GenerationRequest,
    model: Model,
    orders: list[ImageOrder],
    drawn: list[Drawn],
) -> ImagesAnswer:
    data = []
    for order, image in zip(orders, drawn, strict=True):
        url = text = None
        if asked.response_format == "url":
            url = await asyncio.to_thread(
                booth.outputs.keep, caller.tenant, model.stored, image.png, booth.address(request)
            )
        else:
            text = base64.b64encode(image.png).decode()
        words = image.facts.get("prompt")
        seed = order.request.seed
        data.append(ImageData(b64_json=text, url=url, revised_prompt=words and str(words), seed=seed))
    return ImagesAnswer(
        created=int(booth.clock()), data=data, model=_id(model), size=_size(booth, asked), output_format="png"
    )


def _id(model: Model) -> str:
    return model.name if model.name == PRISTINE else f"{model.name}@{model.version}"


def _size(booth: Booth, asked: GenerationRequest) -> str:
    return booth.settings.sizes[0] if asked.size == "auto" else asked.size


def _shown(model: Model, caller: Caller) -> ModelAnswer:
    return ModelAnswer(
        id=model.name,
        created=model.created,
        owned_by=OWNER if model.name == PRISTINE else caller.tenant,
        version=model.version or None,
        versions=list(model.versions),
        class_noun=model.class_noun or None,
    )


# -- streams -----------------------------------------------------------------------------------------------


class _Stream(StreamingResponse):
    """A stream of images, which are given up when it ends, however it ends."""

    def __init__(self, body: AsyncIterator[bytes], painting: Painting) -> None:
        super().__init__(body, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._painting = painting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with suppress(asyncio.CancelledError):
                await self._painting.close()


async def _streamed(
    booth: Booth, request: Request, painting: Painting, asked: GenerationRequest, orders: list[ImageOrder]
) -> Response:
    """A stream, once the first image is begun: what is refused before has a status of its own."""
    painting.begin()
    try:
        events = painting.events()
        first = await while_there(request, anext(events))
    except BaseException:
        await painting.close()
        raise

    async def body() -> AsyncIterator[bytes]:
        previews: dict[int, int] = {}
        try:
            yield _event(booth, asked, orders, first, previews)
            async for each in events:
                yield _event(booth, asked, orders, each, previews)
        except Exception as error:
            yield answer_of(error).event()

    return _Stream(body(), painting)


def _event(
    booth: Booth,
    asked: GenerationRequest,
    orders: list[ImageOrder],
    said: tuple[int, Event],
    previews: dict[int, int],
) -> bytes:
    """One event, in OpenAI's words where it has them."""
    number, event = said
    steps = orders[number].request.steps
    about: dict[str, Any] = {"index": number}
    image = {
        "created_at": int(time.time()),
        "size": _size(booth, asked),
        "quality": "auto",
        "background": "opaque",
        "output_format": "png",
    }
    match event:
        case Drawn():
            name = "image_generation.completed"
            words = event.facts.get("prompt")
            about |= {**image, "b64_json": base64.b64encode(event.png).decode()}
            about |= {"seed": orders[number].request.seed, "revised_prompt": words and str(words)}
        case Stepped(preview=preview) if preview:
            name = "image_generation.partial_image"
            about |= {**image, "b64_json": base64.b64encode(preview).decode()}
            about |= {
                "partial_image_index": previews.get(number, 0),
                "step": event.step,
                "steps": event.steps,
            }
            previews[number] = previews.get(number, 0) + 1
        case Stepped():
            name = "image_generation.progress"
            about |= {"step": event.step, "steps": event.steps}
        case _:
            name = "image_generation.progress"
            about |= {"step": 0, "steps": steps}
    return f"event: {name}\ndata: {json.dumps({'type': name, **about})}\n\n".encode()
