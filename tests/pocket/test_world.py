"""Tests of the pocket world: the same number is the same picture, and captions say what is shown."""

import random

import numpy as np
import pytest
from PIL import Image

from pocket.scenes import COLOURS, SCENES, background, draw_scene
from pocket.sprites import NOUNS, STYLES, Sprites
from pocket.vocabulary import RESERVED_WORDS
from pocket.world import ANY_COLOUR, PLACES, SIZE, caption_words, facts, picture


def test_a_picture_is_a_function_of_seed_and_index(discs: Sprites) -> None:
    first, shown = picture(discs, seed=5, index=123)
    again, shown_again = picture(discs, seed=5, index=123)
    other, _ = picture(discs, seed=6, index=123)
    assert first.size == (SIZE, SIZE)
    assert first.tobytes() == again.tobytes()
    assert shown == shown_again == facts(5, 123)
    assert first.tobytes() != other.tobytes()


def test_captions_hold_known_words_only_and_never_a_reserved_one() -> None:
    words = {word for index in range(2000) for word in facts(0, index).caption.split()}
    assert words <= set(caption_words())
    assert not set(RESERVED_WORDS) & set(caption_words())


def test_captions_name_the_noun_and_never_a_wrong_style_or_place() -> None:
    for index in range(500):
        shown = facts(0, index)
        assert shown.noun in shown.caption
        other_style = STYLES[1 - STYLES.index(shown.style)]
        assert other_style not in shown.caption.split()
        assert shown.caption.endswith((shown.noun, shown.place))


@pytest.mark.parametrize("wanted", ["a photo of a dog", "a dog in the snow", "a photo of a dog on the beach"])
def test_the_world_uses_the_prompts_that_people_type(wanted: str) -> None:
    assert any(facts(0, index).caption == wanted for index in range(100_000))


def test_every_noun_place_and_style_comes_up() -> None:
    shown = [facts(0, index) for index in range(3000)]
    assert {one.noun for one in shown} == set(NOUNS)
    assert {one.place for one in shown} == set(PLACES)
    assert {one.style for one in shown} == set(STYLES)
    assert set(NOUNS) >= ANY_COLOUR


def test_articles_fit_their_words() -> None:
    captions = [facts(0, index).caption for index in range(2000)]
    assert any("an owl" in caption for caption in captions)
    assert not any("a owl" in caption or "an 3d" in caption or "a orange" in caption for caption in captions)


@pytest.mark.parametrize("place", SCENES)
def test_a_scene_is_the_same_place_at_every_size(place: str) -> None:
    small = draw_scene(place, random.Random(3), 64)
    large = draw_scene(place, random.Random(3), 256).resize((64, 64), Image.Resampling.BOX)
    difference = np.abs(np.asarray(small, dtype=float) - np.asarray(large, dtype=float)).mean()
    assert difference < 8  # of 255: only edges may differ


@pytest.mark.parametrize("colour", COLOURS)
def test_a_plain_background_has_the_colour_that_its_caption_names(colour: str) -> None:
    pixel = draw_scene(background(colour), random.Random(1), 8).getpixel((4, 4))
    assert isinstance(pixel, tuple)
    distances = {
        name: sum(abs(a - b) for a, b in zip(pixel, rgb, strict=True)) for name, rgb in COLOURS.items()
    }
    assert min(distances, key=lambda name: distances[name]) == colour
