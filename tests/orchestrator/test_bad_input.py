"""What cannot be used gets one clear message and exit code 2, and leaves nothing behind."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from orchestrator.cli import app


def photos(folder: Path, count: int = 5) -> Path:
    folder.mkdir()
    for seed in range(count):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


def no_images(folder: Path) -> None:
    for file in folder.iterdir():
        file.rename(file.with_suffix(".txt"))


def one_unreadable(folder: Path) -> None:
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])


def one_pixel(folder: Path) -> None:
    Image.new("RGB", (1, 1)).save(folder / "3.png")


def bomb(folder: Path) -> None:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (folder / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)


def html(folder: Path) -> None:
    (folder / "page.jpg").write_text("<!doctype html><title>404</title>")


def animated(folder: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moves.webp", save_all=True, append_images=frames[1:], duration=100)


def duplicate(folder: Path) -> None:
    shutil.copy(folder / "0.png", folder / "again.png")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (no_images, "no photos"),
        (one_unreadable, "2.png"),
        (one_pixel, "3.png"),
        (bomb, "4.png"),
        (html, "page.jpg"),
        (animated, "moves.webp"),
        (duplicate, "again.png"),
    ],
)
def test_a_photo_that_cannot_be_used_refuses_the_subject(
    spoil: Callable[[Path], None], named: str, tmp_path: Path, tiny_base: Path
) -> None:
    folder = photos(tmp_path / "sübject with spaces")
    spoil(folder)
    refused(tmp_path, named, str(folder), "--base", str(tiny_base))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("prior.weight=-1", "prior.weight"),
        ("train.stpes=3", "did you mean steps?"),
        ("train.method=lorra", "train.method"),
        ("train.lr=.nan", "train.lr"),
        ("subject.identifier=a1b2c3d4e5", "a1b2c3d4e5"),
        ("train.lora.targets=[nowhere]", "nowhere"),
        ('validate.prompts=["a photo of {thing}"]', "{thing}"),
        (f"prior.negative_prompt={'dog ' * 40}", "too long"),
        ("base.revision=deadbeefdeadbeef", "deadbeefdeadbeef"),
        ("train.accumulation=2", "train.pairs_per_step"),
        ("subject.name=base", "the pristine base"),
        ("subject.name=../../etc", "subject.name"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_by_name(
    setting: str, named: str, tmp_path: Path, tiny_base: Path
) -> None:
    refused(tmp_path, named, str(photos(tmp_path / "rex")), "--base", str(tiny_base), "--set", setting)


def test_a_base_without_a_unet_or_with_pickles_alone_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    folder = photos(tmp_path / "rex")
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused(tmp_path, "safetensors", str(folder), "--base", str(base))
    shutil.rmtree(base / "unet")
    refused(tmp_path, "unet", str(folder), "--base", str(base))


def test_an_unknown_key_in_a_file_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    photos(tmp_path / "rex")
    config = tmp_path / "run.yaml"
    config.write_text("subject: {name: rex, class: dog, images: ./rex}\nprior: {wieght: 2}\n")
    answer = refused(tmp_path, "prior.wieght", str(config), class_noun=None)
    assert "weight" in json.dumps(answer)


def test_a_root_that_cannot_be_written_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = photos(tmp_path / "rex")
    refused(tmp_path, "storage root", str(folder), "--base", str(tiny_base), root=tmp_path / "file" / "root")


def refused(
    tmp_path: Path, named: str, *arguments: str, root: Path | None = None, class_noun: str | None = "dog"
) -> dict[str, str]:
    """The error of a `train` that must be refused: three parts, exit code 2, no traceback, nothing left behind."""
    root = root or tmp_path / "root"
    words = [
        "train",
        *arguments,
        *(("--class", class_noun) if class_noun else ()),
        "--storage",
        str(root),
        "--json",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    answer: dict[str, str] = json.loads(result.stdout.splitlines()[-1])["error"]
    assert named in " ".join(answer.values())
    assert answer["what"]
    assert answer["do"]
    if root.exists():
        assert [path for path in root.rglob("*") if path.is_file()] == []
    return answer
