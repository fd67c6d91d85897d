"""This file is where the pocket's tests get sprites that need no download."""

import pytest
from PIL import Image, ImageDraw

from pocket.sprites import NOUNS, SPRITE_SIZE, STYLES, Sprites


@pytest.fixture(scope="session")
def discs() -> Sprites:
    """A disc of another colour for every noun."""
    images = {}
    for number, noun in enumerate(NOUNS):
        for style in STYLES:
            image = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
            ImageDraw.Draw(image).ellipse([8, 8, 88, 88], fill=(4 * number, 200 - 3 * number, 120, 255))
            images[noun, style] = image
    return Sprites(images)
