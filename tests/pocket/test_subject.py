"""Tests of the demo subject: five photos, always the same."""

from pathlib import Path

from PIL import Image

from pocket.sprites import NOUNS
from pocket.subject import PHOTO_SIZE, SUBJECT_CLASS, draw_subject, write_photos


def test_the_photos_are_five_and_the_same_bytes_every_time(tmp_path: Path) -> None:
    first, second = write_photos(tmp_path / "a"), write_photos(tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in second]
    assert len({path.read_bytes() for path in first}) == 5
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with Image.open(first[0]) as photo:
        assert (photo.mode, photo.size) == ("RGB", (PHOTO_SIZE, PHOTO_SIZE))


def test_the_base_knows_the_class_of_the_subject() -> None:
    assert SUBJECT_CLASS in NOUNS


def test_the_drawing_keeps_a_transparent_margin() -> None:
    left, top, right, bottom = draw_subject().getchannel("A").getbbox() or (0, 0, 0, 0)
    assert left > 0 and top > 0
    assert right < draw_subject().width and bottom < draw_subject().height
