"""This file is where pictures become so small that a page can carry hundreds of them."""

import base64
import io

from PIL import Image

SIDE = 112  # pixels of the shorter side
QUALITY = 80


def thumbnail(picture: bytes, side: int = SIDE) -> str:
    """A picture as a `data:` URI of a WebP whose shorter side is at most `side` pixels.

    Args:
        picture: PNG bytes that raybooth wrote.
        side: In pixels; a smaller picture keeps its size.
    """
    with Image.open(io.BytesIO(picture), formats=("PNG",)) as opened:
        image = opened.convert("RGB")
    scale = side / min(image.size)
    if scale < 1:
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        image = image.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
