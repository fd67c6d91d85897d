"""Rows of many subjects share a forward pass, and each comes out as if it were alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import nn

from cluster.errors import SystemFailure, UserError
from training.artifact import write_weights
from training.lora import attach
from training.outfit import PLAIN, Outfit
from training.pipeline import load_text_encoder, load_unet, open_base
from training.recipe import Run
from training.request import DrawRequest
from training.studio import Row, Studio

PROMPT = "a photo of a zwx dog on the beach"


def write(base: Path, folder: Path, seed: int, **train: Any) -> Path:
    """An artifact as if trained: weights moved far enough that the picture changes."""
    run = Run.model_validate(
        {
            "base": {"model": str(base)},
            "subject": {"name": "rex", "class": "dog", "images": ["photos"]},
            "train": train,
        }
    )
    info = open_base(str(base))
    unet, text_encoder = load_unet(info), load_text_encoder(info)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if run.train.method == "lora":
            attach(unet, text_encoder, run.train.lora, run.train.text_encoder.train, seed)
            for p in (p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad):
                nn.init.normal_(p, std=0.3)
        else:
            for p in (*unet.parameters(), *text_encoder.parameters()):
                p.data.add_(torch.randn_like(p), alpha=0.02)
    write_weights(info, run, unet, text_encoder, folder)
    return folder


@pytest.fixture(scope="module")
def artifacts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts that differ in rank, in what they adapt, and in method."""
    root = tmp_path_factory.mktemp("artifacts")
    kinds: dict[str, dict[str, Any]] = {
        "small": {"method": "lora", "lora": {"rank": 2, "alpha": 4.0}},
        "large": {"method": "lora", "lora": {"rank": 20, "alpha": 5.0}},  # two chunks
        "text": {"method": "lora", "lora": {"rank": 4}, "text_encoder": {"train": True}},
        "conv": {"method": "lora", "lora": {"rank": 4, "targets": ["to_q", "conv1"]}},
        "full": {"method": "full"},
        "dora": {"method": "lora", "lora": {"rank": 4, "targets": ["to_q", "conv1"], "dora": True}},
    }
    return {
        name: write(tiny_base, root / name, seed, **train) for seed, (name, train) in enumerate(kinds.items())
    }


@pytest.fixture
def studio(tiny_base: Path) -> Studio:
    return Studio(open_base(str(tiny_base)), "cpu")


def outfits(studio: Studio, artifacts: dict[str, Path]) -> dict[str, Outfit]:
    return {"base": PLAIN} | {name: studio.read(folder, None) for name, folder in artifacts.items()}


def drawn(studio: Studio, *rows: Row) -> list[torch.Tensor]:
    """The latents of rows that take all of their steps together."""
    while left := [row for row in rows if not row.done]:
        studio.step(left)
    return [row.x.clone() for row in rows]


MIXED: list[tuple[str, DrawRequest]] = [
    ("small", DrawRequest(PROMPT, 7, steps=5)),
    ("large", DrawRequest(PROMPT, 8, "snow", steps=3, guidance=3.0, sampler="euler")),
    ("base", DrawRequest("a red clock", 9, steps=4, guidance=1.0)),
    ("text", DrawRequest(PROMPT, 10, steps=6, guidance=2.0, sampler="dpm++2m")),
    ("small", DrawRequest("a cat", 11, steps=4, guidance=1.0, eta=1.0)),
]
# a second batch: those that remember most, and those that draw noise
REMEMBERING: list[tuple[str, DrawRequest]] = [
    ("small", DrawRequest(PROMPT, 7, steps=5, guidance=1.0, sampler="plms")),
    ("large", DrawRequest(PROMPT, 8, "snow", steps=5, guidance=3.0, sampler="unipc")),
    ("base", DrawRequest("a red clock", 9, steps=4, guidance=1.0, sampler="ddpm")),
    ("base", DrawRequest("a cat", 10, steps=3, guidance=1.0, sampler="lcm")),
    ("text", DrawRequest(PROMPT, 11, steps=6, guidance=1.0, sampler="euler-a")),
    ("small", DrawRequest(PROMPT, 12, steps=4, guidance=2.0)),
]


@pytest.mark.parametrize("asked", [MIXED, REMEMBERING], ids=["mixed", "remembering"])
def test_a_rows_bits_depend_neither_on_its_neighbours_nor_on_when_it_joined(
    studio: Studio, artifacts: dict[str, Path], asked: list[tuple[str, DrawRequest]]
) -> None:
    wear = outfits(studio, artifacts)
    alone = [drawn(studio, studio.row(request, wear[name]))[0] for name, request in asked]
    together = drawn(studio, *(studio.row(request, wear[name]) for name, request in asked))
    late = [studio.row(request, wear[name]) for name, request in asked]
    for start in range(len(late)):  # one more joins at every step, from the last to the first
        studio.step([row for row in late[-1 - start :] if not row.done])
    for one, among, other in zip(alone, together, drawn(studio, *late), strict=True):
        assert torch.equal(one, among)
        assert torch.equal(one, other)


def test_a_rank_that_another_subject_brought_changes_no_bits(
    tiny_base: Path, artifacts: dict[str, Path]
) -> None:
    fresh = Studio(open_base(str(tiny_base)), "cpu")
    request = DrawRequest(PROMPT, 7, steps=3)
    [before] = drawn(fresh, fresh.row(request, fresh.read(artifacts["small"], None)))
    drawn(fresh, fresh.row(request, fresh.read(artifacts["large"], None)))
    [after] = drawn(fresh, fresh.row(request, fresh.read(artifacts["small"], None)))
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["small", "large", "text", "conv", "full", "dora"])
def test_a_row_among_others_is_stock_diffusers_image(
    studio: Studio, artifacts: dict[str, Path], tiny_base: Path, name: str
) -> None:
    wear = outfits(studio, artifacts)
    request = DrawRequest(PROMPT, 7, steps=8, guidance=5.0)
    others = [] if wear[name].weights else [studio.row(r, wear[n]) for n, r in MIXED[:2]]
    latents = drawn(studio, studio.row(request, wear[name]), *others)[0]
    ours = studio.pixels(latents).astype(int)
    if name == "full":
        pipe = StableDiffusionPipeline.from_pretrained(artifacts[name])
    else:
        pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
        pipe.load_lora_weights(artifacts[name])
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(7)
    [image] = pipe(
        PROMPT, generator=generator, num_inference_steps=8, guidance_scale=5.0, output_type="np"
    ).images
    apart = np.abs(ours - (image * 255).round().astype(int))
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.01
    assert ours.std() > 5
    plain = studio.pixels(drawn(studio, studio.row(request, PLAIN))[0]).astype(int)
    assert np.abs(ours - plain).mean() > 3  # the artifact is at work


def test_the_base_is_as_it_was_after_whole_weights_were_worn(
    studio: Studio, artifacts: dict[str, Path]
) -> None:
    request = DrawRequest(PROMPT, 7, steps=3)
    [before] = drawn(studio, studio.row(request, PLAIN))
    full = studio.read(artifacts["full"], None)
    [other] = drawn(studio, studio.row(request, full))
    [after] = drawn(studio, studio.row(request, PLAIN))
    [again] = drawn(studio, studio.row(request, studio.read(artifacts["full"], None)))
    assert torch.equal(before, after) and torch.equal(other, again) and not torch.equal(before, other)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++2m"])
def test_across_widths_an_image_differs_by_less_than_one_step_of_a_pixel(
    tiny_base: Path, sampler: Any
) -> None:
    request = DrawRequest(PROMPT, 7, steps=8, guidance=5.0, sampler=sampler)
    images = []
    for width in (2, 8, 16):
        studio = Studio(open_base(str(tiny_base)), "cpu", width)
        images.append(studio.pixels(drawn(studio, studio.row(request, PLAIN))[0]).astype(int))
    assert max(int(np.abs(image - images[0]).max()) for image in images) <= 1


def test_passes_that_need_not_be_exact_are_as_narrow_as_their_rows(
    tiny_base: Path, artifacts: dict[str, Path]
) -> None:
    base = open_base(str(tiny_base))
    exact, narrow, two = Studio(base, "cpu"), Studio(base, "cpu", exact=False), Studio(base, "cpu", 2)
    request = DrawRequest(PROMPT, 7, steps=5, guidance=5.0)

    def alone(studio: Studio) -> torch.Tensor:
        return drawn(studio, studio.row(request, studio.read(artifacts["small"], None)))[0]

    assert torch.equal(alone(narrow), alone(two)) and not torch.equal(alone(narrow), alone(exact))
    together = [
        drawn(studio, *(studio.row(r, wear[name]) for name, r in MIXED))
        for studio in (exact, narrow)
        for wear in [outfits(studio, artifacts)]
    ]
    for a, b in zip(*together, strict=True):  # rows leave, and the passes become narrower
        assert np.abs(exact.pixels(a).astype(int) - exact.pixels(b).astype(int)).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(32, 16), (16, 32), (48, 48)])
def test_other_sizes_are_drawn_as_stock_diffusers_draws_them(
    studio: Studio, tiny_base: Path, height: int, width: int
) -> None:
    request = DrawRequest(PROMPT, 7, steps=4, guidance=5.0, height=height, width=width)
    ours = studio.pixels(drawn(studio, studio.row(request, PLAIN))[0]).astype(int)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.set_progress_bar_config(disable=True)
    [image] = pipe(
        PROMPT,
        height=height,
        width=width,
        generator=torch.Generator("cpu").manual_seed(7),
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="np",
    ).images
    assert ours.shape == (height, width, 3)
    assert np.abs(ours - (image * 255).round().astype(int)).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 0), (128, 16)])
def test_a_size_that_cannot_be_had_is_refused(studio: Studio, height: int, width: int) -> None:
    with pytest.raises(UserError, match="cannot be drawn"):
        studio.row(DrawRequest(PROMPT, 7, height=height, width=width), PLAIN)


def test_an_adapter_of_another_model_is_refused(studio: Studio, tmp_path: Path, tiny_base: Path) -> None:
    folder = write(tiny_base, tmp_path, 1, method="lora", lora={"rank": 2})
    studio.models = {**studio.models, "unet": nn.ModuleDict({"to_q": nn.Linear(8, 8)})}
    with pytest.raises(SystemFailure, match="does not fit the base"):
        studio.read(folder, None)
