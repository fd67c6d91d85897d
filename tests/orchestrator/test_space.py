"""What a study may try: what is refused, what is drawn, and what a recipe is called."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import UserError
from cluster.storage import Storage
from orchestrator.recipes import read_recipe, recipe_path
from orchestrator.space import (
    Choice,
    Range,
    draw,
    every,
    including,
    key_of,
    parse_space,
    read_space,
    sections,
    values_at,
)

RAW: dict[str, Any] = {
    "train": {"lr": {"low": "1e-4", "high": 1e-2, "log": True}, "lora": {"rank": [4, 8]}},
    "prior.weight": {"low": 0, "high": 2},
}


def test_sections_and_dotted_keys_are_one_space_and_numbers_may_be_written_as_yaml_reads_them(
    tmp_path: Path,
) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(RAW))
    assert (
        read_space(file)
        == parse_space(RAW)
        == {
            "train.lr": Range(1e-4, 1e-2, log=True),
            "train.lora.rank": Choice((4, 8)),
            "prior.weight": Range(0, 2),
        }
    )


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ({}, "the space is empty"),
        ({"train.steps": [100, 200]}, "train.steps cannot be in the space"),
        ({"prior.num_images": [8, 16]}, "prior.num_images cannot be in the space"),
        ({"data": {"flip": [True, False]}}, "data.flip cannot be in the space"),
        ({"train.lr": 0.1}, "train.lr of the space cannot be used"),
        ({"train.lr": []}, "train.lr of the space cannot be used"),
        ({"train.lr": {"low": 2, "high": 1}}, "train.lr of the space cannot be used"),
        ({"train.lr": {"low": 0, "high": 1, "log": True}}, "train.lr of the space cannot be used"),
        ({"train.lr": {"low": 1, "high": 2, "step": 1}}, "train.lr of the space cannot be used"),
    ],
)
def test_what_cannot_be_varied_is_refused_with_what_can(raw: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_space(raw)
    assert refused.value.what == what and refused.value.do


def test_random_recipes_are_the_same_for_a_seed_and_more_of_them_begin_with_the_fewer() -> None:
    space = parse_space(RAW)
    assert draw(space, 4, 1) == draw(space, 9, 1)[:4] != draw(space, 4, 2)
    found = draw(space, 200, 0)
    assert all(1e-4 <= one["train.lr"] <= 1e-2 and one["train.lora.rank"] in (4, 8) for one in found)
    assert 70 < sum(one["train.lr"] < 1e-3 for one in found) < 130  # by ratio, half are below the middle


def test_a_grid_has_every_combination_with_both_ends_of_ranges() -> None:
    found = every(parse_space(RAW))
    assert len(found) == 3 * 2 * 3 == len({key_of(one) for one in found})
    assert {one["train.lr"] for one in found} == {1e-4, 1e-3, 1e-2}
    assert Range(1, 4, whole=True).at(0.5) == 2 and Range(1, 9, log=True).at(0.5) == 3


def test_a_space_is_widened_to_hold_the_recipe_that_others_are_compared_with() -> None:
    wider = including(parse_space(RAW), {"train.lr": 0.05, "train.lora.rank": 32, "prior.weight": 1.0})
    assert wider["train.lr"] == Range(1e-4, 0.05, log=True)
    assert wider["train.lora.rank"] == Choice((32, 4, 8)) and wider["prior.weight"] == Range(0, 2)


def test_a_recipe_is_called_the_same_in_any_order_and_goes_back_into_sections() -> None:
    values = {"train.lr": 0.001, "train.lora.rank": 8}
    assert key_of(values) == key_of(dict(reversed(values.items()))) != key_of({**values, "train.lr": 0.002})
    nested = sections({**values, "prior.weight": 1})
    assert nested == {"train": {"lr": 0.001, "lora": {"rank": 8}}, "prior": {"weight": 1}}
    assert values_at(nested, parse_space(RAW)) == {"train.lr": 0.001, "train.lora.rank": 8, "prior.weight": 1}


def test_a_recipe_is_read_by_name_or_as_a_file_and_an_unknown_one_names_the_nearest(
    storage: Storage, tmp_path: Path
) -> None:
    storage.write(recipe_path("night"), b"train: {lr: 0.001}")
    file = tmp_path / "own.yaml"
    file.write_text("train: {lr: 0.002}")
    assert read_recipe("night", storage.uri) == {"train": {"lr": 0.001}}
    assert read_recipe(str(file), storage.uri) == {"train": {"lr": 0.002}}
    with pytest.raises(UserError) as refused:
        read_recipe("nigt", storage.uri)
    assert refused.value.what == "there is no recipe nigt" and "night" in refused.value.do
    file.write_text("subject: {name: rex}")
    with pytest.raises(UserError, match="it names a subject"):
        read_recipe(str(file), storage.uri)
