"""This file is where the parts of a photo are cut that are trained on. They are enumerated, so that latents are cached.

S image size of the base in pixels.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from training.buckets import Size, bucket_of
from training.focus import FOCUSES, focused
from training.recipe import Data


@dataclass(frozen=True)
class Cuts:
    """Where the parts of a stored photo lie."""

    covering: Size
    """What the photo is shrunk to first, so that it just covers a part."""
    size: Size
    """Of each part."""
    corners: tuple[tuple[int, int], ...]
    """Top and left of each in the shrunk photo, without mirror images."""


def cuts(stored: Image.Image, image_size: int, data: Data, step: int | None = None) -> Cuts:
    """The parts of a photo whose short side is S: squares, or with `data.buckets` of its bucket's size.

    A photo that fits exactly has the same part `variants` times, so that every photo keeps its share of the steps.

    Args:
        stored: The stored photo.
        image_size: S.
        data: Which parts.
        step: What sides of buckets are multiples of; `None` gives squares in any case.
    """
    size = bucket_of(*stored.size, image_size, step) if data.buckets and step else (image_size, image_size)
    scale = max(wanted / have for wanted, have in zip(size, stored.size, strict=True))
    width, height = (max(wanted, round(have * scale)) for wanted, have in zip(size, stored.size, strict=True))
    right, down = width - size[0], height - size[1]  # one of them is 0
    spare = max(right, down)
    if data.variants > 1:
        offsets = [int(offset) for offset in np.linspace(0, spare, data.variants).round()]
    elif data.crop in FOCUSES and spare:
        pixels = np.asarray(_shrunk(stored.convert("RGB"), (width, height)))
        offsets = [focused(pixels, 0 if down else 1, size[1] if down else size[0], data.crop)]
    else:
        offsets = [{"start": 0, "end": spare}.get(data.crop, spare // 2)]
    return Cuts((width, height), size, tuple((offset, 0) if down else (0, offset) for offset in offsets))


def crops(
    png: bytes, image_size: int, data: Data, step: int | None = None, of: bytes | None = None
) -> list[NDArray[np.uint8]]:
    """The parts of a stored photo that are trained on: always `variants` (twice as many with `flip`).

    Args:
        png: A stored photo; its short side is `image_size`.
        image_size: S.
        data: Which parts.
        step: As of `cuts`; `None` gives squares, as pictures to look at.
        of: The stored photo of which `png` is the mask; `None` is `png` itself.

    Returns:
        uint8 [S, S, 3] each, or [height, width, 3], in the order of variants, each followed by its mirror image with
        `flip`.
    """
    with PngImageFile(io.BytesIO(png)) as image:
        found = cuts(image if of is None else opened(of), image_size, data, step)
        pixels = np.asarray(_shrunk(image, found.covering))
    (width, height), out = found.size, []
    for number, (top, left) in enumerate(found.corners):
        part = pixels[top : top + height, left : left + width]
        if data.rotate and number:
            part = _turned(part, data.rotate, number)
        if data.color and number and part.ndim == 3:
            part = _recoloured(part, data.color, number)
        out += [part, part[:, ::-1]] if data.flip else [part]
    return out


def opened(png: bytes) -> Image.Image:
    """A stored photo, decoded when it is looked at."""
    return PngImageFile(io.BytesIO(png))


def _shrunk(image: Image.Image, size: Size) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _turned(pixels: NDArray[np.uint8], most: float, number: int) -> NDArray[np.uint8]:
    """Variant `number` [height, width, ...] turned by up to `most` degrees, and enlarged until no corner is empty."""
    angle = np.radians(np.random.Generator(np.random.Philox(key=[number, 1])).uniform(-most, most))
    image = Image.fromarray(pixels)
    (width, height), along, across = image.size, abs(np.cos(angle)), abs(np.sin(angle))
    scale = min(width / (width * along + height * across), height / (width * across + height * along))
    cos, sin, x, y = float(np.cos(angle) * scale), float(np.sin(angle) * scale), width / 2, height / 2
    # where each pixel of the turned picture comes from
    back = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    turned = image.transform(image.size, Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
    return np.asarray(turned)


def _recoloured(pixels: NDArray[np.uint8], strength: float, number: int) -> NDArray[np.uint8]:
    """Variant `number` [S, S, 3]: brightness, contrast and saturation differ, each by up to `strength`."""
    factors = np.random.Generator(np.random.Philox(key=number)).uniform(1 - strength, 1 + strength, 3)
    bright, contrast, saturation = factors.astype(np.float32)
    out = pixels.astype(np.float32) * bright
    out = (out - out.mean()) * contrast + out.mean()
    grey = (0.299 * out[..., 0] + 0.587 * out[..., 1] + 0.114 * out[..., 2])[..., None]
    recoloured: NDArray[np.uint8] = ((out - grey) * saturation + grey).round().clip(0, 255).astype(np.uint8)
    return recoloured
