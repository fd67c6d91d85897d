"""This file is where a drawing gets a pattern: stripes, dots, a band or a patch, painted within its outline."""

import math
import random
from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw

from pocket.scenes import Colour

OPACITY = 235  # of 255: light and shade of the drawing still show through


def painted(drawing: Image.Image, pattern: str, colour: Colour, rng: random.Random) -> Image.Image:
    """A copy of an RGBA drawing with a pattern over it; the outline stays what it was.

    Args:
        pattern: one of PATTERNS.
        rng: decides how wide, how slanted and where.
    """
    mask = Image.new("L", drawing.size)
    PATTERNS[pattern](ImageDraw.Draw(mask), drawing.width, rng)
    alpha = drawing.getchannel("A")
    covered = drawing.copy()
    covered.paste((*colour, 255), mask=ImageChops.multiply(mask, alpha))
    covered.putalpha(alpha)
    return covered


def _stripes(draw: ImageDraw.ImageDraw, edge: int, rng: random.Random) -> None:
    width, slant = edge * rng.uniform(0.06, 0.10), rng.choice((0.0, 0.0, 1.0, -1.0))
    for number in range(-20, 40):
        x = 2.2 * width * number
        foot = x + slant * edge
        draw.polygon([(x, 0), (x + width, 0), (foot + width, edge), (foot, edge)], fill=OPACITY)


def _dots(draw: ImageDraw.ImageDraw, edge: int, rng: random.Random) -> None:
    radius = edge * rng.uniform(0.045, 0.07)
    step = 3.6 * radius
    for row in range(math.ceil(edge / step) + 1):
        for column in range(math.ceil(edge / step) + 1):
            x, y = step * (column + 0.5 * (row % 2)), step * row
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=OPACITY)


def _band(draw: ImageDraw.ImageDraw, edge: int, rng: random.Random) -> None:
    middle, half = edge * rng.uniform(0.35, 0.7), edge * rng.uniform(0.07, 0.13)
    draw.rectangle([0, middle - half, edge, middle + half], fill=OPACITY)


def _patch(draw: ImageDraw.ImageDraw, edge: int, rng: random.Random) -> None:
    x, y = edge * rng.uniform(0.35, 0.65), edge * rng.uniform(0.35, 0.7)
    radius = edge * rng.uniform(0.13, 0.2)
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=OPACITY)


PATTERNS: dict[str, Callable[[ImageDraw.ImageDraw, int, random.Random], None]] = {
    "stripes": _stripes,
    "dots": _dots,
    "band": _band,
    "patch": _patch,
}
