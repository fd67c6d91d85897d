"""Tests of the DreamBooth measurement: how a drift is counted, and what is asked for is new."""

import pytest

from pocket.dreambooth import NEW_PLACES, DreamboothReport, Tuned, part_gone
from pocket.measure import text_of_dreambooth
from pocket.subject import PHOTO_PLACES
from pocket.world import PLACES


@pytest.mark.parametrize(
    ("base", "without", "with_prior", "gone"),
    [
        (0.0, 0.8, 0.2, 0.75),
        (0.1, 0.5, 0.1, 1.0),
        (0.0, 0.4, 0.4, 0.0),
        (0.0, 0.4, 0.6, -0.5),  # prior preservation made it worse
        (0.2, 0.2, 0.1, None),
    ],
)
def test_the_part_of_the_drift_that_is_gone(
    base: float, without: float, with_prior: float, gone: float | None
) -> None:
    assert part_gone(base, without, with_prior) == (None if gone is None else pytest.approx(gone))


def test_no_photo_shows_a_place_that_is_asked_for() -> None:
    assert set(NEW_PLACES) | set(PHOTO_PLACES) == set(PLACES)
    assert not set(NEW_PLACES) & set(PHOTO_PLACES)


def test_the_text_says_what_was_counted() -> None:
    tuned = Tuned(subject=0.9, place=0.8, subject_noun=0.95, drift=0.1, class_noun=1.0)
    bare = Tuned(subject=0.92, place=0.7, subject_noun=0.9, drift=0.5, class_noun=0.9)
    report = DreamboothReport("pippin", "backpack", "full", [], 0.99, 0.01, 0.0, tuned, bare, 0.8)
    said = text_of_dreambooth(report)
    assert all(words in said for words in ("pippin", "90.0%", "50.0%", "80% of the drift is gone"))
