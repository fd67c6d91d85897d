"""This file is where photos come in with a request, as files or as URLs, and are checked as training checks them."""

import asyncio
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cluster.errors import RayboothError, UserError
from serving.answers import ApiError, invalid
from serving.outbound import Outbound
from serving.settings import Limits
from serving.training_order import TrainingRequest
from training.intake import SUFFIXES, read_photos

FIELDS = 20  # of a form, apart from its files

Photo = tuple[str, bytes]
"""The name that it was given with, and its bytes."""


async def asked_with_photos(
    request: Request, limits: Limits, outbound: Outbound
) -> tuple[TrainingRequest, list[Photo]]:
    """The request for a training, and its photos.

    Args:
        request: A form or JSON.
        limits: Of photos.
        outbound: Fetches those that are URLs.

    Raises:
        ApiError: 422, naming the field.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
        raw, photos = await _form(request, limits)
    else:
        try:
            raw, photos = json.loads(await request.body()), []
        except ValueError as error:
            raise ApiError(422, f"the body is neither a form nor JSON: {error}") from error
    try:
        asked = TrainingRequest.model_validate(raw)
    except ValidationError as error:
        raise invalid(error.errors()) from error
    most = limits.photos
    if len(photos) + len(asked.image_urls) > most:
        raise ApiError(422, f"there are more than {most} photos. 3 to 5 are enough", param="images")
    for number, url in enumerate(asked.image_urls):
        try:
            photos.append((url, await outbound.get(url, limits.photo_bytes)))
        except RayboothError as error:
            raise ApiError(422, f"image_urls.{number}: {error}", param=f"image_urls.{number}") from error
    if not photos:
        raise ApiError(422, "there are no photos. Send files as `images`, or `image_urls`", param="images")
    return asked, photos


async def _form(request: Request, limits: Limits) -> tuple[dict[str, Any], list[Photo]]:
    raw: dict[str, Any] = {}
    photos: list[Photo] = []
    try:
        form = await request.form(max_files=limits.photos, max_fields=FIELDS)
    except HTTPException as error:
        raise ApiError(422, f"the form cannot be read: {error.detail}", "bad_form", "images") from error
    try:
        for field, value in form.multi_items():
            if isinstance(value, UploadFile):
                if field not in ("images", "images[]"):
                    raise ApiError(
                        422, f"{field[:64]!r} is no field for files. Send them as `images`", param=field[:64]
                    )
                photos.append((_shown(value.filename, len(photos)), await _read(value, limits)))
            elif field == "image_urls":
                raw.setdefault(field, []).append(value)
            elif field in ("params", "metadata"):
                raw[field] = _json(field, value)
            else:
                raw[field] = value
    finally:
        await form.close()
    return raw, photos


async def _read(file: UploadFile, limits: Limits) -> bytes:
    data = await file.read(limits.photo_bytes + 1)
    if len(data) > limits.photo_bytes:
        said = (
            f"{_shown(file.filename, 0)} is too large. At most {limits.photo_bytes} bytes are read of a photo"
        )
        raise ApiError(422, said, "photo_too_large", "images")
    return data


def _json(field: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ApiError(422, f"{field} is no JSON: {error}", param=field) from error


def _shown(name: str | None, number: int) -> str:
    """The name of a file as it may be told."""
    shown = "".join(letter for letter in (name or "") if letter.isprintable())[:100]
    return shown or f"photo {number + 1}"


async def checked(photos: Sequence[Photo], image_size: int) -> tuple[list[Photo], list[str]]:
    """The photos under names for storage, and notes about them. They are decoded as training does.

    Args:
        photos: As they came.
        image_size: The base's, in pixels.

    Raises:
        ApiError: 422: one cannot be used; says which and why.
    """
    return await asyncio.to_thread(_checked, photos, image_size)


def _checked(photos: Sequence[Photo], image_size: int) -> tuple[list[Photo], list[str]]:
    named = [(f"{number:03d}{_suffix(data)}", data) for number, (_, data) in enumerate(photos)]
    given = {name: shown for (name, _), (shown, _) in zip(named, photos, strict=True)}
    with tempfile.TemporaryDirectory(prefix="raybooth-") as scratch:
        for name, data in named:
            (Path(scratch) / name).write_bytes(data)
        try:
            notes = read_photos([scratch], image_size).notes
        except UserError as error:
            said = _renamed(str(error), scratch, given)
            raise ApiError(422, said, "bad_photo", "images") from error
    return named, [_renamed(note, scratch, given) for note in notes]


def _suffix(data: bytes) -> str:
    """The suffix that its bytes ask for: what came as `x.png` may be a JPEG. One that is no photo is refused later."""
    kinds = ((b"\x89PNG", ".png"), (b"RIFF", ".webp"))
    return next((suffix for magic, suffix in kinds if data.startswith(magic)), SUFFIXES[0])


def _renamed(said: str, scratch: str, given: dict[str, str]) -> str:
    """What the intake said, with the names that the photos came with."""
    said = said.replace(f"{scratch}/", "")
    return re.sub(r"\b\d{3}\.(?:jpg|png|webp)\b", lambda match: given.get(match[0], match[0]), said)
