"""Scores and their intervals: on vectors and pictures of which the answer is known."""

import numpy as np
import pytest

from orchestrator.protocol import LIVE, OBJECT, POCKET, class_prompts, prompts_for
from pocket.world import PLACES
from training.critic import layouts, nearest_layout, soft_copies
from training.png import Pixels
from training.prompt import render_prompt, without_subject
from training.scores import (
    among_photos,
    copy_test,
    difference,
    diversity,
    estimate,
    nearness,
)

EAST, NORTH, BETWEEN = (1.0, 0.0), (0.0, 1.0), (0.6, 0.8)


def unit(*vectors: tuple[float, ...]) -> np.ndarray:
    return np.array(vectors, np.float32)


def picture(seed: int) -> Pixels:
    """Four coloured fields with a square somewhere."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return np.kron(small, np.ones((16, 16, 1), np.uint8)).astype(np.uint8)


def test_nearness_and_ceiling_are_mean_cosines_without_a_photo_and_itself() -> None:
    photos = unit(EAST, BETWEEN)
    assert nearness(unit(EAST, NORTH), photos) == pytest.approx([0.8, 0.4])
    assert among_photos(photos) == pytest.approx([0.6, 0.6])
    assert among_photos(unit(EAST, EAST, NORTH)) == pytest.approx([0.5, 0.5, 0.0])


def test_diversity_is_of_drawings_of_one_prompt_and_single_ones_have_none() -> None:
    found = diversity(unit(EAST, NORTH, EAST, EAST, EAST), ["a", "a", "b", "b", "c"])
    assert found == pytest.approx({"a": 1.0, "b": 0.0})


def test_an_interval_is_over_prompts_and_not_over_images() -> None:
    values = [0.0] * 4 + [1.0] * 4
    of_images = estimate(values, [str(i) for i in range(8)])
    of_prompts = estimate(values, ["a"] * 4 + ["b"] * 4)
    assert of_images.value == of_prompts.value == 0.5
    assert (of_prompts.low, of_prompts.high) == (0.0, 1.0)  # two prompts that disagree say nothing
    assert 0.1 < of_images.low < of_images.high < 0.9
    assert estimate([0.3, 0.3], ["a", "b"]).as_json() == pytest.approx(
        {"value": 0.3, "low": 0.3, "high": 0.3, "n": 2}
    )
    with pytest.raises(ValueError, match="no values"):
        estimate([], [])


def test_an_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        values = np.repeat(rng.normal(0.5, 0.1, 25), 4) + rng.normal(0, 0.05, 100)
        found = estimate(values, [str(i // 4) for i in range(100)])
        hits += found.low <= 0.5 <= found.high
    assert 180 <= hits <= 198


def test_a_difference_is_paired_so_that_what_both_share_does_not_widen_it() -> None:
    rng = np.random.default_rng(2)
    one = rng.normal(0.5, 0.2, 50)
    groups = [str(i) for i in range(50)]
    found = difference((one + 0.02).tolist(), one.tolist(), groups)
    assert found.value == pytest.approx(0.02) and found.low > 0.019
    assert estimate((one + 0.02).tolist(), groups).low < 0.5  # unpaired, it would be within


def test_copies_are_told_from_other_pictures_also_when_soft_moved_or_mirrored() -> None:
    photos = [picture(seed) for seed in range(4)]
    vectors = layouts(photos)
    test = copy_test(vectors, np.stack([layouts(soft_copies(photo)) for photo in photos]))
    assert test.can_tell and test.others < test.threshold < test.copies
    copies = [copy for photo in photos for copy in soft_copies(photo)]
    near, which = nearest_layout([*copies, photos[2][:, ::-1]], vectors)
    assert (near > test.threshold).all() and which.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [2]
    near, _ = nearest_layout([picture(seed) for seed in range(10, 30)], vectors)
    assert (near < test.threshold).all()


def test_photos_that_are_alike_say_that_copies_cannot_be_told() -> None:
    one = picture(0)
    other = one.copy()
    other[0, 0] = 255 - other[0, 0]
    vectors = layouts([one, other])
    test = copy_test(vectors, np.stack([layouts(soft_copies(photo)) for photo in (one, other)]))
    assert not test.can_tell and test.threshold > test.others


def test_the_sets_are_the_papers_and_what_the_pocket_base_knows() -> None:
    assert (len(set(OBJECT)), len(set(LIVE))) == (25, 25) and len(set(OBJECT) & set(LIVE)) == 15
    assert render_prompt(OBJECT[-1], "can", "zwx") == "a cube shaped zwx can"
    assert all(prompt.partition("{subject} ")[2] in PLACES for prompt in POCKET)


@pytest.mark.parametrize(
    ("noun", "family", "expected"),
    [
        ("dog", "sd", "live"),
        ("stuffed animal", "sd", "live"),
        ("Cat", "sd", "live"),
        ("teapot", "sd", "object"),
        ("dog", "pocket", "pocket"),
    ],
)
def test_the_set_goes_by_class_and_base(noun: str, family: str, expected: str) -> None:
    assert prompts_for(noun, family) == expected


@pytest.mark.parametrize("prompt", [*OBJECT, *LIVE, *POCKET, "my {subject}", "no slot"])
def test_without_the_subject_no_prompt_says_the_identifier(prompt: str) -> None:
    said = render_prompt(without_subject(prompt), "owl", None)
    assert said == render_prompt(prompt, "owl", "zwx").replace("a zwx owl", "an owl").replace("zwx ", "")


def test_the_class_is_drawn_in_scenes_of_the_subject() -> None:
    assert class_prompts(POCKET)[1] == "a photo of a {class} on the beach" and len(class_prompts(POCKET)) == 5
