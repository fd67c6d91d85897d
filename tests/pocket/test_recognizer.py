"""Tests of the recognizer: what decides, and that it knows the demo subject from other backpacks."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from pocket.clip import FOLDER, load_clip
from pocket.export import WEIGHTS
from pocket.recognizer import Recognizer, find_sitter, fit_recognizer


def test_the_nearest_picture_decides() -> None:
    own, others = torch.eye(3)[:1], torch.eye(3)[1:]
    seen = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.0, 0.6], [0.5, 0.4, 0.3]])
    assert Recognizer(own, others).sees(seen).tolist() == [True, False, True]


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
