"""A run made ready: what the user got wrong is found here, and what decides the weights is known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from cluster.storage import Storage
from orchestrator.prepare import Prepared, prepare
from orchestrator.spec import load_run


@pytest.fixture
def prepared(tmp_path: Path, tiny_base: Path, storage: Storage) -> Callable[..., Prepared]:
    """Prepares a run of three photos on the tiny base, with `--set` assignments."""
    folder = tmp_path / "rex"
    folder.mkdir()
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{seed}.png")

    def make(*sets: str) -> Prepared:
        subject = {"name": "rex", "class": "dog", "images": [str(folder)]}
        flags = {"subject": subject, "base": {"model": str(tiny_base)}}
        return prepare(load_run(None, flags, ["checkpoint.every=50", *sets]), storage)

    return make


def test_a_photo_is_left_to_train(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(UserError, match=r"there are 3: 0\.png, 1\.png, 2\.png\. set it to at most 2"):
        prepared("data.holdout=3")
    assert prepared("data.holdout=2").photo_names == ["0.png", "1.png", "2.png"]


def test_the_sample_grid_has_its_prompts_after_the_empty_one(prepared: Callable[..., Prepared]) -> None:
    run = prepared("validate.prompts=['{subject} in snow', 'a cat']")
    assert len(run.sample_ids) == 3
    assert len({len(ids) for ids in run.sample_ids}) == 1 and run.sample_ids[0] != run.sample_ids[2]
    assert prepared("validate.prompts=[]").sample_ids == []


def test_what_decides_the_best_checkpoint_decides_the_weights_when_it_is_published(
    prepared: Callable[..., Prepared],
) -> None:
    watched = ["validate.samples=4", "validate.num_images=3", "checkpoint.every=60"]
    assert prepared().fingerprint == prepared(*watched).fingerprint
    best = prepared("train.load_best_at_end=true").fingerprint
    assert best != prepared("train.load_best_at_end=true", "checkpoint.every=60").fingerprint
    assert best != prepared("train.load_best_at_end=true", "validate.samples=4").fingerprint
    assert best == prepared("train.load_best_at_end=true", "validate.num_images=3").fingerprint
