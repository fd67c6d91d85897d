"""This file is where the shapes of a few classes are drawn by our own code, in any three colours.

Each is drawn on a square of EDGE pixels, in two layers: the body takes a pattern, the details lie over it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from pocket.scenes import Colour

EDGE = 512  # pixels; shrunk into every photo
INK: Colour = (34, 38, 48)
GLASS: Colour = (205, 232, 246)


@dataclass(frozen=True)
class Palette:
    """The colours of one thing."""

    body: Colour
    trim: Colour
    accent: Colour


class Layers:
    """Two transparent squares to draw on."""

    def __init__(self) -> None:
        self.body = Image.new("RGBA", (EDGE, EDGE))
        self.details = Image.new("RGBA", (EDGE, EDGE))
        self.on_body = ImageDraw.Draw(self.body)
        self.on_details = ImageDraw.Draw(self.details)


def _backpack(layers: Layers, colours: Palette) -> None:
    body, details = layers.on_body, layers.on_details
    body.arc([196, 20, 316, 140], 180, 360, fill=colours.trim, width=22)
    for x in (82, 430):
        body.rounded_rectangle([x - 32, 250, x + 32, 440], 28, fill=colours.trim)
    body.rounded_rectangle([96, 78, 416, 490], 110, fill=colours.body)
    details.rounded_rectangle([140, 290, 372, 456], 46, fill=colours.accent)
    details.rounded_rectangle([140, 290, 372, 326], 18, fill=colours.trim)
    details.rounded_rectangle([116, 190, 396, 208], 9, fill=INK)


def _cup(layers: Layers, colours: Palette) -> None:
    body, details = layers.on_body, layers.on_details
    body.arc([330, 190, 490, 380], 270, 90, fill=colours.trim, width=38)
    body.polygon([(70, 120), (400, 120), (360, 440), (110, 440)], fill=colours.body)
    body.ellipse([110, 410, 360, 470], fill=colours.body)
    details.ellipse([70, 84, 400, 156], fill=colours.trim)
    details.ellipse([94, 96, 376, 146], fill=(86, 52, 36))
    details.ellipse([180, 240, 290, 350], fill=colours.accent)


def _car(layers: Layers, colours: Palette) -> None:
    body, details = layers.on_body, layers.on_details
    body.polygon([(120, 250), (190, 130), (350, 130), (420, 250)], fill=colours.trim)
    body.rounded_rectangle([36, 236, 476, 376], 50, fill=colours.body)
    details.polygon([(160, 240), (206, 154), (258, 154), (258, 240)], fill=GLASS)
    details.polygon([(276, 240), (276, 154), (336, 154), (384, 240)], fill=GLASS)
    for x in (140, 372):
        details.ellipse([x - 62, 316, x + 62, 440], fill=INK)
        details.ellipse([x - 30, 348, x + 30, 408], fill=colours.accent)
    details.ellipse([440, 262, 478, 304], fill=(255, 240, 160))


def _house(layers: Layers, colours: Palette) -> None:
    body, details = layers.on_body, layers.on_details
    body.rectangle([96, 226, 416, 476], fill=colours.body)
    details.rectangle([330, 70, 384, 190], fill=colours.accent)
    details.polygon([(40, 244), (256, 44), (472, 244)], fill=colours.trim)
    details.rounded_rectangle([216, 330, 300, 476], 12, fill=colours.accent)
    for x in (128, 318):
        details.rectangle([x, 280, x + 66, 346], fill=GLASS)


def _fish(layers: Layers, colours: Palette) -> None:
    body, details = layers.on_body, layers.on_details
    body.polygon([(350, 256), (488, 140), (488, 372)], fill=colours.trim)
    body.polygon([(170, 150), (270, 64), (320, 170)], fill=colours.trim)
    body.polygon([(190, 360), (270, 450), (300, 350)], fill=colours.trim)
    body.ellipse([24, 120, 404, 392], fill=colours.body)
    details.pieslice([-60, 120, 190, 392], 300, 60, fill=colours.accent)
    details.ellipse([78, 196, 138, 256], fill=(255, 255, 255))
    details.ellipse([92, 212, 124, 244], fill=INK)


def _robot(layers: Layers, colours: Palette) -> None:
    body, details = layers.on_body, layers.on_details
    body.line([(256, 24), (256, 120)], fill=INK, width=16)
    body.ellipse([226, 8, 286, 68], fill=colours.accent)
    for x in (62, 450):
        body.rounded_rectangle([x - 34, 200, x + 34, 360], 24, fill=colours.trim)
    body.rounded_rectangle([88, 104, 424, 476], 70, fill=colours.body)
    for x in (184, 328):
        details.ellipse([x - 46, 180, x + 46, 272], fill=(255, 255, 255))
        details.ellipse([x - 22, 204, x + 22, 248], fill=INK)
    details.rounded_rectangle([160, 350, 352, 418], 20, fill=colours.trim)
    for x in (208, 256, 304):
        details.line([(x, 350), (x, 418)], fill=INK, width=8)


def _gift(layers: Layers, colours: Palette) -> None:
    body, details = layers.on_body, layers.on_details
    body.rounded_rectangle([76, 210, 436, 480], 22, fill=colours.body)
    details.rounded_rectangle([50, 150, 462, 236], 20, fill=colours.trim)
    details.rectangle([222, 150, 290, 480], fill=colours.accent)
    details.ellipse([120, 48, 256, 158], outline=colours.accent, width=34)
    details.ellipse([256, 48, 392, 158], outline=colours.accent, width=34)


def _mushroom(layers: Layers, colours: Palette) -> None:
    body, details = layers.on_body, layers.on_details
    details.rounded_rectangle([184, 270, 328, 484], 54, fill=colours.trim)
    body.pieslice([36, 50, 476, 530], 180, 360, fill=colours.body)
    for x, y, radius in ((150, 210, 40), (262, 136, 46), (366, 222, 36)):
        details.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colours.accent)


SHAPES: dict[str, Callable[[Layers, Palette], None]] = {
    "backpack": _backpack,
    "cup": _cup,
    "car": _car,
    "house": _house,
    "fish": _fish,
    "robot": _robot,
    "gift": _gift,
    "mushroom": _mushroom,
}
