"""SD3, a transformer of flow matching, is trained and drawn by the code that every base is."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from cluster.errors import UserError
from cluster.storage import Storage
from training.artifact import open_artifact
from training.bank_key import bankable
from training.bank_run import train_bank
from training.basefolder import used_files
from training.batches import Batches
from training.ceiling import memory_ceiling
from training.conditioning import encode_text, never_trained, trained_parts
from training.defaults import with_defaults
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
)
from training.recipe import Run
from training.request import DrawRequest
from training.wish import Wish

PROMPT = "a photo of a zwx dog on the beach"
# what diffusers' train_dreambooth_lora_sd3.py adapts
SCRIPT = [f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")]
SCRIPT += [f"attn.{name}" for name in ("to_k", "to_out.0", "to_q", "to_v")]


def stock(folder: Path) -> Any:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **without(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def without(folder: Path) -> dict[str, None]:
    """What is said to stock diffusers of a base that has no T5."""
    return {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}


def edited(folder: Path, name: str, **values: Any) -> None:
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


@pytest.fixture(params=["t5", "clips"])
def sd3(request: pytest.FixtureRequest, tiny_sd3: Path, tiny_sd3_without_t5: Path) -> Path:
    """The tiny SD3 with T5, and the tiny SD3.5 without."""
    return tiny_sd3 if request.param == "t5" else tiny_sd3_without_t5


# -- opening and drawing -----------------------------------------------------------------------------------


def test_what_a_base_says_of_itself_is_read_from_it(tiny_sd3: Path, tiny_sd3_without_t5: Path) -> None:
    base, less = open_base(str(tiny_sd3)), open_base(str(tiny_sd3_without_t5))
    assert (base.kind.family, base.prediction_type, base.sampler) == ("sd3", "flow", "euler")
    assert (base.latent_channels, base.scaling_factor, base.shift_factor) == (16, 1.3, 0.4)
    assert (base.image_size, base.longest_side, base.token_limit) == (16, 48, 32)
    assert base.prompt_ids == 2 * 32 + 256 and less.prompt_ids == 2 * 32
    assert base.kind.trainable == less.kind.trainable == ("transformer", "text_encoder", "text_encoder_2")
    assert less.kind.texts == ("text_encoder", "text_encoder_2")


@pytest.mark.parametrize(
    ("file", "changed", "said"),
    [
        ("transformer/config.json", {"joint_attention_dim": 48}, "does not fit its text encoders"),
        ("transformer/config.json", {"pooled_projection_dim": 55}, "does not fit its text encoders"),
        ("transformer/config.json", {"joint_attention_dim": None}, "no number joint_attention_dim"),
        ("transformer/config.json", {"pooled_projection_dim": None}, "no number pooled_projection_dim"),
        ("transformer/config.json", {"pos_embed_max_size": None}, "no number pos_embed_max_size"),
        ("text_encoder_3/config.json", {"d_model": None}, "no number d_model"),
        ("scheduler/scheduler_config.json", {"shift": None}, "no number above 0"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "FlowMatchEuler"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("tokenizer_3/tokenizer.json", None, "not complete"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(
    file: str, changed: dict[str, Any] | None, said: str, tiny_sd3: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_sd3, folder)
    if changed is None:
        (folder / file).unlink()
    else:
        edited(folder, file, **changed)
    with pytest.raises(UserError) as refused:
        open_base(str(folder))
    assert said in str(refused.value) and refused.value.do


def test_a_t5_that_the_index_leaves_out_is_not_read_where_its_folder_stays(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_sd3, folder)
    edited(folder, "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    with_folders = open_base(str(folder))
    parts = {file.parent.name for file in used_files(folder, with_folders.kind)}
    assert "tokenizer_2" in parts and not parts & {"text_encoder_3", "tokenizer_3"}
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
    assert open_base(str(folder)).revision == with_folders.revision


def test_a_flow_is_refused_for_a_base_of_diffusion(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    edited(folder, "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(UserError, match="scheduler of diffusion"):
        open_base(str(folder))


def test_text_is_encoded_as_stock_diffusers_encodes_it(sd3: Path) -> None:
    base = open_base(str(sd3))
    prompts = [PROMPT, "", "a red clock, 7"]
    ours = encode_text(load_text_encoder(base), token_ids(load_tokenizer(base), prompts, base.token_limit))
    with torch.no_grad():
        text, _, pooled, _ = stock(sd3).encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    assert torch.equal(ours.text, text) and ours.pooled is not None and torch.equal(ours.pooled, pooled)
    assert ours.text.shape == (3, 32 + 256, 64) == (3, base.text_tokens, 64)
    assert bool(ours.text[:, 32:].any()) == (base.kind.texts[-1] == "text_encoder_3")


@pytest.mark.parametrize(("guidance", "negative"), [(5.0, ""), (5.0, "snow"), (1.0, "")])
def test_the_pristine_base_draws_what_stock_diffusers_draws(
    guidance: float,
    negative: str,
    sd3: Path,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
) -> None:
    drawer = Drawer(open_base(str(sd3)), device="cpu")
    ours = drawer.draw([DrawRequest(PROMPT, s, negative, steps=6, guidance=guidance) for s in (7, 8)])
    call = {"num_inference_steps": 6, "guidance_scale": guidance, "negative_prompt": [negative] * 2}
    assert_same_picture(ours, stock_images(stock(sd3), PROMPT, (7, 8), **call))


def test_other_sizes_are_drawn_up_to_what_the_transformer_sees(
    tiny_sd3: Path,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
) -> None:
    drawer = Drawer(open_base(str(tiny_sd3)), device="cpu")
    ours = drawer.draw([DrawRequest(PROMPT, 7, steps=4, guidance=5.0, height=48, width=16)])
    call = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 48, "width": 16}
    assert_same_picture(ours, stock_images(stock(tiny_sd3), PROMPT, (7,), **call))
    with pytest.raises(UserError, match="at most 48"):
        drawer.draw([DrawRequest(PROMPT, 7, steps=4, height=56)])
    with pytest.raises(UserError, match="the sampler ddim"):
        drawer.draw([DrawRequest(PROMPT, 7, steps=4, sampler="ddim")])


# -- training ----------------------------------------------------------------------------------------------


@pytest.fixture
def resident(tiny_sd3: Path) -> ResidentBase:
    """The tiny SD3, loaded; jobs and groups of these tests are of it."""
    return ResidentBase.load(str(tiny_sd3), open_base(str(tiny_sd3)).revision, torch.device("cpu"))


def latents(seed: int, rows: int) -> dict[str, Any]:
    mean = np.random.default_rng(seed).standard_normal((rows, 16, 8, 8), dtype=np.float32)
    return {"mean": mean, "std": np.full_like(mean, 0.1)}


@pytest.fixture
def make_sd3_job(
    make_job: Callable[..., Lease], resident: ResidentBase, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Lease]:
    """A job of SD3's latents and defaults, whose captions are dropped where the recipe says so."""
    monkeypatch.setattr("training.lease.fetch", list)

    def make(name: str, **sections: Any) -> Lease:
        given = with_defaults({"base": {"model": str(resident.info.path)}, **sections})
        del given["base"]
        job = make_job(name, **given)
        dropped = job.sample_ids[0] if job.recipe.train.objective.caption_dropout else ()
        tables = {"subject_latents": [latents(1, 3)], "class_latents": [latents(2, 5)]}
        return replace(job, empty_ids=dropped, **tables)

    return make


def textbook(pipe: Any, batch: PairBatch, words: dict[tuple[int, ...], str], weight: float) -> torch.Tensor:
    """The loss as diffusers' script has it, of stock parts, a forward for the subject and one for the class."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    terms = []
    for role in (0, 1):
        rows = [i for i, of in enumerate(batch.role.tolist()) if of == role]
        x0, noise = batch.latents[rows], batch.noise[rows]
        indices = 999 - batch.timesteps[rows]  # theirs begin with the noisiest
        timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
        prompts = [words[tuple(batch.token_ids[row].tolist())] for row in rows]
        text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        output = pipe.transformer(
            hidden_states=(1.0 - sigmas) * x0 + sigmas * noise,
            timestep=timesteps,
            encoder_hidden_states=text,
            pooled_projections=pooled,
        ).sample
        terms.append(nn.functional.mse_loss(output, noise - x0))
    return terms[0] + weight * terms[1]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("train_text", [True, False])
def test_loss_and_gradients_equal_the_textbook_formula(
    method: str, train_text: bool, resident: ResidentBase, tiny_sd3: Path, make_sd3_job: Callable[..., Lease]
) -> None:
    train = {"method": method, "pairs_per_step": 4, "text_encoder": {"train": train_text}}
    objective = {"objective": {"caption_dropout": 0.5}}
    lease = make_sd3_job("rex", train={**train, **objective}, prior={"weight": 0.7})
    module = build_module(resident, lease.recipe, lease, 0)
    [batch] = Batches.of(lease, resident.info, torch.device("cpu"), 0, 1).of_step(3)
    mean = latents(1, 3)["mean"]
    assert (
        abs(float(batch.latents[0].mean()) + 0.4 * 1.3) < 0.15 and abs(mean.mean()) < 0.05
    )  # shifted, scaled

    pipe = stock(tiny_sd3)
    theirs = {"transformer": pipe.transformer}
    if train_text:
        theirs |= {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    for model in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        model.requires_grad_(False)
    ours = trained_parts(module.unet, module.text_encoder or resident.text_encoder)
    for part, model in theirs.items():
        if method == "full":
            model.requires_grad_(True)
            continue
        targets = SCRIPT if part == "transformer" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            for p in (p for p in ours[part].parameters() if p.requires_grad):
                nn.init.normal_(p, std=0.2)
        model.load_state_dict(ours[part].state_dict())

    said = [list(ids) for ids in (lease.subject_ids, lease.class_ids, lease.empty_ids)]
    words = dict(zip(map(tuple, said), ("a photo of a zwx dog", "a photo of a dog", ""), strict=True))
    assert {tuple(row) for row in batch.token_ids.tolist()} == set(words)
    expected = textbook(pipe, batch, words, 0.7)
    expected.backward()
    loss, *_ = module(batch)
    loss.backward()
    assert torch.allclose(loss, expected, atol=1e-5) and float(expected.detach()) > 0.5
    for part, model in theirs.items():
        mine = {n: p.grad for n, p in ours[part].named_parameters() if p.requires_grad}
        other = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert mine.keys() == other.keys() and len(mine) > 10
        assert sum(g is not None and float(g.abs().max()) > 1e-4 for g in mine.values()) > len(mine) / 2
        for name, gradient in mine.items():
            assert (gradient is None) == (other[name] is None), name
            assert gradient is None or torch.allclose(gradient, other[name], atol=1e-5), name


def test_gradient_checkpointing_and_bf16_compute_the_same_loss(
    resident: ResidentBase, make_sd3_job: Callable[..., Lease]
) -> None:
    figures = []
    train = {"method": "full", "pairs_per_step": 2, "text_encoder": {"train": True}}
    for engine in ({}, {"gradient_checkpointing": True}, {"precision": "bf16"}):
        lease = make_sd3_job("rex", train=train, engine={"gradient_checkpointing": False, **engine})
        module = build_module(resident, lease.recipe, lease, 0)
        [batch] = Batches.of(lease, resident.info, torch.device("cpu"), 0, 1).of_step(0)
        loss, *_ = module(batch)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        figures.append(torch.stack([loss.detach(), norm]))
    assert torch.equal(figures[0], figures[1])
    assert torch.allclose(figures[0], figures[2], rtol=0.02) and not torch.equal(figures[0], figures[2])


def test_what_knows_nothing_of_the_noise_process_goes_on_working(
    resident: ResidentBase, make_sd3_job: Callable[..., Lease]
) -> None:
    objective = {"mask": "files", "mask_prior": 2.0, "loss": "huber", "offset_noise": 0.1}
    objective |= {"input_perturbation": 0.1, "multires_noise_iterations": 2}
    train = {"pairs_per_step": 3, "objective": objective}
    job = make_sd3_job("rex", train=train, prior={"target": "base"})
    half = np.zeros((3, 8, 8), np.float32)
    half[:, :4] = 1
    lease = replace(job, class_latents=(), masks=half)
    module = build_module(resident, lease.recipe, lease, 0)
    [batch] = Batches.of(lease, resident.info, torch.device("cpu"), 0, 1).of_step(0)
    _, subject, of_class = module(batch)
    # fresh adapters are nothing, so the base and what is trained of it agree
    assert float(subject) > 0.01 and float(of_class) < 1e-9
    assert batch.mask is not None
    with torch.no_grad():  # what is outside of the mask is held to the base, from which nothing differs yet
        elsewhere = batch.noise + 5 * (1 - batch.mask)
        assert torch.allclose(
            module(replace(batch, shown_noise=batch.shown_noise, noise=elsewhere))[1], subject
        )


TRAIN: dict[str, Any] = {"steps": 5, "lr": 1e-3, "pairs_per_step": 2, "lora": {"rank": 4, "alpha": 4.0}}
GRID = {"every": 4, "samples": 2, "num_images": 1, "steps": 2}


@pytest.mark.resume
@pytest.mark.parametrize(("method", "stage"), [("lora", 0), ("full", 3)])
def test_a_run_that_was_left_goes_on_to_the_bits_of_one_that_stayed(
    method: str,
    stage: int,
    make_sd3_job: Callable[..., Lease],
    alone: Callable[..., Any],
    storage: Storage,
) -> None:
    train = {**TRAIN, "method": method, "text_encoder": {"train": True, "lr": 1e-3}, "ema_decay": 0.9}
    sections = {"train": train, "validate": GRID, "engine": {"zero_stage": stage}}
    calm, hurt = (make_sd3_job(name, **sections) for name in ("calm", "hurt"))
    whole = alone(calm)
    assert whole["metrics"] and [kind for kind, _ in whole["events"]].count("sample") == 1
    assert alone(hurt, {0: {2: Wish.LEAVE}})["metrics"] is None and alone(hurt)["metrics"] == whole["metrics"]
    calm_files, hurt_files = (artifact_bytes(storage, name) for name in ("calm", "hurt"))
    assert calm_files == hurt_files and calm_files


def artifact_bytes(storage: Storage, name: str) -> dict[str, bytes]:
    with open_artifact(storage, name, "v1") as artifact:
        files = sorted(artifact.folder.rglob("*.safetensors"))
        return {file.relative_to(artifact.folder).as_posix(): file.read_bytes() for file in files}


def test_a_bank_trains_what_a_run_alone_trains(
    make_sd3_job: Callable[..., Lease], alone: Callable[..., Any], resident: ResidentBase, storage: Storage
) -> None:
    sections: dict[str, Any] = {"validate": {"every": 5, "samples": 2, "prompts": []}}
    train = {**TRAIN, "objective": {"caption_dropout": 0.3}}
    jobs = [make_sd3_job(n, train={**train, "seed": s}, **sections) for n, s in (("a", 1), ("b", 2))]
    assert [bankable(job.recipe, 1) for job in jobs] == [None, None]
    events: list[list[Any]] = [[], []]
    assert train_bank(jobs, resident, lambda slot, *event: events[slot].append(event))
    for name, seed, told in (("one", 1, events[0]), ("two", 2, events[1])):
        metrics = alone(make_sd3_job(name, train={**train, "seed": seed}, **sections))["metrics"]
        [published] = [payload for kind, payload in told if kind == "published"]
        assert published["metrics"] == pytest.approx(metrics, rel=1e-5)
    for ours, theirs in (("a", "one"), ("b", "two")):
        with open_artifact(storage, ours, "v1") as mine, open_artifact(storage, theirs, "v1") as other:
            together, by_itself = (load_file(artifact.folder / FILE) for artifact in (mine, other))
        assert together.keys() == by_itself.keys() and together
        for key, value in by_itself.items():
            assert (together[key] - value).abs().mean() < 1e-6, key


@pytest.mark.parametrize("stage", [0, 3])
def test_a_full_run_shares_the_t5_that_it_never_trains(
    stage: int, resident: ResidentBase, make_sd3_job: Callable[..., Lease]
) -> None:
    lease = make_sd3_job("rex", train={"method": "full", "text_encoder": {"train": True}})
    module = build_module(resident, lease.recipe, lease, stage)
    assert module.text_encoder is not None
    base = {id(p) for part in (resident.unet, resident.text_encoder) for p in part.parameters()}
    shared = {id(p) for p in module.parameters()} & base
    t5 = {id(p) for p in never_trained(resident.text_encoder)}
    assert t5 and shared == (t5 if stage < 3 else set())  # ZeRO-3 shards what is frozen too
    assert not any(p.requires_grad for p in resident.text_encoder.parameters())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_memory_is_estimated_from_all_parts(method: str, tiny_sd3: Path) -> None:
    base = open_base(str(tiny_sd3))
    models = (load_unet(base), load_text_encoder(base))
    every = sum(p.numel() * 4 for model in models for p in model.parameters())
    with_text, bare = (
        estimate(base, run_of(tiny_sd3, method=method, text_encoder={"train": train}), "cpu", 1)
        for train in (True, False)
    )
    assert with_text.base >= every and with_text.optimizer > bare.optimizer
    if method == "full":
        assert with_text.weights == every - sum(4 * p.numel() for p in never_trained(models[1]))
    ceiling = memory_ceiling(base, run_of(tiny_sd3, method=method, text_encoder={"train": True}), "cpu")
    assert with_text.libraries < with_text.peak < ceiling


# -- artifacts ---------------------------------------------------------------------------------------------


def run_of(base: Path, **train: Any) -> Run:
    subject = {"name": "rex", "class": "dog", "images": ["photos"]}
    given = {"base": {"model": str(base)}, "subject": subject, "train": train}
    return Run.model_validate(with_defaults(given))


@pytest.mark.parametrize("train_text", [False, True])
def test_stock_diffusers_draws_our_image_with_a_lora_artifact(
    train_text: bool,
    sd3: Path,
    tmp_path: Path,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
    write_artifact: Callable[..., None],
) -> None:
    base, lora = open_base(str(sd3)), {"rank": 4, "alpha": 2.0}
    run = run_of(sd3, method="lora", lora=lora, text_encoder={"train": train_text})
    write_artifact(base, run, tmp_path)
    parts = {key.partition(".")[0] for key in load_file(tmp_path / FILE)}
    assert parts == ({"transformer", "text_encoder", "text_encoder_2"} if train_text else {"transformer"})
    asked = DrawRequest(PROMPT, 7, steps=6, guidance=5.0)
    ours = Drawer(base, tmp_path, device="cpu").draw([asked])
    pipe = stock(sd3)
    before = stock_images(pipe, PROMPT, (7,), num_inference_steps=6, guidance_scale=5.0)
    pipe.load_lora_weights(tmp_path)
    assert_same_picture(ours, stock_images(pipe, PROMPT, (7,), num_inference_steps=6, guidance_scale=5.0))
    assert np.abs(ours[0].astype(int) - before[0].astype(int)).mean() > 5  # the adapter is at work


def test_stock_diffusers_draws_our_image_with_a_full_artifact(
    sd3: Path,
    tmp_path: Path,
    stock_images: Callable[..., Any],
    assert_same_picture: Callable[..., None],
    write_artifact: Callable[..., None],
) -> None:
    base = open_base(str(sd3))
    write_artifact(base, run_of(sd3, method="full"), tmp_path, far=0.05)
    asked = DrawRequest(PROMPT, 7, steps=6, guidance=5.0)
    ours = Drawer(base, tmp_path, device="cpu").draw([asked])
    theirs = stock_images(stock(tmp_path), PROMPT, (7,), num_inference_steps=6, guidance_scale=5.0)
    assert_same_picture(ours, theirs)
    before = Drawer(base, device="cpu").draw([asked])
    assert np.abs(ours[0].astype(int) - before[0].astype(int)).mean() > 5


def test_rows_of_many_subjects_come_out_as_alone(
    tiny_sd3: Path, tmp_path: Path, write_artifact: Callable[..., None]
) -> None:
    base = open_base(str(tiny_sd3))
    write_artifact(base, run_of(tiny_sd3, method="lora", text_encoder={"train": True}), tmp_path)
    drawer = Drawer(base, device="cpu", width=6)
    worn = drawer.studio.read(tmp_path, None)
    asked = [
        DrawRequest(PROMPT, seed, steps=s, guidance=g)
        for seed, s, g in ((1, 3, 5.0), (2, 5, 1.0), (3, 4, 5.0))
    ]
    pairs = list(zip(asked, [worn, worn, PLAIN], strict=True))
    alone = [drawn(drawer, [pair]) for pair in pairs]
    together = drawn(drawer, pairs)
    assert [latents for [latents] in alone] == together
    assert len(set(together)) == 3


def drawn(drawer: Drawer, asked: list[tuple[DrawRequest, Outfit]]) -> list[bytes]:
    rows = [drawer.studio.row(*one) for one in asked]
    for _ in range(3):
        drawer.studio.step(rows)
    return [row.x.numpy().tobytes() for row in rows]
