"""This file is where the demo subject is drawn: one particular backpack that the base has never seen.

`python -m pocket.subject DIR` writes its five photos.
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

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

_EDGE = 512  # the drawing's own size in pixels, shrunk into every photo


def write_photos(folder: Path) -> list[Path]:
    """Five photos of the demo subject as PNG files, the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, place in enumerate(PHOTO_PLACES):
        path = folder / f"{SUBJECT_NAME}_{number}.png"
        draw_photo(place, seed=number).save(path)
        paths.append(path)
    return paths


def draw_photo(place: str, seed: int) -> Image.Image:
    """The subject at a place of the world: RGB, PHOTO_SIZE x PHOTO_SIZE pixels."""
    return compose(draw_subject(), place, random.Random(f"pocket subject photo {seed}"), PHOTO_SIZE)


def draw_subject() -> Image.Image:
    """The mint backpack with round ears, a yellow pocket and a red heart: RGBA on a transparent square."""
    image = Image.new("RGBA", (_EDGE, _EDGE))
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
    ImageDraw.Draw(dark).rectangle([360, 0, _EDGE, _EDGE], fill=55)
    shaded = image.copy()
    shaded.paste((255, 255, 255), mask=light.filter(ImageFilter.GaussianBlur(60)))
    shaded.paste((0, 0, 0), mask=dark.filter(ImageFilter.GaussianBlur(50)))
    shaded.putalpha(image.getchannel("A"))
    return shaded


if __name__ == "__main__":
    for written in write_photos(Path(sys.argv[1])):
        print(written)
