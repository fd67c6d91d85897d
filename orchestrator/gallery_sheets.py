"""This file is where a gallery gets a picture to look at per subject: its images, a row per prompt."""

from collections.abc import Container, Sequence
from itertools import groupby
from textwrap import shorten

from orchestrator.gallery import Entry, Gallery
from orchestrator.sheet import SheetRow, contact_sheet, shrunk
from training.png import Pixels, decode_png, encode_png

TILE = 144  # pixels of an image on a contact sheet, whose sizes keep it one that can be looked at:
MOST_ROWS, MOST_COLUMNS = 40, 8
MOST_LETTERS = 108  # of a prompt beside its row


def write_sheets(
    gallery: Gallery, entries: Sequence[Entry], changed: Container[str]
) -> dict[tuple[str, str], str]:
    """Contact sheets, a row per prompt, of every subject.

    Args:
        gallery: Holds the images and takes the sheets.
        entries: The images, each subject's together.
        changed: Labels of the subjects that have new images; the sheets of others are kept if they are there.

    Returns:
        Their paths by subject.
    """
    sheets: dict[tuple[str, str], str] = {}
    for label, group in groupby(entries, lambda entry: entry.image.label):
        images = list(group)
        first = images[0].image
        path = sheets[first.subject, first.version] = f"sheets/{label}.png"
        if label in changed or not gallery.out.exists(path):
            gallery.out.write(path, encode_png(_sheet(gallery, images), None))
    return sheets


def _sheet(gallery: Gallery, entries: Sequence[Entry]) -> Pixels:
    prompts: dict[str, list[Entry]] = {}
    for entry in entries:
        prompts.setdefault(entry.image.prompt, []).append(entry)
    rows = [
        SheetRow(
            "",
            shorten(prompt, MOST_LETTERS, placeholder="..."),
            [shrunk(decode_png(png), TILE) for png in gallery.pngs(shown)],
            [f"seed {entry.image.seed}" for entry in shown] if number == 0 else (),
        )
        for number, (prompt, found) in enumerate(list(prompts.items())[:MOST_ROWS])
        for shown in [found[:MOST_COLUMNS]]
    ]
    first = entries[0].image
    return contact_sheet(f"{first.subject} {first.version}", rows, TILE)
