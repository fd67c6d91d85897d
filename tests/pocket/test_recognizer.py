"""Tests of the recognizer: where it parts two sets, and that it knows the demo subject from other backpacks."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from pocket.clip import FOLDER, load_clip
from pocket.export import WEIGHTS
from pocket.recognizer import find_sitter, fit_recognizer, parting


@pytest.mark.parametrize(
    ("above", "below", "low", "high"),
    [
        ([3.0, 4.0], [1.0, 2.0], 2.0, 3.0),  # a gap: somewhere in it
        ([2.0, 3.0, 4.0], [0.0, 1.0, 2.5], 1.0, 2.0),  # one mistake on either side is the same
        ([1.0, 1.0], [0.0], 0.0, 1.0),
    ],
)
def test_the_threshold_makes_the_fewest_mistakes(
    above: list[float], below: list[float], low: float, high: float
) -> None:
    assert low <= parting(torch.tensor(above), torch.tensor(below)) <= high


@pytest.mark.parametrize(
    ("name", "noun", "folder"), [("pippin", "backpack", "pippin"), ("cup:4", "cup", "cup4")]
)
def test_a_sitter_is_found_with_its_photos(tmp_path: Path, name: str, noun: str, folder: str) -> None:
    sitter = find_sitter(name, tmp_path)
    assert (sitter.noun, sitter.photos) == (noun, tmp_path / folder)
    assert len(list(sitter.photos.glob("*.png"))) >= 4


@pytest.mark.skipif(
    not (FOLDER / "config.json").exists(), reason="no CLIP here: python -m pocket.pretrain makes it"
)
def test_the_demo_subject_is_known_from_other_backpacks(tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", local_files_only=True).eval()
    recognizer = fit_recognizer(find_sitter("pippin", tmp_path), [], load_clip()[0], vae)
    assert recognizer.own_recognised >= 0.95
    assert recognizer.others_mistaken <= 0.05
