"""SDXL is drawn as stock diffusers draws it, and trained on what its rows truly are."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from numpy.typing import NDArray

from training.conditioning import encode_text
from training.draw import Drawer
from training.pipeline import load_text_encoder, load_tokenizer, open_base, token_ids, unsaid_ids
from training.request import DrawRequest

PROMPT = "a photo of a zwx dog on the beach"


def stock(folder: Path) -> Any:
    """Stock diffusers with DDIM."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe: Any, seeds: tuple[int, ...], **call: Any) -> NDArray[np.uint8]:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    images: NDArray[np.float32] = pipe(
        [PROMPT] * len(seeds), generator=generators, output_type="np", **call
    ).images
    return (images * 255).round().astype(np.uint8)


def assert_same_picture(ours: Any, theirs: NDArray[np.uint8]) -> None:
    """At most 1/255 apart, and at most one value in a hundred: sums are taken in another order."""
    apart = np.abs(np.stack(ours).astype(int) - theirs.astype(int))
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.01
    assert theirs.std() > 5  # a picture, not a flat field


def told_nothing_otherwise(folder: Path, out: Path) -> Path:
    """The same base, whose unconditional rows are told what the empty prompt becomes."""
    shutil.copytree(folder, out)
    index = out / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
    return out


def test_what_a_base_says_of_itself_is_read_from_it(tiny_sdxl: Path, tmp_path: Path) -> None:
    base = open_base(str(tiny_sdxl))
    assert (base.kind.family, base.image_size, base.token_limit, base.prompt_ids) == ("sdxl", 16, 32, 64)
    assert base.silent and not open_base(str(told_nothing_otherwise(tiny_sdxl, tmp_path / "b"))).silent


def test_prompts_become_what_stock_diffusers_makes_of_them(tiny_sdxl: Path) -> None:
    base, prompts = open_base(str(tiny_sdxl)), [PROMPT, ""]
    theirs, zeros, pooled, zeros_pooled = stock(tiny_sdxl).encode_prompt(prompts, device="cpu")
    encoder, tokenizer = load_text_encoder(base), load_tokenizer(base)
    ours = encode_text(encoder, token_ids(tokenizer, prompts, base.token_limit))
    assert ours.pooled is not None
    assert torch.equal(ours.text, theirs) and torch.equal(ours.pooled, pooled)
    unsaid = encode_text(encoder, unsaid_ids(base, tokenizer).repeat(2, 1))
    assert unsaid.pooled is not None
    assert torch.equal(unsaid.text, zeros) and torch.equal(unsaid.pooled, zeros_pooled)


@pytest.mark.parametrize(
    ("guidance", "negative", "zeros"),
    [(5.0, "", True), (5.0, "snow", True), (1.0, "", True), (5.0, "", False)],
)
def test_the_pristine_base_draws_what_stock_diffusers_draws(
    guidance: float, negative: str, zeros: bool, tiny_sdxl: Path, tmp_path: Path
) -> None:
    folder = tiny_sdxl if zeros else told_nothing_otherwise(tiny_sdxl, tmp_path / "base")
    drawer = Drawer(open_base(str(folder)), device="cpu")
    ours = drawer.draw([DrawRequest(PROMPT, s, negative, steps=6, guidance=guidance) for s in (7, 8)])
    call: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": guidance}
    if negative:
        call["negative_prompt"] = [negative] * 2
    assert_same_picture(ours, stock_images(stock(folder), (7, 8), **call))


def test_the_size_of_an_image_is_told(tiny_sdxl: Path) -> None:
    asked = DrawRequest(PROMPT, 7, steps=4, guidance=5.0, height=24, width=16)
    ours = Drawer(open_base(str(tiny_sdxl)), device="cpu").draw([asked])
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 24, "width": 16}
    assert_same_picture(ours, stock_images(stock(tiny_sdxl), (7,), **call))
    other = stock_images(stock(tiny_sdxl), (7,), **call, original_size=(16, 16))
    assert np.abs(other.astype(int) - np.stack(ours).astype(int)).max() > 1
