"""Tests of the subjects: the demo's five photos, and invented ones, always the same."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocket.patterns import PATTERNS, painted
from pocket.shapes import SHAPES
from pocket.sprites import NOUNS
from pocket.subject import (
    DYES,
    PHOTO_SIZE,
    SUBJECT_CLASS,
    draw_invented,
    draw_subject,
    invent,
    subject_photos,
    write_photos,
)


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


@pytest.mark.parametrize("noun", SHAPES)
def test_an_invented_subject_is_the_same_for_the_same_seed_alone(noun: str) -> None:
    assert noun in NOUNS
    first, again, other = (draw_invented(invent(noun, seed)) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    assert first.getchannel("A").getbbox() is not None


@pytest.mark.parametrize("seed", range(8))
def test_what_makes_a_subject_itself_can_be_read(seed: int) -> None:
    subject = invent("robot", seed)
    assert len({*subject.dyes, subject.pattern_dye}) == 4
    assert {*subject.dyes, subject.pattern_dye} <= set(DYES)
    assert subject.pattern is None or subject.pattern in PATTERNS
    pixels = np.asarray(draw_invented(subject))
    opaque = pixels[pixels[..., 3] == 255][:, :3].astype(int)
    for dye in subject.dyes:
        distance = np.abs(opaque - DYES[dye]).max(axis=1).min()
        assert distance < 60  # it wears that colour; light and shade move it a little


def test_photos_of_an_invented_subject_show_different_places() -> None:
    photos = subject_photos("cup", 3, count=5)
    assert len({photo.tobytes() for photo in photos}) == 5
    assert {photo.size for photo in photos} == {(PHOTO_SIZE, PHOTO_SIZE)}
    assert [one.tobytes() for one in subject_photos("cup", 3, count=5)] == [one.tobytes() for one in photos]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_keeps_the_outline(pattern: str) -> None:
    drawing = draw_subject()
    covered = painted(drawing, pattern, (255, 0, 255), random.Random(0))
    assert covered.getchannel("A").tobytes() == drawing.getchannel("A").tobytes()
    assert covered.tobytes() != drawing.tobytes()
