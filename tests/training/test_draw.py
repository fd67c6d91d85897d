"""Rows are drawn as stock diffusers draws them, and each as if it were alone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from cluster.errors import UserError
from training.draw import Drawer
from training.pipeline import open_base
from training.recipe import Run
from training.request import DrawRequest

PROMPT = "a photo of a zwx dog on the beach"
MIXED = [
    DrawRequest(PROMPT, 7, steps=6),
    DrawRequest("a red clock", 8, steps=4, guidance=3.0, sampler="dpm++2m"),
    DrawRequest(PROMPT, 9, "snow", steps=5, eta=1.0),
    DrawRequest("a cat", 10, steps=6, guidance=1.0),
    DrawRequest("a green fox", 11, steps=3, sampler="euler"),
    DrawRequest("a blue owl", 12, steps=4, guidance=1.0, sampler="dpm++2m"),
    DrawRequest("a photo", 13, steps=6, guidance=12.0),
]


def run_of(base: Path, **train: Any) -> Run:
    return Run.model_validate(
        {
            "base": {"model": str(base)},
            "subject": {"name": "rex", "class": "dog", "images": ["photos"]},
            "train": train,
        }
    )


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["tiny_base", "tiny_base_v"])
def test_the_pristine_base_draws_what_stock_diffusers_draws(
    prediction: str,
    eta: float,
    request: pytest.FixtureRequest,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
) -> None:
    folder: Path = request.getfixturevalue(prediction)
    drawer = Drawer(open_base(str(folder)), device="cpu")
    ours = drawer.draw([DrawRequest(PROMPT, s, "snow", steps=8, guidance=5.0, eta=eta) for s in (7, 8)])
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    call: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 5.0, "eta": eta}
    assert_same_picture(ours, stock_images(pipe, PROMPT, [7, 8], negative_prompt=["snow"] * 2, **call))


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("dpm++2m", DPMSolverMultistepScheduler),
        ("euler", EulerDiscreteScheduler),
        ("euler-a", EulerAncestralDiscreteScheduler),
        ("plms", PNDMScheduler),
        ("unipc", UniPCMultistepScheduler),
        ("ddpm", DDPMScheduler),
        ("lcm", LCMScheduler),
    ],
)
def test_other_samplers_draw_what_stock_diffusers_draws(
    tiny_base: Path,
    sampler: Any,
    scheduler: Any,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
) -> None:
    ours = Drawer(open_base(str(tiny_base)), device="cpu").draw(
        [DrawRequest(PROMPT, 7, steps=8, guidance=5.0, sampler=sampler)]
    )
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    multistep = {"skip_prk_steps": True} if sampler == "plms" else {}  # as in every base that comes with it
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **multistep)
    assert_same_picture(ours, stock_images(pipe, PROMPT, [7], num_inference_steps=8, guidance_scale=5.0))


@pytest.mark.parametrize("train_text", [False, True])
def test_stock_diffusers_draws_our_image_with_a_lora_artifact(
    tiny_base: Path,
    tmp_path: Path,
    train_text: bool,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
    write_artifact: Callable[..., None],
) -> None:
    base = open_base(str(tiny_base))
    lora, text = {"rank": 4, "alpha": 2.0}, {"train": train_text}
    write_artifact(base, run_of(tiny_base, method="lora", lora=lora, text_encoder=text), tmp_path)
    request = DrawRequest(PROMPT, 7, steps=8, guidance=5.0)
    ours = Drawer(base, tmp_path, device="cpu").draw([request])
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.load_lora_weights(tmp_path)
    assert_same_picture(ours, stock_images(pipe, PROMPT, [7], num_inference_steps=8, guidance_scale=5.0))
    before = Drawer(base, device="cpu").draw([request])
    assert np.abs(ours[0].astype(int) - before[0].astype(int)).mean() > 5  # the adapter is at work


def test_stock_diffusers_draws_our_image_with_a_full_artifact(
    tiny_base: Path,
    tmp_path: Path,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
    write_artifact: Callable[..., None],
) -> None:
    base = open_base(str(tiny_base))
    write_artifact(base, run_of(tiny_base, method="full"), tmp_path)
    request = DrawRequest(PROMPT, 7, steps=8, guidance=5.0)
    ours = Drawer(base, tmp_path, device="cpu").draw([request])
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert_same_picture(ours, stock_images(pipe, PROMPT, [7], num_inference_steps=8, guidance_scale=5.0))
    before = Drawer(base, device="cpu").draw([request])
    assert np.abs(ours[0].astype(int) - before[0].astype(int)).mean() > 5


def test_a_base_stored_in_half_precision_is_trained_and_published_in_full(
    tiny_base: Path,
    tmp_path: Path,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
    write_artifact: Callable[..., None],
) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_base, half)
    for file in half.rglob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    config = half / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"float16"'))
    base = open_base(str(half))
    write_artifact(base, run_of(half, method="full"), tmp_path / "artifact")
    ours = Drawer(base, tmp_path / "artifact", device="cpu").draw([DrawRequest(PROMPT, 7, steps=8)])
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "artifact")
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    assert_same_picture(ours, stock_images(pipe, PROMPT, [7], num_inference_steps=8, guidance_scale=7.5))


def test_a_rows_bits_depend_neither_on_neighbours_nor_on_position(tiny_base: Path) -> None:
    drawer = Drawer(open_base(str(tiny_base)), device="cpu", width=8)
    alone = [drawer.draw([r])[0] for r in MIXED]
    together, backwards = drawer.draw(MIXED), drawer.draw(MIXED[::-1])[::-1]
    for one, among, other in zip(alone, together, backwards, strict=True):
        assert np.array_equal(one, among)
        assert np.array_equal(one, other)


def test_latents_are_equal_to_the_bit_at_any_position(tiny_base: Path) -> None:
    drawer = Drawer(open_base(str(tiny_base)), device="cpu", width=8)
    decoded: list[bytes] = []
    drawer.studio.vae.decoder.register_forward_pre_hook(
        lambda _, inputs: decoded.append(inputs[0].numpy().tobytes())
    )
    guided = [r for r in MIXED if r.guidance != 1.0][:4]
    for requests in (*([r] for r in guided), guided, guided[::-1]):
        drawer.draw(requests)
    # each is decoded when it is done, which is not in their order
    assert sorted(decoded[:4]) == sorted(decoded[4:8]) == sorted(decoded[8:])


def test_every_forward_has_the_same_rows_and_an_image_takes_two_with_guidance_and_one_without(
    tiny_base: Path,
) -> None:
    drawer = Drawer(open_base(str(tiny_base)), device="cpu", width=4)
    rows: list[int] = []
    drawer.studio.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    drawer.draw([DrawRequest("a dog", s, steps=3, guidance=1.0) for s in range(4)])
    assert rows == [4] * 3
    rows.clear()
    drawer.draw([DrawRequest("a dog", s, steps=3, guidance=4.0) for s in range(4)])
    assert rows == [4] * 6
    rows.clear()
    drawer.draw([DrawRequest("a dog", s, steps=3, guidance=g) for s, g in ((1, 4.0), (2, 1.0), (3, 1.0))])
    assert rows == [4] * 3


def test_progress_counts_steps_to_the_end(tiny_base: Path) -> None:
    seen: list[tuple[int, int]] = []
    Drawer(open_base(str(tiny_base)), device="cpu", width=4).draw(
        [DrawRequest("a dog", s, steps=s) for s in (1, 3, 2)], lambda *at: seen.append(at)
    )
    assert seen == [(2, 6), (4, 6), (6, 6)]


def test_an_artifact_of_another_base_is_refused(tiny_base: Path) -> None:
    manifest = {"base": {"model": "other", "revision": "0" * 16}}
    with pytest.raises(UserError, match="another base"):
        Drawer(open_base(str(tiny_base)), tiny_base, manifest)
