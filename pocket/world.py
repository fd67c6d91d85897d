"""This file is where a number becomes a captioned 64x64 picture: one thing, drawn in one style, at one place."""

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pocket.scenes import COLOURS, SCENES, WITHOUT_GROUND, background, draw_scene
from pocket.sprites import NOUNS, STYLES, Sprites

SIZE = 64  # pixels per edge
PLACES = (*SCENES, *(background(colour) for colour in COLOURS))

# How far things wander, in pixels of a 64 pixel picture and degrees. Every further pixel is a shape more to learn per
# thing, because one latent stands for 8x8 pixels; widen them when there is a GPU to train on.
EDGES = (46.0, 54.0)
SIDEWAYS = 3.0
DOWNWARDS = (-1.0, 4.0)
TILT = 5.0

# Things that come in every colour, so that the base learns that a backpack need not be red. The others
# (an apple, a fox) keep their colours but for a little, or they would turn into something else.
ANY_COLOUR = {
    *("backpack", "boot", "sneaker", "glasses", "teapot", "cup", "bowl", "can", "umbrella", "guitar"),
    *("bicycle", "rocket", "car", "balloon", "gift", "chair", "clock", "robot", "dress", "hat"),
}


@dataclass(frozen=True)
class Facts:
    """What a picture shows; `caption` may say less than that."""

    noun: str
    style: str
    place: str
    caption: str


def facts(seed: int, index: int) -> Facts:
    """What picture `index` of a world shows, without drawing it."""
    return _choose(_rng(seed, index))


def picture(sprites: Sprites, seed: int, index: int) -> tuple[Image.Image, Facts]:
    """Picture `index` of a world: RGB, SIZE x SIZE pixels, always the same for the same seed and index."""
    rng = _rng(seed, index)
    chosen = _choose(rng)
    return show(sprites, chosen.noun, chosen.style, chosen.place, rng), chosen


def show(sprites: Sprites, noun: str, style: str, place: str, rng: random.Random) -> Image.Image:
    """Some member of a class at a place: RGB, SIZE x SIZE pixels."""
    return compose(_tint(sprites.images[noun, style], noun, rng), place, rng, SIZE)


def compose(thing: Image.Image, place: str, rng: random.Random, size: int) -> Image.Image:
    """Puts a thing at a place with random size, position, tilt and mirroring.

    Args:
        thing: RGBA drawing on a transparent square.
        place: one of PLACES.
        rng: decides everything that is left open.
        size: edge length of the picture in pixels.
    """
    unit = size / 64
    canvas = draw_scene(place, rng, size)
    edge = round(rng.uniform(*EDGES) * unit)
    if rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    thing = thing.rotate(rng.uniform(-TILT, TILT), Image.Resampling.BICUBIC)
    thing = thing.resize((edge, edge), Image.Resampling.LANCZOS)
    left = (size - edge) // 2 + round(rng.uniform(-SIDEWAYS, SIDEWAYS) * unit)
    top = (size - edge) // 2 + round(rng.uniform(*DOWNWARDS) * unit)
    if place in SCENES and place not in WITHOUT_GROUND:
        _shadow(canvas, left, top, edge, unit)
    canvas.paste(thing, (left, top), thing)
    return canvas


def caption_words() -> list[str]:
    """Every word that a caption can hold, sorted."""
    words = {"a", "an", "photo", "of", *STYLES}
    for phrase in (*NOUNS, *PLACES):
        words.update(phrase.split())
    return sorted(words)


def _rng(seed: int, index: int) -> random.Random:
    return random.Random(f"pocket world {seed} picture {index}")


def _choose(rng: random.Random) -> Facts:
    noun = rng.choice(tuple(NOUNS))
    style = rng.choice(STYLES)
    return describe(noun, style, some_place(rng), rng)


def some_place(rng: random.Random) -> str:
    """A scene or a plain background."""
    return rng.choice(tuple(SCENES)) if rng.random() < 0.55 else background(rng.choice(tuple(COLOURS)))


def describe(noun: str, style: str, place: str, rng: random.Random) -> Facts:
    """A caption for what is shown: half keep the style to themselves and some the place."""
    named = f"{style} {noun}" if rng.random() < 0.5 else noun
    opening = "a photo of " if rng.random() < 0.5 else ""
    ending = f" {place}" if rng.random() < 0.85 else ""
    return Facts(noun, style, place, f"{opening}{with_article(named)}{ending}")


def with_article(named: str) -> str:
    """`a dog`, `an owl`."""
    return f"{'an' if named[0] in 'aeiou' else 'a'} {named}"


def _tint(thing: Image.Image, noun: str, rng: random.Random) -> Image.Image:
    """Another member of the class on a part of the samples: hue, saturation and brightness moved."""
    turn = rng.uniform(-math.pi, math.pi) if noun in ANY_COLOUR else rng.uniform(-0.25, 0.25)
    saturation, brightness = rng.uniform(0.75, 1.2), rng.uniform(0.88, 1.08)
    return thing if rng.random() < 0.6 else recoloured(thing, turn, saturation, brightness)


def recoloured(thing: Image.Image, turn: float, saturation: float, brightness: float) -> Image.Image:
    """An RGBA drawing with its hue turned (radians) and its saturation and brightness scaled."""
    pixels = np.asarray(thing, dtype=np.float32)
    rgb = pixels[..., :3] @ (brightness * _hue_matrix(turn, saturation)).T
    moved = np.concatenate([rgb, pixels[..., 3:]], axis=-1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(moved, "RGBA")


def _hue_matrix(turn: float, saturation: float) -> NDArray[np.float32]:
    """A colour rotation around the gray axis by `turn` radians, chroma scaled, luma kept."""
    luma = np.array([0.299, 0.587, 0.114])
    gray = np.tile(luma, (3, 1))
    cos, sin = saturation * math.cos(turn), saturation * math.sin(turn)
    quarter = np.array([[0.168, 0.330, -0.497], [-0.328, 0.035, 0.292], [1.250, -1.050, -0.203]])
    return np.asarray(gray + cos * (np.eye(3) - gray) + sin * quarter, dtype=np.float32)


def _shadow(canvas: Image.Image, left: int, top: int, edge: int, unit: float) -> None:
    """A soft dark ellipse under the thing."""
    mask = Image.new("L", canvas.size, 0)
    box = [left + 4 * unit, top + edge - 7 * unit, left + edge - 4 * unit, top + edge + unit]
    ImageDraw.Draw(mask).ellipse(box, fill=70)
    canvas.paste((20, 20, 20), mask=mask.filter(ImageFilter.GaussianBlur(1.5 * unit)))
