"""A tiny SDXL from photos to images, through the command line as a user would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from pocket.subject import write_photos

pytestmark = pytest.mark.slow
QUICK = [
    *("--set", "prior.num_images=2", "--set", "prior.steps=2", "--set", "train.steps=4"),
    *("--set", "checkpoint.every=2", "--set", "validate.every=2", "--set", "validate.samples=2"),
    *(
        "--set",
        "validate.num_images=1",
        "--set",
        "validate.steps=2",
        "--set",
        "train.text_encoder.train=true",
    ),
    *("--set", "train.lr=0.05", "--set", "train.text_encoder.lr=0.05"),  # to be seen after 4 steps
    *("--set", "train.new_tokens={count: 2, lr: 0.05}"),
]


def test_stock_diffusers_draws_what_was_trained_and_generated(
    tiny_sdxl: Path, tmp_path: Path, booth: Callable[..., dict[str, Any]]
) -> None:
    root, photos, out = tmp_path / "root", tmp_path / "photos", tmp_path / "out"
    write_photos(photos)
    base = ("--base", str(tiny_sdxl))
    answer = booth(root, "train", str(photos), "--class", "dog", "--name", "rex", *base, *QUICK)
    assert answer["state"] == "succeeded" and answer["prior_images_drawn"] == 2
    assert list((root / "runs/rex/v1/samples").iterdir())
    drawn = booth(root, "generate", "rex", "{subject} in snow", "--seed", "7", "--out", str(out), "-n", "1")
    [path] = drawn["images"]
    ours = np.asarray(Image.open(path).convert("RGB")).astype(int)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 5.0, "output_type": "np"}

    def theirs() -> Any:
        generator = torch.Generator("cpu").manual_seed(7)
        words = "a <zwx> dog in snow"
        return (pipe(words, generator=generator, **settings).images[0] * 255).round().astype(int)

    plain = theirs()
    pipe.load_lora_weights(answer["artifact"])
    rows = load_file(Path(answer["artifact"]) / "learned_embeds.safetensors")
    for key, known in (
        ("clip_l", ("text_encoder", "tokenizer")),
        ("clip_g", ("text_encoder_2", "tokenizer_2")),
    ):
        text_encoder, tokenizer = (getattr(pipe, name) for name in known)
        pipe.load_textual_inversion(rows[key], token="<zwx>", text_encoder=text_encoder, tokenizer=tokenizer)
    apart = np.abs(theirs() - ours)
    assert np.median(apart) <= 3  # ours has a watermark in it
    assert np.abs(plain - ours).mean() > 2 * apart.mean()
