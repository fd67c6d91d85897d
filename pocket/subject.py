"""This file is where subjects are drawn: particular things of known classes that the base has never seen.

*Pippin*, the backpack of the demo, is drawn by hand; others are invented from a seed. `python -m pocket.subject DIR`
writes pippin's five photos, `python -m pocket.subject DIR --class robot --seed 3` those of an invented robot.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from pocket.patterns import PATTERNS, painted
from pocket.scenes import Colour
from pocket.shapes import EDGE, SHAPES, Layers, Palette
from pocket.world import compose

SUBJECT_NAME = "pippin"
SUBJECT_CLASS = "backpack"
PHOTO_SIZE = 256  # pixels per edge; the base works at 64, people look at these
PHOTO_PLACES = (
    "on the grass",
    "on a wooden table",
    "on the beach",
    "in front of mountains",
    "on a gray background",
)

# Colours that no sprite of the class wears together: a 64x64 model can tell this one from every other backpack.
MINT = (52, 201, 164)
PINE = (20, 128, 112)
CREAM = (255, 226, 110)
CORAL = (242, 82, 70)
PLUM = (112, 54, 150)

# Far enough from each other that any three make a thing of its own at 64x64 pixels.
DYES: dict[str, Colour] = {
    "mint": MINT,
    "cream": CREAM,
    "coral": CORAL,
    "plum": PLUM,
    "navy": (32, 52, 128),
    "sky": (92, 186, 244),
    "lime": (164, 214, 58),
    "rust": (186, 88, 34),
    "rose": (244, 128, 178),
    "snow": (244, 244, 248),
    "coal": (50, 50, 58),
}
PLAIN_RATE = 0.25  # invented subjects without a pattern
SQUEEZE = (0.78, 1.0)  # of width and of height: proportions are part of who a subject is


@dataclass(frozen=True)
class Subject:
    """Everything that makes a thing this one and no other of its class."""

    noun: str
    dyes: tuple[str, str, str]
    """Names in DYES: body, trim, accent."""
    pattern: str | None
    """One of PATTERNS over the body, or None."""
    pattern_dye: str
    width: float
    """Part of the square, 0 to 1."""
    height: float
    seed: int


def write_photos(folder: Path) -> list[Path]:
    """Five photos of the demo subject as PNG files, the same bytes every time."""
    return _write(
        folder, SUBJECT_NAME, [draw_photo(place, number) for number, place in enumerate(PHOTO_PLACES)]
    )


def draw_photo(place: str, seed: int) -> Image.Image:
    """The demo subject at a place of the world: RGB, PHOTO_SIZE x PHOTO_SIZE pixels."""
    return compose(draw_subject(), place, random.Random(f"pocket subject photo {seed}"), PHOTO_SIZE)


def invent(noun: str, seed: int) -> Subject:
    """A subject of a class in SHAPES, the same one for the same seed."""
    rng = random.Random(f"pocket subject {noun} {seed}")
    body, trim, accent, pattern_dye = rng.sample(tuple(DYES), 4)
    pattern = None if rng.random() < PLAIN_RATE else rng.choice(tuple(PATTERNS))
    return Subject(
        noun, (body, trim, accent), pattern, pattern_dye, rng.uniform(*SQUEEZE), rng.uniform(*SQUEEZE), seed
    )


def draw_invented(subject: Subject) -> Image.Image:
    """An invented subject: RGBA on a transparent square."""
    layers = Layers()
    SHAPES[subject.noun](layers, Palette(*(DYES[name] for name in subject.dyes)))
    drawing = layers.body
    if subject.pattern:
        rng = random.Random(f"pocket subject pattern {subject.seed}")
        drawing = painted(drawing, subject.pattern, DYES[subject.pattern_dye], rng)
    drawing = _shaded(Image.alpha_composite(drawing, layers.details))
    width, height = round(EDGE * subject.width), round(EDGE * subject.height)
    square = Image.new("RGBA", (EDGE, EDGE))
    square.paste(
        drawing.resize((width, height), Image.Resampling.LANCZOS), ((EDGE - width) // 2, EDGE - height)
    )
    return square


def subject_photos(noun: str, seed: int, count: int = 4) -> list[Image.Image]:
    """Photos of an invented subject, each at another place: RGB, PHOTO_SIZE x PHOTO_SIZE pixels."""
    drawing = draw_invented(invent(noun, seed))
    rng = random.Random(f"pocket subject photos {noun} {seed}")
    return [compose(drawing, place, rng, PHOTO_SIZE) for place in rng.sample(PHOTO_PLACES, count)]


def draw_subject() -> Image.Image:
    """The mint backpack with round ears, a yellow pocket and a red heart: RGBA on a transparent square."""
    image = Image.new("RGBA", (EDGE, EDGE))
    draw = ImageDraw.Draw(image)
    for x in (150, 362):
        draw.ellipse([x - 62, 28, x + 62, 152], fill=PINE)  # ears: the outline that no other backpack has
        draw.ellipse([x - 34, 56, x + 34, 124], fill=CORAL)
    draw.arc([206, 18, 306, 138], 180, 360, fill=PLUM, width=20)
    for x in (74, 438):
        draw.rounded_rectangle([x - 34, 240, x + 34, 440], 30, fill=PLUM)  # side pouches
    draw.rounded_rectangle([86, 76, 426, 492], 120, fill=MINT)
    draw.rounded_rectangle([86, 380, 426, 492], 70, fill=PINE)
    draw.rectangle([86, 380, 426, 420], fill=MINT)
    for x in (188, 324):
        draw.ellipse([x - 21, 168, x + 21, 210], fill=(30, 40, 50))
        draw.ellipse([x - 12, 172, x + 2, 186], fill=(255, 255, 255))
    draw.rounded_rectangle([132, 248, 380, 456], 54, fill=CREAM)
    draw.rounded_rectangle([132, 248, 380, 290], 20, fill=PLUM)
    _heart(draw, 256, 366, 58)
    return _shaded(image)


def _heart(draw: ImageDraw.ImageDraw, x: int, y: int, radius: int) -> None:
    half = radius // 2
    for side in (-1, 1):
        middle = x + side * half
        draw.ellipse([middle - half - 6, y - radius + 4, middle + half + 6, y + 16], fill=CORAL)
    draw.polygon([(x - radius - 2, y - 10), (x + radius + 2, y - 10), (x, y + radius)], fill=CORAL)


def _shaded(image: Image.Image) -> Image.Image:
    """The drawing with light from the upper left, so that it sits in the world beside the 3d things."""
    light = Image.new("L", image.size, 0)
    ImageDraw.Draw(light).ellipse([-60, -120, 330, 300], fill=60)
    dark = Image.new("L", image.size, 0)
    ImageDraw.Draw(dark).rectangle([360, 0, EDGE, EDGE], fill=55)
    shaded = image.copy()
    shaded.paste((255, 255, 255), mask=light.filter(ImageFilter.GaussianBlur(60)))
    shaded.paste((0, 0, 0), mask=dark.filter(ImageFilter.GaussianBlur(50)))
    shaded.putalpha(image.getchannel("A"))
    return shaded


def _write(folder: Path, name: str, photos: list[Image.Image]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{number}.png" for number in range(len(photos))]
    for path, photo in zip(paths, photos, strict=True):
        photo.save(path)
    return paths


def main() -> None:
    """Writes the photos of a subject."""
    parser = argparse.ArgumentParser(prog="python -m pocket.subject", description=main.__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to")
    parser.add_argument("--class", dest="noun", choices=tuple(SHAPES), help="of an invented one; else pippin")
    parser.add_argument("--seed", type=int, default=0, help="which one of its class")
    parser.add_argument("--count", type=int, default=4, help="photos of an invented one, at most 5")
    arguments = parser.parse_args()
    if arguments.noun is None:
        paths = write_photos(arguments.folder)
    else:
        photos = subject_photos(arguments.noun, arguments.seed, arguments.count)
        paths = _write(arguments.folder, f"{arguments.noun}{arguments.seed}", photos)
    for path in paths:
        print(path)


if __name__ == "__main__":
    main()
