"""This file is where photos enter: each is checked, turned upright, made RGB, shrunk, and stored.

Nothing is squashed: a photo's short side becomes the base's image size, and its long side follows (`crops`
cuts the squares that are trained on). Sizes are checked in the header, before a pixel is decoded.
"""

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cluster.errors import SystemFailure, UserError
from cluster.source import Entry, entries, find, read
from cluster.storage import Storage, sha256, sha256_file
from training.likeness import look_alikes
from training.masks import Mask, is_mask, mask_beside, mask_of_alpha
from training.recipe import ABOUT

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_BYTES = 50_000_000
MAX_PIXELS = 100_000_000  # the largest phone sensors give 50 to 108 million; decoded, this is 300 MB
MIN_SIDE = 32  # pixels; and no photo is enlarged more than twice
MAX_ASPECT = 3  # of the stored photo; what is longer is cut to its middle
TABLE = "photos.parquet"
NOTHING: Mapping[str, Entry] = {}

# Opened by their own readers, not `Image.open`: its bomb check warns or raises by a process-wide setting.
_READERS: tuple[tuple[bytes, Callable[[io.BytesIO], ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"RIFF", WebPImageFile),
)


@dataclass(frozen=True)
class Photo:
    """One photo, upright, RGB, its short side the image size. `png` holds pixels and nothing else."""

    name: str
    sha256_source: str
    sha256_pixels: str
    png: bytes
    width: int
    height: int
    mask: bytes = b""
    """Where it counts, a grey PNG of the same size; empty is everywhere."""
    original: tuple[int, int] = (0, 0)
    """Height and width of the photo as it was given, upright."""
    cut: tuple[int, int] = (0, 0)
    """Rows and columns of the stored size that were cut off above and to the left."""


@dataclass(frozen=True)
class Intake:
    """A subject's photos in order, and what people should know about the files that were given."""

    photos: list[Photo]
    notes: list[str]

    def key(self, image_size: int) -> str:
        """The address of these photos, 16 hex digits: of their pixels, not of names or places."""
        parts = [f"intake-1:{image_size}", *(photo.sha256_pixels for photo in self.photos)]
        return sha256("\n".join(parts).encode())[:16]


@dataclass(frozen=True)
class StoredPhotos:
    """Where a subject's photos lie: `path/photos.parquet` with the sha256 `digest`."""

    path: str
    key: str
    count: int
    digest: str


def read_photos(paths: Sequence[str], image_size: int, mask: Mask = "none") -> Intake:
    """The photos in `paths`, sorted by name. Dot-files and other files are skipped with a note.

    Args:
        paths: Folders (not searched deeper) and files, as paths or URIs such as `s3://bucket/rex/`.
        image_size: The base's, in pixels.
        mask: Where photos count: everywhere, where they are opaque, or where a file beside them says.

    Raises:
        StorageError: An object store fails.
        UserError: A path does not exist, no photo is there, one photo cannot be used, or two are the same.
    """
    files, notes = _list_files(paths)
    masks = {entry.name: entry for entry in files if is_mask(entry.name)}
    if mask != "files":
        notes += [f"skipped {name}: a mask, and train.objective.mask is not files" for name in masks]
    photos = [_read_photo(file, image_size, notes, mask, masks) for file in files if file.name not in masks]
    if not photos:
        raise UserError(
            f"no photos in {', '.join(paths)}",
            "; ".join(notes) or "nothing is there",
            f"give a folder with 3 to 5 photos ({', '.join(SUFFIXES)})",
        )
    first: dict[str, Photo] = {}
    for photo in photos:
        twin = first.setdefault(photo.sha256_pixels, photo)
        if twin is not photo:
            raise UserError(
                f"{photo.name} is a duplicate of {twin.name}",
                "their pixels are the same, and a photo seen twice as often is learned by heart",
                "remove one of them",
            )
    notes += look_alikes([photo.name for photo in photos], [photo.png for photo in photos])
    return Intake(photos, notes)


def _list_files(paths: Sequence[str]) -> tuple[list[Entry], list[str]]:
    found: list[Entry] = []
    for given in map(find, paths):
        found += entries(given.place) if given.is_folder else [given]
    found.sort(key=lambda entry: (entry.name, entry.place))
    files = [e for e in found if not e.is_folder and e.suffix in SUFFIXES and not e.name.startswith(".")]
    skipped = [e.name for e in found if e not in files and e.name != ABOUT]
    return files, [
        f"skipped {name}: a hidden file, a folder, or not {', '.join(SUFFIXES)}" for name in skipped
    ]


def _read_photo(
    entry: Entry, image_size: int, notes: list[str], mask: Mask = "none", masks: Mapping[str, Entry] = NOTHING
) -> Photo:
    file = entry.place
    if entry.size > MAX_BYTES:
        raise UserError(
            f"{file} is too large",
            f"{entry.size / 1e6:.0f} MB, at most {MAX_BYTES / 1e6:.0f} MB are read",
            "save it smaller",
        )
    data = read(file)
    with _open(file, data) as source:
        _check_header(file, source, image_size)
        try:
            turned = ImageOps.exif_transpose(source)
            upright = _rgb(turned)
        except Exception as error:  # a decoder may raise anything on damaged bytes
            raise _damaged(file, error) from error
    image, cut = _shrink(upright, image_size)
    if max(upright.size) > MAX_ASPECT * min(upright.size):
        notes.append(f"{entry.name} is longer than {MAX_ASPECT}:1, its middle is used")
    out = io.BytesIO()
    image.save(out, "PNG")
    pixels = sha256(repr(image.size).encode() + image.tobytes())
    where = b""
    if mask != "none":
        grey = mask_of_alpha(turned, file) if mask == "alpha" else mask_beside(entry, masks, upright.size)
        shown = io.BytesIO()
        _shrink(grey, image_size)[0].save(shown, "PNG")
        where = shown.getvalue()
    original = (upright.height, upright.width)
    return Photo(entry.name, sha256(data), pixels, out.getvalue(), *image.size, where, original, cut)


def _open(file: str, data: bytes) -> ImageFile:
    for magic, reader in _READERS:
        if data.startswith(magic):
            try:
                return reader(io.BytesIO(data))
            except Exception as error:  # a parser may raise anything on damaged bytes
                raise _damaged(file, error) from error
    raise UserError(
        f"{file} is not a JPEG, PNG or WebP image",
        f"it begins with {data[:16]!r}" if data else "it is empty",
        "save it as one of these, or remove it from the photos",
    )


def _damaged(file: str, error: Exception) -> UserError:
    return UserError(f"{file} is damaged", str(error), "save it again, or remove it from the photos")


def _check_header(file: str, source: ImageFile, image_size: int) -> None:
    width, height = source.size
    smallest = max(MIN_SIDE, image_size // 2)
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{file} has too many pixels",
            f"{width}x{height}, at most {MAX_PIXELS // 1_000_000} million pixels are decoded",
            "save it smaller",
        )
    if min(width, height) < smallest:
        raise UserError(
            f"{file} is too small",
            f"{width}x{height} pixels, the base draws {image_size}x{image_size}",
            f"use a photo whose shorter side has at least {smallest} pixels",
        )
    if getattr(source, "n_frames", 1) > 1:
        raise UserError(
            f"{file} is animated", f"{getattr(source, 'n_frames', 0)} frames", "save one frame as a picture"
        )


def _rgb(image: Image.Image) -> Image.Image:
    """Decoded as 8-bit RGB over white, without metadata."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    canvas = Image.new("RGB", image.size, "white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas.paste(image, mask=image)
    else:
        canvas.paste(image.convert("RGB"))
    return canvas


def _shrink(image: Image.Image, image_size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The short side scaled to `image_size`; the long side follows, cut to its middle above `MAX_ASPECT`.

    The second value is what was cut off above and to the left, in pixels of the new size.
    """
    short, long = min(image.size), min(max(image.size), MAX_ASPECT * min(image.size))
    width, height = (min(side, long) for side in image.size)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    size = (round(width * image_size / short), round(height * image_size / short))
    shrunk = image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    return shrunk, (round(top * image_size / short), round(left * image_size / short))


def store_photos(storage: Storage, name: str, intake: Intake, image_size: int) -> StoredPhotos:
    """Keep a subject's photos under the address of their pixels; what is there whole is not written again."""
    key = intake.key(image_size)
    path = f"subjects/{name}/{key}"
    try:
        with storage.verified(path) as folder:
            digest = sha256_file(folder / TABLE)
    except SystemFailure:
        columns = {
            column: [getattr(photo, column) for photo in intake.photos]
            for column in ("name", "png", "width", "height", "sha256_source", "sha256_pixels")
        }
        with tempfile.TemporaryDirectory(prefix="raybooth-") as scratch:
            digest = Storage(scratch).write_rows(TABLE, columns)
            meta = {"kind": "raybooth-photos", "count": len(intake.photos), "image_size": image_size}
            storage.publish(Path(scratch), path, meta)
    return StoredPhotos(path, key, len(intake.photos), digest)
