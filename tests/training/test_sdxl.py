"""SDXL is drawn as stock diffusers draws it, and trained on what its rows truly are."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file
from torch import nn

from cluster.errors import UserError
from cluster.storage import Storage
from training.artifact import open_artifact
from training.bank_run import train_bank
from training.batches import Batches
from training.ceiling import memory_ceiling
from training.conditioning import encode_text, trained_parts
from training.draw import Drawer
from training.lease import Lease
from training.loop import ResidentBase, build_module
from training.lora import FILE
from training.memory import estimate
from training.objective import PairBatch
from training.outfit import PLAIN, Outfit
from training.pipeline import (
    load_text_encoder,
    load_tokenizer,
    load_unet,
    open_base,
    token_ids,
    unsaid_ids,
)
from training.recipe import Run
from training.request import DrawRequest
from training.wish import Wish

PROMPT = "a photo of a zwx dog on the beach"


def stock(folder: Path) -> Any:
    """Stock diffusers with DDIM."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


@pytest.mark.parametrize(
    ("part", "changed", "said"),
    [
        ("unet/config.json", {"projection_class_embeddings_input_dim": 24 + 5 * 8}, "no refiner"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type"),
        ("text_encoder_2/config.json", {"architectures": ["CLIPTextModel"]}, "CLIPTextModelWithProjection"),
        ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "nor an SDXL"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused(
    part: str, changed: dict[str, Any], said: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_sdxl, tmp_path / "base")
    path = tmp_path / "base" / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(UserError, match=said):
        open_base(str(tmp_path / "base"))


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
    guidance: float,
    negative: str,
    zeros: bool,
    tiny_sdxl: Path,
    tmp_path: Path,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
) -> None:
    folder = tiny_sdxl if zeros else told_nothing_otherwise(tiny_sdxl, tmp_path / "base")
    drawer = Drawer(open_base(str(folder)), device="cpu")
    ours = drawer.draw([DrawRequest(PROMPT, s, negative, steps=6, guidance=guidance) for s in (7, 8)])
    call: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": guidance}
    if negative:
        call["negative_prompt"] = [negative] * 2
    assert_same_picture(ours, stock_images(stock(folder), PROMPT, (7, 8), **call))


def test_the_size_of_an_image_is_told(
    tiny_sdxl: Path,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
) -> None:
    asked = DrawRequest(PROMPT, 7, steps=4, guidance=5.0, height=24, width=16)
    ours = Drawer(open_base(str(tiny_sdxl)), device="cpu").draw([asked])
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 24, "width": 16}
    assert_same_picture(ours, stock_images(stock(tiny_sdxl), PROMPT, (7,), **call))
    other = stock_images(stock(tiny_sdxl), PROMPT, (7,), **call, original_size=(16, 16))
    assert np.abs(other.astype(int) - np.stack(ours).astype(int)).max() > 1


# -- training ----------------------------------------------------------------------------------------------

# of three photos: height, width, top, left, and the height and width of what is trained on
WHOLE = np.asarray([16, 16, 0, 0, 16, 16], np.float32)
SIZES = np.asarray([[40, 50, 0, 2, 16, 16], [900, 600, 4, 0, 16, 16], [16, 16, 0, 0, 16, 16]], np.float32)


@pytest.fixture
def resident(tiny_sdxl: Path) -> ResidentBase:
    """The tiny SDXL, loaded; jobs and groups of these tests are of it."""
    return ResidentBase.load(str(tiny_sdxl), open_base(str(tiny_sdxl)).revision, torch.device("cpu"))


@pytest.fixture
def make_sdxl_job(
    make_job: Callable[..., Lease], resident: ResidentBase, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Lease]:
    """A job whose photos have sizes of their own, and whose captions are dropped where the recipe says so."""
    monkeypatch.setattr("training.lease.fetch", list)

    def make(name: str, **sections: Any) -> Lease:
        job = make_job(name, **sections)
        [unsaid] = unsaid_ids(resident.info, load_tokenizer(resident.info)).tolist()
        dropped = unsaid if job.recipe.train.objective.caption_dropout else ()
        return replace(job, sizes=SIZES, sample_ids=[unsaid, *job.sample_ids[1:]], empty_ids=dropped)

    return make


def textbook(base: ResidentBase, batch: PairBatch, photos: list[int], weight: float) -> Any:
    """Loss and gradients by part, of stock parts and a forward pass for the subject and one for the class."""
    unet, text_encoder = base.fresh(share=False)
    models = trained_parts(unet.requires_grad_(), text_encoder.requires_grad_())
    one, two = models["text_encoder"], models["text_encoder_2"]
    scheduler = DDPMScheduler.from_pretrained(base.info.path / "scheduler")
    terms = []
    for role in (0, 1):
        rows = [i for i, of in enumerate(batch.role.tolist()) if of == role]
        x0, noise, t = batch.latents[rows], batch.noise[rows], batch.timesteps[rows]
        ids = batch.token_ids[rows]
        said = (ids[:, :1] >= 0).float()  # a dropped caption is zeros, as in drawing
        first = one(ids[:, :32].clamp(min=0), output_hidden_states=True)
        second = two(ids[:, 32:].clamp(min=0), output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1) * said[:, :, None]
        # class images were drawn at the base's own size
        sizes = np.stack([WHOLE if role else SIZES[photos[row]] for row in rows])
        told = {"text_embeds": second.text_embeds * said, "time_ids": torch.from_numpy(sizes)}
        noisy = scheduler.add_noise(x0, noise, t)
        output = unet(noisy, t, encoder_hidden_states=text, added_cond_kwargs=told).sample
        terms.append(nn.functional.mse_loss(output, noise))
    loss = terms[0] + weight * terms[1]
    loss.backward()
    return loss.detach(), {part: [p.grad for p in model.parameters()] for part, model in models.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("train_text", [True, False])
def test_loss_and_gradients_equal_the_textbook_formula(
    train_text: bool, dropout: float, resident: ResidentBase, make_sdxl_job: Callable[..., Lease]
) -> None:
    train = {"method": "full", "pairs_per_step": 4, "text_encoder": {"train": train_text}}
    objective = {"objective": {"caption_dropout": dropout}}
    lease = make_sdxl_job("rex", train={**train, **objective}, prior={"weight": 0.7})
    module = build_module(resident, lease.recipe, lease, 0)
    batches = Batches.of(lease, resident.info, torch.device("cpu"), 0, 1)
    [batch] = batches.of_step(3)
    assert bool((batch.token_ids < 0).any()) == (dropout > 0)
    loss, *_ = module(batch)
    loss.backward()
    photos = [row.table_row for row in batches.plan.rows(3, 0, 1)]
    expected, gradients = textbook(resident, batch, photos, 0.7)
    assert torch.allclose(loss, expected, atol=1e-5)
    parts = trained_parts(module.unet, module.text_encoder) if train_text else {"unet": module.unet}
    assert ("text_encoder_2" in parts) == train_text
    for part, model in parts.items():
        ours = [p.grad for p in model.parameters()]
        assert sum(g is not None and float(g.abs().max()) > 1e-4 for g in ours) > 5
        for mine, theirs in zip(ours, gradients[part], strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.allclose(mine, theirs, atol=1e-5)


def test_gradient_checkpointing_and_bf16_compute_the_same_loss(
    resident: ResidentBase, make_sdxl_job: Callable[..., Lease]
) -> None:
    figures = []
    train = {"method": "full", "pairs_per_step": 2, "text_encoder": {"train": True}}
    for engine in ({}, {"gradient_checkpointing": True}, {"precision": "bf16"}):
        lease = make_sdxl_job("rex", train=train, engine=engine)
        module = build_module(resident, lease.recipe, lease, 0)
        [batch] = Batches.of(lease, resident.info, torch.device("cpu"), 0, 1).of_step(0)
        loss, *_ = module(batch)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        figures.append(torch.stack([loss.detach(), norm]))
    assert torch.equal(figures[0], figures[1])
    assert torch.allclose(figures[0], figures[2], rtol=0.02) and not torch.equal(figures[0], figures[2])


def test_the_class_term_of_the_base_is_told_the_same_sizes(
    resident: ResidentBase, make_sdxl_job: Callable[..., Lease]
) -> None:
    job = make_sdxl_job("rex", train={"pairs_per_step": 3}, prior={"target": "base"})
    lease = replace(job, class_latents=())
    module = build_module(resident, lease.recipe, lease, 0)
    [batch] = Batches.of(lease, resident.info, torch.device("cpu"), 0, 1).of_step(0)
    assert batch.sizes is not None  # a step sees all three photos in both roles
    assert torch.equal(batch.sizes[0::2].sort(0)[0], batch.sizes[1::2].sort(0)[0])
    _, subject, of_class = module(batch)
    # fresh adapters are nothing, so the base and what is trained of it agree
    assert float(subject) > 0.1 and float(of_class) < 1e-9


def test_the_sizes_of_a_row_matter_and_travel_with_it(
    resident: ResidentBase, make_sdxl_job: Callable[..., Lease]
) -> None:
    lease = make_sdxl_job("rex", train={"pairs_per_step": 3})
    module = build_module(resident, lease.recipe, lease, 0)
    [batch] = Batches.of(lease, resident.info, torch.device("cpu"), 0, 1).of_step(0)
    assert batch.sizes is not None
    with torch.no_grad():
        straight = module(batch)[0]
        swapped = module(replace(batch, sizes=batch.sizes.flip(0)))[0]
    assert not torch.allclose(straight, swapped, atol=1e-6)


TRAIN: dict[str, Any] = {"steps": 5, "lr": 1e-3, "pairs_per_step": 2, "lora": {"rank": 4, "alpha": 4.0}}
GRID = {"every": 4, "samples": 2, "num_images": 1, "steps": 2}


@pytest.mark.resume
@pytest.mark.parametrize(("method", "stage"), [("lora", 0), ("full", 2), ("full", 3)])
def test_a_run_that_was_left_goes_on_to_the_bits_of_one_that_stayed(
    method: str,
    stage: int,
    make_sdxl_job: Callable[..., Lease],
    alone: Callable[..., Any],
    storage: Storage,
) -> None:
    train = {**TRAIN, "method": method, "text_encoder": {"train": True, "lr": 1e-3}, "ema_decay": 0.9}
    sections = {"train": train, "validate": GRID, "engine": {"zero_stage": stage}}
    calm, hurt = (make_sdxl_job(name, **sections) for name in ("calm", "hurt"))
    whole = alone(calm)
    assert whole["metrics"] and [kind for kind, _ in whole["events"]].count("sample") == 1
    assert alone(hurt, {0: {2: Wish.LEAVE}})["metrics"] is None and alone(hurt)["metrics"] == whole["metrics"]
    calm_files, hurt_files = (artifact_bytes(storage, name) for name in ("calm", "hurt"))
    assert calm_files == hurt_files and calm_files


def artifact_bytes(storage: Storage, name: str) -> dict[str, bytes]:
    with open_artifact(storage, name, "v1") as artifact:
        files = sorted(artifact.folder.rglob("*.safetensors"))
        return {file.relative_to(artifact.folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.slow
def test_two_workers_that_shard_a_lora_have_the_losses_of_one(
    make_sdxl_job: Callable[..., Lease], alone: Callable[..., Any], pair: Any, storage: Storage
) -> None:
    train = {**TRAIN, "pairs_per_step": 3, "text_encoder": {"train": True, "lr": 1e-3}}
    watched = {"every": 2, "samples": 3, "prompts": []}
    one = alone(make_sdxl_job("one", train=train, validate=watched))
    two, _ = pair(make_sdxl_job("two", train=train, validate=watched, engine={"zero_stage": 2}))
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-5) and "validation_loss" in one["metrics"]
    assert two["events"][0] == ("started", {**two["events"][0][1], "workers": 2, "zero_stage": 2})
    with open_artifact(storage, "one", "v1") as mine, open_artifact(storage, "two", "v1") as other:
        by_one, by_two = (load_file(artifact.folder / FILE) for artifact in (mine, other))
    assert by_one.keys() == by_two.keys() and any(key.startswith("text_encoder_2.") for key in by_one)
    for key, value in by_one.items():
        assert torch.allclose(by_two[key], value, atol=1e-4), key


def test_a_bank_trains_what_a_run_alone_trains(
    make_sdxl_job: Callable[..., Lease], alone: Callable[..., Any], resident: ResidentBase, storage: Storage
) -> None:
    sections: dict[str, Any] = {"validate": {"every": 5, "samples": 2, "prompts": []}}
    train = {**TRAIN, "objective": {"caption_dropout": 0.3}}
    jobs = [make_sdxl_job(n, train={**train, "seed": s}, **sections) for n, s in (("a", 1), ("b", 2))]
    events: list[list[Any]] = [[], []]
    assert train_bank(jobs, resident, lambda slot, *event: events[slot].append(event))
    for name, seed, told in (("one", 1, events[0]), ("two", 2, events[1])):
        metrics = alone(make_sdxl_job(name, train={**train, "seed": seed}, **sections))["metrics"]
        [published] = [payload for kind, payload in told if kind == "published"]
        assert published["metrics"] == pytest.approx(metrics, rel=1e-5)
    for ours, theirs in (("a", "one"), ("b", "two")):
        with open_artifact(storage, ours, "v1") as mine, open_artifact(storage, theirs, "v1") as other:
            together, by_itself = (load_file(artifact.folder / FILE) for artifact in (mine, other))
        assert together.keys() == by_itself.keys() and together
        for key, value in by_itself.items():
            assert (together[key] - value).abs().mean() < 1e-6, key


def test_memory_is_estimated_from_all_parts(tiny_sdxl: Path) -> None:
    base = open_base(str(tiny_sdxl))
    models = (load_unet(base), load_text_encoder(base))
    every = sum(p.numel() * 4 for model in models for p in model.parameters())
    with_text, without = (
        estimate(base, run_of(tiny_sdxl, method="full", text_encoder={"train": train}), "cpu", 1)
        for train in (True, False)
    )
    assert with_text.base >= every and with_text.optimizer > without.optimizer
    ceiling = memory_ceiling(base, run_of(tiny_sdxl, method="full", text_encoder={"train": True}), "cpu")
    assert with_text.libraries < with_text.peak < ceiling


# -- artifacts ---------------------------------------------------------------------------------------------


def run_of(base: Path, **train: Any) -> Run:
    subject = {"name": "rex", "class": "dog", "images": ["photos"]}
    return Run.model_validate({"base": {"model": str(base)}, "subject": subject, "train": train})


@pytest.mark.parametrize("train_text", [False, True])
def test_stock_diffusers_draws_our_image_with_a_lora_artifact(
    train_text: bool,
    tiny_sdxl: Path,
    tmp_path: Path,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
    write_artifact: Callable[..., None],
) -> None:
    base, lora = open_base(str(tiny_sdxl)), {"rank": 4, "alpha": 2.0}
    run = run_of(tiny_sdxl, method="lora", lora=lora, text_encoder={"train": train_text})
    write_artifact(base, run, tmp_path)
    parts = {key.partition(".")[0] for key in load_file(tmp_path / FILE)}
    assert parts == ({"unet", "text_encoder", "text_encoder_2"} if train_text else {"unet"})
    asked = DrawRequest(PROMPT, 7, steps=6, guidance=5.0)
    ours = Drawer(base, tmp_path, device="cpu").draw([asked])
    pipe = stock(tiny_sdxl)
    before = stock_images(pipe, PROMPT, (7,), num_inference_steps=6, guidance_scale=5.0)
    pipe.load_lora_weights(tmp_path)
    assert_same_picture(ours, stock_images(pipe, PROMPT, (7,), num_inference_steps=6, guidance_scale=5.0))
    assert np.abs(ours[0].astype(int) - before[0].astype(int)).mean() > 5  # the adapter is at work


def test_stock_diffusers_draws_our_image_with_a_full_artifact(
    tiny_sdxl: Path,
    tmp_path: Path,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
    write_artifact: Callable[..., None],
) -> None:
    base = open_base(str(tiny_sdxl))
    write_artifact(base, run_of(tiny_sdxl, method="full"), tmp_path)
    asked = DrawRequest(PROMPT, 7, steps=6, guidance=5.0)
    ours = Drawer(base, tmp_path, device="cpu").draw([asked])
    assert_same_picture(
        ours, stock_images(stock(tmp_path), PROMPT, (7,), num_inference_steps=6, guidance_scale=5.0)
    )
    before = Drawer(base, device="cpu").draw([asked])
    assert np.abs(ours[0].astype(int) - before[0].astype(int)).mean() > 5


def test_rows_of_many_subjects_come_out_as_alone(
    tiny_sdxl: Path, tmp_path: Path, write_artifact: Callable[..., None]
) -> None:
    base = open_base(str(tiny_sdxl))
    run = run_of(tiny_sdxl, method="lora", text_encoder={"train": True})
    write_artifact(base, run, tmp_path)
    drawer = Drawer(base, device="cpu", width=6)
    worn = drawer.studio.read(tmp_path, None)
    asked = [DrawRequest(PROMPT, seed, steps=3, guidance=g) for seed, g in ((1, 5.0), (2, 1.0), (3, 5.0))]
    outfits = [worn, drawer.studio.row(asked[1], worn).outfit, PLAIN]
    alone = [drawn(drawer, [row]) for row in zip(asked, outfits, strict=True)]
    together = drawn(drawer, list(zip(asked, outfits, strict=True)))
    assert [latents for [latents] in alone] == together
    assert len(set(together)) == 3


def drawn(drawer: Drawer, asked: list[tuple[DrawRequest, Outfit]]) -> list[bytes]:
    rows = [drawer.studio.row(*one) for one in asked]
    for _ in range(3):
        drawer.studio.step(rows)
    return [row.x.numpy().tobytes() for row in rows]
