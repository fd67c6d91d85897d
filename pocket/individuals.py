"""This file is where members of one class are told apart: each has its own colours and perhaps a pattern."""

import math
import random

from PIL import Image

from pocket.patterns import PATTERNS, painted
from pocket.scenes import COLOURS
from pocket.sprites import NOUNS, STYLES, Sprites
from pocket.world import SIZE, Facts, compose, describe, recoloured, some_place

PLAIN_RATE = 0.4  # individuals without a pattern


def noun_of(number: int) -> str:
    """The class of an individual; the classes take turns."""
    return tuple(NOUNS)[number % len(NOUNS)]


def draw_individual(sprites: Sprites, seed: int, number: int) -> Image.Image:
    """Individual `number`, always the same: RGBA on a transparent square."""
    rng = _rng(seed, number)
    style = rng.choice(STYLES)
    drawing = recoloured(
        sprites.images[noun_of(number), style],
        turn=rng.uniform(-math.pi, math.pi),
        saturation=rng.uniform(0.75, 1.2),
        brightness=rng.uniform(0.8, 1.1),
    )
    if rng.random() < PLAIN_RATE:
        return drawing
    return painted(drawing, rng.choice(tuple(PATTERNS)), COLOURS[rng.choice(tuple(COLOURS))], rng)


def view(sprites: Sprites, seed: int, number: int, angle: int) -> Image.Image:
    """Individual `number` at the place that belongs to its view `angle`: RGB, 64x64 pixels."""
    rng = _rng(seed, number, angle)
    shown = _describe(seed, number, rng)
    return compose(draw_individual(sprites, seed, number), shown.place, rng, SIZE)


def view_facts(seed: int, number: int, angle: int) -> Facts:
    """What that view shows, without drawing it."""
    return _describe(seed, number, _rng(seed, number, angle))


def _describe(seed: int, number: int, rng: random.Random) -> Facts:
    style = _rng(seed, number).choice(STYLES)
    return describe(noun_of(number), style, some_place(rng), rng)


def _rng(seed: int, number: int, angle: int | None = None) -> random.Random:
    return random.Random(f"pocket individual {seed} {number} {angle}")
