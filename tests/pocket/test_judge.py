"""Tests of the judge: it says only names of this world, and the shipped one can be believed."""

import json
import random
from pathlib import Path

import pytest
import torch

from pocket.judge import (
    FOLDER,
    LABELS,
    NOTHING,
    SPOILED_RATE,
    Accuracy,
    Judge,
    lesson,
    lesson_facts,
    load_judge,
    save_judge,
)
from pocket.sprites import NOUNS, STYLES, Sprites
from pocket.subject import subject_photos
from pocket.warp import warped
from pocket.world import PLACES, SIZE, facts

MAX_BYTES = 2 * 1024**2
PERFECT = Accuracy(1.0, 1.0, 1.0)

shipped = pytest.mark.skipif(
    not (FOLDER / "judge.json").exists(), reason="no judge here: python -m pocket.pretrain makes it"
)


def test_a_saved_judge_says_the_same_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge().eval()
    save_judge(judge, {"true": PERFECT}, tmp_path)
    again, accuracy = load_judge(tmp_path)
    photos = [photo.resize((SIZE, SIZE)) for photo in subject_photos("robot", 0)]
    assert again.verdicts(photos) == judge.verdicts(photos)
    assert accuracy == {"true": PERFECT}


def test_a_judge_of_another_world_is_refused(tmp_path: Path) -> None:
    save_judge(Judge(), {"true": PERFECT}, tmp_path)
    card = json.loads((tmp_path / "judge.json").read_text())
    card["labels"]["noun"].append("unicorn")
    (tmp_path / "judge.json").write_text(json.dumps(card))
    with pytest.raises(RuntimeError, match="--stage judge"):
        load_judge(tmp_path)


def test_the_names_are_those_of_the_world_and_nothing() -> None:
    assert {"noun": (*NOUNS, NOTHING), "place": PLACES, "style": STYLES} == LABELS


def test_a_lesson_is_a_function_of_seed_and_index(discs: Sprites) -> None:
    for index in range(8):
        image, shown = lesson(discs, 3, index)
        again, _ = lesson(discs, 3, index)
        assert image.tobytes() == again.tobytes()
        assert (image.size, shown) == ((SIZE, SIZE), lesson_facts(3, index))


def test_a_part_of_the_lessons_show_nothing_at_places_that_stay() -> None:
    shown = [(lesson_facts(3, index), facts(3, index)) for index in range(2000)]
    spoiled = [one for one, _ in shown if one.noun == NOTHING]
    assert len(spoiled) / len(shown) == pytest.approx(SPOILED_RATE, abs=0.03)
    assert all(one.noun in (NOTHING, true.noun) for one, true in shown)
    assert all((one.place, one.style) == (true.place, true.style) for one, true in shown)


def test_a_warped_drawing_keeps_its_colours_and_edges(discs: Sprites) -> None:
    disc = discs.images["dog", "3d"]
    spoiled = warped(disc, 0.2, random.Random(0))
    assert warped(disc, 0.2, random.Random(0)).tobytes() == spoiled.tobytes()
    assert spoiled.tobytes() != warped(disc, 0.0, random.Random(0)).tobytes()
    assert spoiled.size == disc.size
    assert {colour for _, colour in spoiled.getcolors(9999) or [] if colour[3] == 255} == {(0, 200, 120, 255)}


@shipped
def test_the_shipped_judge_is_right_on_at_least_95_percent() -> None:
    _, accuracy = load_judge()
    assert min(accuracy["true"].noun, accuracy["true"].place) >= 0.95
    assert accuracy["spoiled"].noun >= 0.9


@shipped
def test_the_shipped_judge_fits_the_repository() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES
    assert {path.suffix for path in FOLDER.iterdir()} == {".json", ".safetensors"}
