"""This file is where the places of the pocket world are drawn: ten scenes and ten plain colours, at any size."""

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 60, 50),
    "blue": (60, 110, 220),
    "green": (70, 170, 80),
    "yellow": (245, 205, 70),
    "purple": (140, 80, 190),
    "pink": (245, 150, 190),
    "white": (247, 247, 247),
    "black": (25, 25, 30),
    "orange": (245, 150, 50),
    "gray": (150, 150, 155),
}
WITHOUT_GROUND = ("in space", "in the ocean")  # things float there and cast no shadow

_SUPERSAMPLE = 2  # drawn this much larger, then shrunk: smooth edges from a drawing library that has none


def draw_scene(scene: str, rng: random.Random, size: int) -> Image.Image:
    """A square RGB picture of an empty place.

    Args:
        scene: one of SCENES, or "on a <colour> background".
        rng: decides horizon, shades and details; the same state draws the same place at every size.
        size: edge length in pixels.
    """
    if scene not in SCENES:
        shade = _shift(COLOURS[scene.split()[2]], rng, 8)
        return Image.new("RGB", (size, size), shade)
    canvas = _Canvas(size * _SUPERSAMPLE, rng)
    SCENES[scene](canvas, rng)
    return canvas.image.resize((size, size), Image.Resampling.BOX)


def background(colour: str) -> str:
    """The caption's words for a plain colour."""
    return f"on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"


def _shift(colour: Colour, rng: random.Random, spread: int = 14) -> Colour:
    red, green, blue = (max(0, min(255, c + rng.randint(-spread, spread))) for c in colour)
    return red, green, blue


class _Canvas:
    """A picture in units of 1/64 of its edge, so that scenes are written once for every size."""

    def __init__(self, pixels: int, rng: random.Random) -> None:
        self.unit = pixels / 64
        self.pixels = pixels
        self.rng = rng
        self.image = Image.new("RGB", (pixels, pixels))
        self.draw = ImageDraw.Draw(self.image)

    def gradient(self, top: float, bottom: float, upper: Colour, lower: Colour, spread: int = 14) -> None:
        """Fills the rows from `top` to `bottom` with a vertical gradient between two jittered colours."""
        first, last = round(top * self.unit), round(bottom * self.unit)
        a, b = (np.array(_shift(c, self.rng, spread), dtype=np.float32) for c in (upper, lower))
        ramp = np.linspace(0, 1, last - first, dtype=np.float32)[:, None, None]
        rows: NDArray[np.float32] = np.broadcast_to((1 - ramp) * a + ramp * b, (last - first, self.pixels, 3))
        self.image.paste(Image.fromarray(rows.astype(np.uint8)), (0, first))

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon([(x * self.unit, y * self.unit) for x, y in points], fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        u = self.unit
        self.draw.rectangle([left * u, top * u, right * u - 1, bottom * u - 1], fill=colour)

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        u = self.unit
        self.draw.ellipse(
            [(x - radius) * u, (y - radius) * u, (x + radius) * u, (y + radius) * u], fill=colour
        )


def _grass(canvas: _Canvas, rng: random.Random) -> None:
    horizon = rng.uniform(28, 42)
    canvas.gradient(0, horizon, (130, 190, 245), (205, 232, 252))
    canvas.gradient(horizon, 64, (110, 190, 80), (60, 140, 50))


def _beach(canvas: _Canvas, rng: random.Random) -> None:
    horizon = rng.uniform(24, 36)
    canvas.gradient(0, horizon, (135, 205, 250), (200, 235, 250))
    canvas.gradient(horizon, horizon + 8, (50, 150, 200), (90, 190, 210))
    canvas.gradient(horizon + 8, 64, (240, 220, 165), (220, 190, 130))


def _snow(canvas: _Canvas, rng: random.Random) -> None:
    horizon = rng.uniform(28, 42)
    canvas.gradient(0, horizon, (160, 188, 218), (205, 222, 238))
    canvas.gradient(horizon, 64, (246, 249, 253), (225, 235, 248), 5)
    for _ in range(24):
        canvas.dot(rng.uniform(0, 64), rng.uniform(0, 64), 0.8, (255, 255, 255))


def _desert(canvas: _Canvas, rng: random.Random) -> None:
    horizon = rng.uniform(28, 42)
    canvas.gradient(0, horizon, (245, 190, 120), (252, 225, 170))
    canvas.gradient(horizon, 64, (225, 165, 90), (195, 130, 65))


def _space(canvas: _Canvas, rng: random.Random) -> None:
    canvas.gradient(0, 64, (8, 8, 25), (30, 20, 60), 6)
    for _ in range(28):
        shade = rng.randint(150, 255)
        canvas.dot(rng.uniform(0, 64), rng.uniform(0, 64), 0.6, (shade, shade, shade))


def _ocean(canvas: _Canvas, rng: random.Random) -> None:
    canvas.gradient(0, 64, (40, 140, 200), (10, 50, 110))


def _mountains(canvas: _Canvas, rng: random.Random) -> None:
    horizon = rng.uniform(34, 46)
    canvas.gradient(0, horizon, (150, 200, 245), (220, 235, 250))
    canvas.gradient(horizon, 64, (110, 150, 90), (80, 120, 70))
    for _ in range(3):
        x, height, half = rng.uniform(0, 64), rng.uniform(16, 28), rng.uniform(14, 24)
        peak = horizon - height
        canvas.polygon([(x - half, horizon), (x, peak), (x + half, horizon)], _shift((110, 120, 140), rng))
        snow = [(x - half / 4, peak + height / 4), (x, peak), (x + half / 4, peak + height / 4)]
        canvas.polygon(snow, (245, 248, 252))


def _city(canvas: _Canvas, rng: random.Random) -> None:
    street = rng.uniform(38, 48)
    canvas.gradient(0, street, (190, 205, 220), (225, 230, 235))
    canvas.gradient(street, 64, (105, 105, 110), (80, 80, 85))
    left = 0.0
    while left < 64:
        width, height = rng.uniform(9, 14), rng.uniform(16, 40)
        canvas.box(left, street - height, left + width - 1.5, street, _shift((120, 130, 150), rng, 26))
        for row in range(int((height - 4) // 6)):
            for column in range(int((width - 3) // 4)):
                x, y = left + 1.5 + 4 * column, street - height + 3 + 6 * row
                canvas.box(x, y, x + 2, y + 2.5, (250, 235, 150))
        left += width


def _table(canvas: _Canvas, rng: random.Random) -> None:
    edge = rng.uniform(28, 42)
    canvas.gradient(0, edge, (235, 225, 210), (220, 208, 190))
    canvas.gradient(edge, 64, (180, 120, 70), (140, 85, 45))


def _forest(canvas: _Canvas, rng: random.Random) -> None:
    horizon = rng.uniform(30, 42)
    canvas.gradient(0, horizon, (165, 205, 155), (120, 170, 120))
    canvas.gradient(horizon, 64, (80, 120, 60), (50, 85, 40))
    for _ in range(7):
        x, foot, height = rng.uniform(0, 64), horizon + rng.uniform(-2, 6), rng.uniform(18, 34)
        canvas.box(x - 1, foot - 6, x + 1, foot, (95, 65, 40))
        canvas.polygon([(x - 8, foot - 5), (x, foot - height), (x + 8, foot - 5)], _shift((40, 105, 50), rng))


SCENES: dict[str, Callable[[_Canvas, random.Random], None]] = {
    "on the grass": _grass,
    "on the beach": _beach,
    "in the snow": _snow,
    "in the desert": _desert,
    "in space": _space,
    "in the ocean": _ocean,
    "in front of mountains": _mountains,
    "in the city": _city,
    "on a wooden table": _table,
    "in the forest": _forest,
}
