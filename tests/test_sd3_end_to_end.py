"""A tiny SD3 from photos to images, through the command line as a user would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

from cluster.storage import sha256_file
from pocket.subject import write_photos
from training.png import decode_png, png_parameters

pytestmark = pytest.mark.slow
QUICK = [
    *("--set", "prior.num_images=2", "--set", "prior.steps=2", "--set", "train.steps=4"),
    *("--set", "validate.every=2", "--set", "validate.samples=2", "--set", "validate.num_images=1"),
    *("--set", "validate.steps=2", "--set", "train.text_encoder.train=true"),
    *("--set", "train.lr=0.05", "--set", "train.text_encoder.lr=0.05"),  # to be seen after 4 steps
]


def test_stock_diffusers_draws_what_was_trained_and_generated(
    tiny_sd3: Path, tmp_path: Path, booth: Callable[..., dict[str, Any]]
) -> None:
    root, photos, out = tmp_path / "root", tmp_path / "photos", tmp_path / "out"
    write_photos(photos)
    base = ("--base", str(tiny_sd3))
    before = {file: sha256_file(file) for file in tiny_sd3.rglob("*.safetensors")}
    answer = booth(root, "train", str(photos), "--class", "dog", "--name", "rex", *base, *QUICK)
    assert answer["state"] == "succeeded" and answer["prior_images_drawn"] == 2
    assert list((root / "runs/rex/v1/samples").iterdir())
    assert before == {file: sha256_file(file) for file in tiny_sd3.rglob("*.safetensors")}
    drawn = booth(root, "generate", "rex", "{subject} in snow", "--seed", "7", "--out", str(out), "-n", "1")
    png = Path(drawn["images"][0]).read_bytes()
    assert png_parameters(png)["sampler"] == "euler"
    ours = decode_png(png).astype(int)
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 7.0, "output_type": "np"}

    def theirs() -> Any:
        generator = torch.Generator("cpu").manual_seed(7)
        words = "a zwx dog in snow"
        return (pipe(words, generator=generator, **settings).images[0] * 255).round().astype(int)

    plain = theirs()
    pipe.load_lora_weights(answer["artifact"])
    apart = np.abs(theirs() - ours)
    assert np.median(apart) <= 3  # ours has a watermark in it
    assert np.abs(plain - ours).mean() > 2 * apart.mean()
