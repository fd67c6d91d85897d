"""Tests of the album: rendered once, every second picture redrawn, variations that keep what is shown."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pocket.album import load_album, varied
from pocket.export import WEIGHTS

GRAY = (120, 130, 140)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(WEIGHTS / "vae", local_files_only=True).eval()


def test_an_album_is_rendered_once_and_anew_for_another_count(tmp_path: Path, vae: AutoencoderKL) -> None:
    rendered: list[int] = []

    def render(index: int) -> Image.Image:
        rendered.append(index)
        return Image.new("RGB", (64, 64), GRAY)

    path = tmp_path / "album.safetensors"
    first = load_album(render, vae, path, 4, threads=1)
    assert torch.equal(load_album(render, vae, path, 4, threads=1), first)
    assert rendered == [0, 1, 2, 3]
    assert len(load_album(render, vae, path, 6, threads=1)) == 6
    assert len(rendered) == 10


def test_every_second_picture_is_redrawn(tmp_path: Path, vae: AutoencoderKL) -> None:
    pixels = load_album(
        lambda index: Image.new("RGB", (64, 64), GRAY), vae, tmp_path / "album.safetensors", 4, threads=1
    )
    plain = torch.tensor(GRAY, dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 64)
    assert [bool((picture == plain).all()) for picture in pixels] == [True, False, True, False]
    assert (pixels.float() - plain.float()).abs().mean() < 20  # redrawn, not ruined


def test_variations_are_a_function_of_the_generator_and_keep_the_colours() -> None:
    pixels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    once, again = (varied(pixels, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.shape == pixels.shape
    assert once.min() >= -1.0 and once.max() <= 1.0
    difference = once.mean(dim=(2, 3)) - (pixels.float() / 127.5 - 1.0).mean(dim=(2, 3))
    assert difference.abs().max() < 0.05
