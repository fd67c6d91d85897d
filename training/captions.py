"""This file is where photos get words of their own: a text file beside each, in place of the prompt they share."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from cluster.errors import UserError
from cluster.source import entries, find, read_text

SUFFIX = ".txt"
_LONGEST = 2000  # letters; no tokenizer takes as many


def read_captions(paths: Sequence[str], photos: Sequence[str], prompt: str) -> tuple[list[str], list[str]]:
    """The prompt of each photo, and what people should know.

    A caption that does not say `{subject}` follows the prompt that does: "a photo of {subject}, asleep on a sofa".

    Args:
        paths: Folders and files that the photos came from.
        photos: Their names, in order; `rex.jpg` has its caption in `rex.txt`.
        prompt: The shared prompt, that of photos without a caption.

    Raises:
        UserError: No photo has a caption, or one cannot be read.
    """
    texts: dict[str, str] = {}
    for given in map(find, paths):
        beside = given.place if given.is_folder else given.place.rpartition("/")[0] or "."
        texts |= {entry.name: entry.place for entry in entries(beside) if entry.suffix == SUFFIX}
    out, notes = [], []
    for photo in photos:
        name = PurePosixPath(photo).stem + SUFFIX
        caption = " ".join(read_text(texts[name]).split()) if name in texts else ""
        if len(caption) > _LONGEST:
            raise UserError(f"{texts[name]} is too long", f"{len(caption)} letters", "shorten it")
        if not caption:
            notes.append(f"{photo} has no caption, so it has the prompt that all share")
        out.append(caption if "{subject}" in caption else f"{prompt}, {caption}" if caption else prompt)
    if len(notes) == len(photos):
        raise UserError(
            "no photo has a caption",
            f"train.captions is files, and there is no {PurePosixPath(photos[0]).stem}{SUFFIX} beside {photos[0]}",
            "write one text file a photo, or set train.captions: none",
        )
    return out, notes
