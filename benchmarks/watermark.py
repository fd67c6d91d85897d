"""This file is where it is measured what the watermark costs, what it survives, and how often it is seen amiss.

`python -m benchmarks.watermark FOLDER`, with a folder of photos: each is cut square, scaled and marked, then attacked
and read; then random parts of the unmarked photos, half of them compressed, are read.
"""

import argparse
import hashlib
import io
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from serving.watermark import embed, read
from training.png import Pixels


def _compressed(pixels: Pixels, quality: int, kind: str = "JPEG") -> Pixels:
    stream = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(stream, kind, quality=quality)
    return np.array(Image.open(stream).convert("RGB"))


def _resized(pixels: Pixels, by: float) -> Pixels:
    size = (int(pixels.shape[1] * by), int(pixels.shape[0] * by))
    return np.array(Image.fromarray(pixels, "RGB").resize(size, Image.Resampling.LANCZOS))


ATTACKS: dict[str, Callable[[Pixels], Pixels]] = {
    "PNG": lambda p: p,
    "JPEG 80": lambda p: _compressed(p, 80),
    "JPEG 60": lambda p: _compressed(p, 60),
    "WebP 80": lambda p: _compressed(p, 80, "WEBP"),
    "x 0.75": lambda p: _resized(p, 0.75),
    "x 0.75, JPEG 80": lambda p: _compressed(_resized(p, 0.75), 80),
    "x 0.5": lambda p: _resized(p, 0.5),
    "x 2": lambda p: _resized(p, 2.0),
    "contrast 0.9": lambda p: (p * 0.9 + 10).astype(np.uint8),
    "crop 95 %": lambda p: p[: int(len(p) * 0.95), : int(len(p) * 0.95)].copy(),
}


def _square(image: Image.Image, side: int) -> Pixels:
    short = min(image.size)
    return np.array(image.crop((0, 0, short, short)).resize((side, side), Image.Resampling.LANCZOS))


def _survival(photos: list[Image.Image], side: int) -> None:
    found, psnr, cpu_s = dict.fromkeys(ATTACKS, 0), [], 0.0
    for number, photo in enumerate(photos):
        pixels, identity = _square(photo, side), hashlib.sha256(f"{number}".encode()).hexdigest()
        began = time.process_time()
        marked = embed(pixels, identity)
        cpu_s += time.process_time() - began
        assert marked is not None
        psnr.append(10 * np.log10(255**2 / ((marked.astype(float) - pixels) ** 2).mean()))
        for name, attack in ATTACKS.items():
            mark = read(attack(marked))
            found[name] += mark is not None and identity.startswith(mark.tag)
    ms = 1000 * cpu_s / len(photos)
    print(
        f"{side} px: PSNR {np.mean(psnr):.1f} dB, least {min(psnr):.1f}; {ms:.0f} ms of CPU; read of {len(photos)}:"
    )
    print("  " + ", ".join(f"{name} {count}" for name, count in found.items()), flush=True)


def _false_marks(photos: list[Image.Image], count: int) -> None:
    chance, wrong = random.Random(0), 0
    for _ in range(count):
        photo, side = chance.choice(photos), chance.choice((64, 128, 256, 512))
        part = chance.randint(64, min(photo.size))
        left, top = chance.randint(0, photo.width - part), chance.randint(0, photo.height - part)
        pixels = np.array(photo.crop((left, top, left + part, top + part)).resize((side, side)))
        if chance.random() < 0.5:
            pixels = _compressed(pixels, chance.randint(40, 95))
        wrong += read(pixels) is not None
    print(f"unmarked: {wrong} of {count} called marked", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unmarked", type=int, default=2000, help="parts of photos that are read unmarked")
    options = parser.parse_args()
    files = sorted(p for p in options.folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    photos = [Image.open(file).convert("RGB") for file in files]
    random.Random(0).shuffle(photos)
    for side, count in ((64, 116), (128, 116), (256, 60), (512, 30), (1024, 10)):
        _survival(photos[:count], side)
    _false_marks(photos, options.unmarked)


if __name__ == "__main__":
    main()
