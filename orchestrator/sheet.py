"""This file is where pictures are laid side by side, because people would rather look than read.

Images are uint8 [S, S, 3].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.png import Pixels

GAP, MARGIN, LABEL = 8, 28, 15
PAPER, INK, FAINT = (255, 255, 255), (28, 30, 34), (120, 124, 130)


@dataclass(frozen=True)
class SheetRow:
    """One labelled row of a contact sheet; `captions` stand above its images when there are any."""

    title: str
    note: str
    images: Sequence[Pixels]
    captions: Sequence[str] = ()


def shrunk(image: Pixels, tile: int) -> Pixels:
    """The image [S, S, 3] at most `tile` pixels large: many are held at a time."""
    if len(image) <= tile:
        return image
    return np.asarray(Image.fromarray(image).resize((tile, tile), Image.Resampling.LANCZOS))


def contact_sheet(title: str, rows: Sequence[SheetRow], tile: int = 144) -> Pixels:
    """A labelled contact sheet.

    Args:
        title: Stands on top.
        rows: From top to bottom.
        tile: Side of an image in pixels; smaller ones are enlarged smoothly.

    Returns:
        The sheet, uint8 [H, W, 3].
    """
    label_width = 150
    big, small = ImageFont.load_default(24), ImageFont.load_default(LABEL)
    columns = max(len(row.images) for row in rows)
    caption_lines = {
        id(row): [wrap(text, tile // 8) for text in row.captions] if row.captions else [] for row in rows
    }
    heights = [tile + (LABEL + 4) * max(map(len, caption_lines[id(row)]), default=0) for row in rows]
    width = 2 * MARGIN + label_width + columns * (tile + GAP) - GAP
    height = 2 * MARGIN + 44 + sum(heights) + (len(rows) - 1) * GAP * 2
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 6), title, fill=INK, font=big)
    top = MARGIN + 44
    for row, row_height in zip(rows, heights, strict=True):
        below = top + row_height - tile
        draw.text((MARGIN, below + 4), row.title, fill=INK, font=ImageFont.load_default(18))
        for number, line in enumerate(wrap(row.note, label_width // 8)):
            draw.text((MARGIN, below + 30 + number * (LABEL + 3)), line, fill=FAINT, font=small)
        for column, image in enumerate(row.images):
            left = MARGIN + label_width + column * (tile + GAP)
            if row.captions:
                for number, line in enumerate(caption_lines[id(row)][column]):
                    draw.text((left, top + number * (LABEL + 4)), line, fill=FAINT, font=small)
            picture = Image.fromarray(image)
            picture = picture.resize((tile, tile), Image.Resampling.LANCZOS)
            canvas.paste(picture, (left, below))
        top += row_height + GAP * 2
    return np.asarray(canvas)
