"""`raybooth inspect` says what pictures say of themselves, `generate --c2pa` signs them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.cli_draw import generate
from serving.provenance import Provenance
from training.png import png_parameters

HASH = "0f3a9c71" + "5b" * 28


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def inspected(*arguments: str) -> dict[str, Any]:
    done = run("inspect", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """A marked PNG of 256 pixels."""
    small = np.random.default_rng(0).integers(40, 216, (6, 6, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(small, "RGB").resize((256, 256), Image.Resampling.BICUBIC))
    path = tmp_path / "marked.png"
    path.write_bytes(Provenance().png(pixels, {"seed": 7, "artifact": HASH, "base_revision": "c0ffee00"}))
    return path


def test_a_png_and_a_jpeg_made_of_it_are_told_apart_from_a_photo(marked: Path, tmp_path: Path) -> None:
    jpeg, photo = tmp_path / "shared.jpg", tmp_path / "photo.png"
    with Image.open(marked) as image:
        image.resize((192, 192)).save(jpeg, quality=80)
    Image.new("RGB", (128, 128), "red").save(photo)
    files = inspected(str(marked), str(jpeg), str(photo))["files"]
    assert [f["file"] for f in files] == [str(marked), str(jpeg), str(photo)]
    assert files[0]["parameters"]["artifact"] == HASH and files[0]["agrees"] is True
    assert [f["watermark"] and f["watermark"]["tag"] for f in files] == [HASH[:8], HASH[:8], None]
    assert [f["c2pa"] for f in files] == [None, None, None]


def test_people_read_it_too(marked: Path) -> None:
    said = run("inspect", str(marked)).stderr
    assert "seed: 7" in said
    assert f"raybooth {HASH[:8]}, as the parameters say" in said
    assert "C2PA: none" in said


def test_what_is_no_picture_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for file in ("text.png", "nowhere.png"):
        failed = run("inspect", str(tmp_path / file), "--json")
        assert failed.returncode == 2
        assert file in json.loads(failed.stdout.splitlines()[-1])["error"]["what"]


def test_generate_signs_when_asked_and_says_that_nobody_vouches(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    base, where = str(tiny_base), str(root)
    generate("base", ["a dog"], n=1, steps=2, out=out, base=base, storage=where, c2pa=True, as_json=True)
    said = capsys.readouterr()
    assert "development, which nobody trusts" in said.err
    png = Path(json.loads(said.out.splitlines()[-1])["images"][0])
    generate("base", ["a dog"], n=1, steps=2, out=tmp_path / "plain", base=base, storage=where)
    plain = (tmp_path / "plain" / png.name).read_bytes()
    assert png_parameters(png.read_bytes()) == png_parameters(plain)
    trust = root / "provenance" / "development" / "certificates.pem"
    found = inspected(str(png), "--trust", str(trust))["files"][0]["c2pa"]
    assert found["state"] == "trusted" and found["source_type"].endswith("trainedAlgorithmicMedia")


def test_credentials_without_c2pa_are_refused(tmp_path: Path) -> None:
    failed = run(
        "generate", "base", "a dog", "--c2pa-key", str(tmp_path / "k.pem"), "--storage", str(tmp_path)
    )
    assert failed.returncode == 2 and "--c2pa" in failed.stderr
