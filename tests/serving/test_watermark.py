"""A mark that no eye sees is read back after what happens to pictures, and is never seen where there is none."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from serving.watermark import PROFILES, SMALLEST, embed, read, tag_of
from training.png import Pixels

HASH = "0f3a9c71" + "5b" * 28


def picture(side: int, seed: int = 0, width: int | None = None) -> Pixels:
    """Clouds of colour and a white corner: smooth, rough and saturated, as drawings are."""
    generator = np.random.default_rng(seed)
    total = np.zeros((side, width or side, 3))
    for cells, strength in ((3, 90.0), (9, 40.0), (24, 12.0)):
        small = generator.normal(0, strength, (cells, cells, 3)).clip(-127, 127) + 128
        layer = Image.fromarray(small.astype(np.uint8), "RGB").resize(
            (width or side, side), Image.Resampling.BICUBIC
        )
        total += np.asarray(layer, np.float64) - 128
    pixels = (total + 128).clip(0, 255).astype(np.uint8)
    pixels[: side // 4, : side // 4] = 255
    return pixels


def compressed(pixels: Pixels, quality: int = 80, kind: str = "JPEG") -> Pixels:
    stream = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(stream, kind, quality=quality)
    return np.array(Image.open(stream).convert("RGB"))


def resized(pixels: Pixels, by: float) -> Pixels:
    height, width = pixels.shape[:2]
    return np.array(Image.fromarray(pixels, "RGB").resize((int(width * by), int(height * by))))


ATTACKS: dict[str, Callable[[Pixels], Pixels]] = {
    "nothing": lambda p: p,
    "jpeg 80": compressed,
    "webp 80": lambda p: compressed(p, kind="WEBP"),
    "three quarters": lambda p: resized(p, 0.75),
    "twice": lambda p: resized(p, 2.0),
}


@pytest.mark.parametrize("side", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_mark_is_read_back(side: int, attack: str) -> None:
    marked = embed(picture(side), HASH)
    assert marked is not None
    found = read(ATTACKS[attack](marked))
    assert found is not None
    assert found.tag == HASH[: 8 if side >= 256 else 4]


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_a_larger_picture_bears_more(side: int) -> None:
    marked = embed(picture(side), HASH)
    assert marked is not None
    for attacked in (
        compressed(resized(marked, 0.75)),
        compressed(marked, 50),
        resized(compressed(marked), 0.5),
    ):
        found = read(attacked)
        assert found is not None and found.tag == HASH[:8]


def test_a_picture_that_is_no_square_is_marked_too() -> None:
    marked = embed(picture(333, width=517), HASH)
    assert marked is not None
    found = read(compressed(resized(marked, 0.75)))
    assert found is not None and found.tag == HASH[:8]


@pytest.mark.parametrize(("side", "least"), [(64, 42.0), (128, 43.0), (256, 47.0), (512, 47.0)])
def test_nobody_sees_it(side: int, least: float) -> None:
    before = picture(side)
    marked = embed(before, HASH)
    assert marked is not None and marked.dtype == np.uint8 and marked.shape == before.shape
    error = ((marked.astype(float) - before) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > least


def test_the_same_picture_and_hash_give_the_same_bytes_and_leave_the_argument_alone() -> None:
    before = picture(64)
    copy = before.copy()
    one, two = embed(before, HASH), embed(before, HASH)
    assert one is not None and two is not None and (one == two).all()
    assert (before == copy).all()


def test_a_picture_too_small_for_a_mark_gets_none() -> None:
    assert min(profile.side for profile in PROFILES) == SMALLEST == 64
    assert embed(picture(63), HASH) is None
    assert read(picture(16)) is None


@pytest.mark.parametrize("side", [64, 128, 512])
def test_an_unmarked_picture_is_never_called_marked(side: int) -> None:
    generator = np.random.default_rng(0)
    flat = [np.full((side, side, 3), level, np.uint8) for level in (0, 127, 255)]
    noise = [generator.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(5)]
    drawn = [picture(side, seed) for seed in range(20)]
    assert [read(p) for p in (*flat, *noise, *drawn, *map(compressed, drawn))] == [None] * 48


def test_a_cropped_mark_is_lost_rather_than_misread() -> None:
    marked = embed(picture(512), HASH)
    assert marked is not None
    assert read(marked[20:, 20:].copy()) is None


def test_a_picture_marked_twice_says_the_last() -> None:
    once = embed(picture(512), "ab" * 32)
    assert once is not None
    twice = embed(once, HASH)
    assert twice is not None
    found = read(twice)
    assert found is not None and found.tag == HASH[:8]


def test_a_tag_is_the_beginning_of_a_hash_or_of_the_hash_of_a_name() -> None:
    assert tag_of(HASH.upper()) == HASH[:8]
    assert tag_of("main") == tag_of("main") != tag_of("fp16")
    assert len(tag_of("")) == 8
