"""Tests of the measuring: what is asked for, and that a report comes of the shipped parts."""

import numpy as np
import pytest
from PIL import Image

from orchestrator.progress import open_stages
from pocket.clip import FOLDER as CLIP
from pocket.export import WEIGHTS
from pocket.judge import FOLDER as JUDGE
from pocket.judge import Verdict
from pocket.measure import SEEDS, Drawing, Wish, measure, sheet, text, wishes
from pocket.scenes import SCENES
from pocket.sprites import NOUNS
from pocket.world import PLACES, caption_words

shipped = pytest.mark.skipif(
    not all((folder / name).exists() for folder, name in ((CLIP, "config.json"), (JUDGE, "judge.json"))),
    reason="no judge or CLIP here: python -m pocket.pretrain makes them",
)


def test_every_noun_is_asked_for_at_known_places_in_known_words() -> None:
    wanted = wishes(prompts=3)
    assert len(wanted) == 3 * SEEDS * len(NOUNS)
    assert {one.noun for one in wanted} == set(NOUNS)
    assert {one.place for one in wanted} == set(PLACES)
    assert {one.style for one in wanted} == {None, "3d", "flat"}
    assert {word for one in wanted for word in one.prompt.split()} <= set(caption_words())


def test_drawings_of_a_prompt_stand_side_by_side() -> None:
    wanted = wishes(prompts=2)
    assert all(one.prompt == other.prompt for one, other in zip(wanted[::2], wanted[1::2], strict=True))
    assert [one.seed for one in wanted[:2]] == [0, 1]


def test_the_sheet_frames_what_was_not_seen() -> None:
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    wish = Wish("dog", "in space", None, seed=0)
    right, wrong = (Drawing(wish, gray, Verdict(noun, "in space", "3d")) for noun in ("dog", "cat"))
    pixels = np.asarray(sheet([right, wrong]))
    assert tuple(pixels[0, 0]) == (128, 128, 128)
    assert pixels[0, 66, 0] > 200 > pixels[0, 66, 1]


@shipped
def test_the_shipped_weights_are_measured() -> None:
    wanted = [one for one in wishes(prompts=2) if one.noun in ("fox", "mushroom")]
    report, drawings = measure(WEIGHTS, wanted, open_stages())
    assert report.images == len(drawings) == 8
    assert set(report.nouns) == {"fox", "mushroom"}
    assert report.scene == sum(
        one.verdict.place == one.wish.place for one in drawings if one.wish.place in SCENES
    ) / sum(one.wish.place in SCENES for one in drawings)
    assert 0 < report.seconds_per_image < 10
    assert f"{report.noun:.1%}" in text(report)
