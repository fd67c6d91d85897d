"""This file is where what a client asks for is checked against the limits and becomes orders, one an image."""

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.errors import UserError
from serving.answers import ApiError
from serving.catalog import Model
from serving.protocol import ImageOrder
from serving.settings import ServingSettings
from training.recipe import SamplerName
from training.request import DrawRequest

STEPS = 25
SEEDS = 2**31


class Asked(BaseModel):
    """A body: unknown fields are refused, and `null` is as if the field were not there, as clients send it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: each for key, each in value.items() if each is not None}
        return value


class ImageInput(Asked):
    """The images that are wanted."""

    prompt: str = Field(min_length=1, max_length=32_000)
    """What to draw. `{subject}` is the subject and `{class}` its class noun; a prompt without them is drawn as it is
    written, so that it shows the subject only as far as its training has changed the rest."""
    n: int = Field(default=1, ge=1, le=10)
    """How many; image i has the seed `seed + i`."""
    size: str = Field(default="auto", max_length=16)
    """`auto`, or a size that the base draws, such as `64x64`."""
    steps: int = Field(default=STEPS, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float | None = Field(default=None, ge=1.0, le=50.0)
    """Classifier-free guidance; 1 is without, and half the work. By default what the subject was validated with."""
    negative_prompt: str = Field(default="", max_length=32_000)
    """What should not be there."""
    seed: int | None = Field(default=None, ge=0, lt=SEEDS)
    """Of the first image; by default one is picked, and told."""
    sampler: SamplerName | None = None
    """The sampler; by default the base's own: `ddim`, or of a base of flow matching `euler`."""


def check(asked: ImageInput, model: Model, settings: ServingSettings, within: str = "") -> None:
    """Refuse what the limits do not allow, and what no replica could draw.

    Args:
        asked: The images.
        model: What draws them.
        settings: The limits.
        within: What the fields' paths begin with.

    Raises:
        ApiError: 422, naming the field.
    """
    limits = settings.limits
    bounds = (
        ("n", asked.n, limits.images, "images"),
        ("steps", asked.steps, limits.steps, "steps"),
        ("prompt", len(asked.prompt), limits.prompt_chars, "letters"),
        ("negative_prompt", len(asked.negative_prompt), limits.prompt_chars, "letters"),
    )
    for field, given, most, unit in bounds:
        if given > most:
            raise ApiError(
                422, f"{within}{field} is too large: {given} {unit}, at most {most}", param=within + field
            )
    if asked.size not in ("auto", *settings.sizes):
        known = ", ".join(settings.sizes)
        raise ApiError(
            422,
            f"{within}size {asked.size!r} is not drawn here. Ask for auto or {known}",
            param=f"{within}size",
        )
    if asked.seed is not None and asked.seed + asked.n > SEEDS:
        raise ApiError(422, f"{within}seed leaves no seeds for {asked.n} images", param=f"{within}seed")
    try:
        model.check_prompt(asked.prompt)
    except UserError as error:
        raise ApiError(422, f"{within}prompt: {error}", param=f"{within}prompt") from error


def orders_of(
    identity: str,
    asked: ImageInput,
    model: Model,
    deadline_s: float | None,
    previews: int = 0,
    progress: bool = False,
    own: str = "",
) -> list[ImageOrder]:
    """The orders for images that were checked.

    Args:
        identity: Of the request; an order's id is made of it.
        asked: The images.
        model: What draws them.
        deadline_s: Seconds from now.
        previews: Wanted of each image on the way.
        progress: Whether its steps are to be told.
        own: The base's own size.
    """
    first = secrets.randbelow(SEEDS - asked.n) if asked.seed is None else asked.seed
    every = -(-asked.steps // (previews + 1)) if previews else 0
    width, height = (None, None) if asked.size in ("auto", own) else map(int, asked.size.split("x"))
    scale = model.guidance if asked.guidance_scale is None else asked.guidance_scale
    return [
        ImageOrder(
            id=f"{identity}-{number}",
            subject=model.stored,
            version=model.version,
            request=DrawRequest(
                prompt=asked.prompt,
                seed=first + number,
                negative_prompt=asked.negative_prompt,
                steps=asked.steps,
                guidance=scale,
                sampler=asked.sampler,
                height=height,
                width=width,
            ),
            deadline_s=deadline_s,
            progress=progress,
            preview_every=every,
        )
        for number in range(asked.n)
    ]


class GenerationRequest(ImageInput):
    """The body of `POST /v1/images/generations`, as OpenAI has it, with more fields."""

    model: str = Field(default="base", max_length=128)
    """`rex`, its champion; `rex@v2`, one version; or `base`, the base itself."""
    response_format: Literal["b64_json", "url"] = "b64_json"
    """The images in the answer, or where to get them for a while."""
    user: str | None = Field(default=None, max_length=256)
    """Whom it is for; only logged."""
    stream: bool = False
    """Answer with server-sent events: progress, previews, and each image as soon as it is there."""
    partial_images: int = Field(default=0, ge=0, le=3)
    """Previews of each image on the way; only with `stream`."""
    output_format: Literal["png"] = "png"
    """Images are PNG."""
    quality: Literal["auto", "standard"] = "auto"
    """There is one quality; `steps` and `sampler` decide it."""
    background: Literal["auto", "opaque"] = "auto"
    """Images are opaque."""

    @model_validator(mode="after")
    def _takes_effect(self) -> "GenerationRequest":
        if self.partial_images and not self.stream:
            raise ValueError("partial_images takes no effect without stream: set stream, or leave it out")
        if self.stream and self.response_format == "url":
            raise ValueError("a stream carries the images themselves: leave response_format out")
        return self
