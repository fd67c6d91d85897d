"""This file is where images become PNG bytes and back: the same pixels and parameters give the same bytes."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

Pixels = NDArray[np.uint8]

Finish = Callable[[Pixels, Mapping[str, Any]], bytes]
"""Makes the PNG of pixels [H, W, 3] and the parameters that it should carry."""

KEY = "parameters"  # the text chunk that image tools show


def encode_png(pixels: Pixels, parameters: Mapping[str, Any] | None = None) -> bytes:
    """PNG bytes that depend on nothing but the arguments: no time, no path.

    Args:
        pixels: [H, W, 3] uint8.
        parameters: Goes into the text chunk `parameters` as JSON; `None` writes no chunk.
    """
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_itxt(KEY, json.dumps(dict(parameters), sort_keys=True, ensure_ascii=False))
    stream = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(stream, "PNG", pnginfo=info, compress_level=6)
    return stream.getvalue()


def decode_png(data: bytes) -> Pixels:
    """The pixels [H, W, 3] uint8 of PNG bytes that raybooth wrote."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.array(image.convert("RGB"))


def png_parameters(data: bytes) -> dict[str, Any]:
    """The parameters that PNG bytes carry; empty when they carry none."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        text = getattr(image, "text", {}).get(KEY)
    value: dict[str, Any] = json.loads(text) if text else {}
    return value


GAP = 2  # pixels between the images of a grid


def tiles(picture: Pixels, columns: int, rows: int, gap: int = GAP) -> list[Pixels]:
    """The images of a `grid` of so many columns and rows, row by row."""
    height, width = (picture.shape[0] + gap) // rows, (picture.shape[1] + gap) // columns
    return [
        picture[top : top + height - gap, left : left + width - gap]
        for top in range(0, rows * height, height)
        for left in range(0, columns * width, width)
    ]


def grid(images: Sequence[Pixels], columns: int, gap: int = GAP) -> Pixels:
    """Images [H, W, 3] in rows of `columns`, on white, each in a cell that the largest ones fill."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    rows = ceil(len(images) / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas
