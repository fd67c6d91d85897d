"""Noise that is added, captions that are dropped, and a class term without class images, alone and in a bank."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from cluster.errors import UserError
from cluster.storage import Storage, sha256
from training.artifact import open_artifact
from training.bank import Bank, stack
from training.bank_key import bank_key, bankable
from training.batches import Batches
from training.conditioning import encode_text, predict
from training.dataplan import DataPlan, Role, enlarged
from training.decisive import decisive
from training.lease import LatentTable, Lease
from training.loop import ResidentBase, build_module
from training.noise import trained_scheduler
from training.outfit import PLAIN
from training.pipeline import load_tokenizer, open_base, token_ids
from training.recipe import Run
from training.request import DrawRequest
from training.schedule import NoiseSchedule
from training.studio import Studio

EVERYTHING = {
    "weighting": "min_snr",
    "loss": "huber",
    "offset_noise": 0.1,
    "multires_noise_iterations": 3,
    "input_perturbation": 0.1,
    "caption_dropout": 0.5,
}
OFF = {"every": 0}
LORA: dict[str, Any] = {"pairs_per_step": 4, "lora": {"rank": 4, "alpha": 4.0}}


def table(seed: int, rows: int) -> LatentTable:
    mean = np.random.default_rng(seed).standard_normal((rows, 4, 8, 8), dtype=np.float32)
    return LatentTable(mean, np.full_like(mean, 0.1))


@pytest.fixture
def made(resident: ResidentBase, make_lease: Callable[..., Lease]) -> Callable[..., tuple[Lease, Batches]]:
    """A lease with an objective and its batches over random latents."""
    empty = token_ids(load_tokenizer(resident.info), [""], resident.info.token_limit)[0].tolist()

    def make(
        objective: dict[str, Any], rank: int = 0, world: int = 1, **sections: Any
    ) -> tuple[Lease, Batches]:
        train = {**LORA, **sections.pop("train", {}), "objective": objective}
        lease = make_lease(resident, train=train, **sections)
        if objective.get("caption_dropout"):
            lease = replace(lease, empty_ids=empty)
        run = lease.recipe
        plan = DataPlan(run.train.seed, 3, 5, run.train.pairs_per_step, 1000, run.prior.weight)
        ids, scale = torch.tensor(lease.prompts), resident.info.scaling_factor
        tables, device = (table(1, 3), table(2, 5)), torch.device("cpu")
        return lease, Batches(plan, tables, ids, scale, rank, world, 1, device, run.train.objective)

    return make


def test_noise_and_captions_are_functions_of_the_sample_whatever_the_ranks(
    made: Callable[..., tuple[Lease, Batches]],
) -> None:
    lease, alone = made(EVERYTHING)
    [whole] = alone.of_step(3)
    seen = {}
    for rank in range(2):
        [part] = made(EVERYTHING, rank, 2)[1].of_step(3)
        assert part.shown_noise is not None
        columns = (part.sample_index, part.noise, part.shown_noise, part.token_ids)
        seen |= {int(n): row for n, *row in zip(*columns, strict=True)}
    assert whole.shown_noise is not None and len(seen) == 8
    for i, sample in enumerate(whole.sample_index.tolist()):
        noise, shown, ids = seen[sample]
        assert torch.equal(noise, whole.noise[i]) and torch.equal(shown, whole.shown_noise[i])
        assert torch.equal(ids, whole.token_ids[i])
    dropped = [ids == list(lease.empty_ids) for ids in whole.token_ids.tolist()]
    assert any(dropped) and not all(dropped)  # and those kept have their own prompt
    for gone, ids, role in zip(dropped, whole.token_ids.tolist(), whole.role.tolist(), strict=True):
        assert gone or ids == lease.prompts[role]


def test_what_is_added_has_the_strength_that_was_asked_for_and_shifts_channels_as_a_whole(
    made: Callable[..., tuple[Lease, Batches]],
) -> None:
    [plain] = made({})[1].of_step(0)
    [offset] = made({"offset_noise": 0.5})[1].of_step(0)
    [shown] = made({"input_perturbation": 0.5})[1].of_step(0)
    shift = offset.noise - plain.noise
    assert offset.shown_noise is None and plain.shown_noise is None
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    assert 0.3 < float(shift[:, :, 0, 0].std()) < 0.7
    assert shown.shown_noise is not None and torch.equal(shown.noise, plain.noise)  # what is asked for stays
    assert float((shown.shown_noise - plain.noise).std()) == pytest.approx(0.5, rel=0.1)


def test_noise_of_several_resolutions_has_variance_one_and_larger_shapes(
    made: Callable[..., tuple[Lease, Batches]],
) -> None:
    sixteen = DataPlan(0, 3, 5, 1, 1000, 1.0)
    plain, coarse = (
        np.stack([noise(n) for n in range(64)])
        for noise in (
            lambda n: sixteen.noise(n, (4, 16, 16)),
            lambda n: sixteen.multires(n, (4, 16, 16), 6, 0.8),
        )
    )
    assert coarse.std(axis=(1, 2, 3)) == pytest.approx(np.ones(64), abs=1e-5)
    alike = [float((x[..., 1:] * x[..., :-1]).mean()) for x in (plain, coarse)]  # of neighbours
    assert abs(alike[0]) < 0.05 and alike[1] > 0.3
    weak = np.stack([sixteen.multires(n, (4, 16, 16), 1, 1e-6) for n in range(64)])
    assert np.abs(weak - plain / plain.std(axis=(1, 2, 3), keepdims=True)).max() < 1e-4
    [ours] = made({"multires_noise_iterations": 6})[1].of_step(0)
    assert float(ours.noise[0].std(correction=0)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("size", [(7, 16), (2, 2), (16, 5)])
def test_a_picture_is_enlarged_as_torch_does_it(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).standard_normal((3, *size), dtype=np.float32)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(image)[None], (16, 16), mode="bilinear")[0]
    assert np.allclose(enlarged(image, (16, 16)), wanted.numpy(), atol=1e-5)


def test_a_setting_that_came_later_changes_no_fingerprint_and_no_key_at_its_default() -> None:
    subject = {"name": "rex", "class": "dog", "images": ["x"]}

    def run_of(**objective: Any) -> Run:
        sections = {"train": {"objective": objective}, "validate": {"every": 0}}
        return Run.model_validate({"subject": subject, **sections})

    old, new = run_of(weighting="min_snr"), run_of(weighting="min_snr", multires_noise_iterations=2)
    # as they were before there was such a setting
    assert sha256(json.dumps(decisive(old), sort_keys=True).encode()) == (
        "f58599eff277bca9960dc612478d353865d41d00c8fee054406c756f41f82ae1"
    )
    assert bank_key(old, "r") == "d9d0150fc2dcf11d"
    assert decisive(new) != decisive(old) and bank_key(new, "r") != "d9d0150fc2dcf11d"
    assert "objective" not in decisive(run_of())["train"]
    assert decisive(run_of(multires_noise_iterations=2)) != decisive(run_of())


def test_the_validation_sees_none_of_it(made: Callable[..., tuple[Lease, Batches]]) -> None:
    [plain], [full] = (list(made(o)[1].of_validation(4)) for o in ({}, EVERYTHING))
    assert full.shown_noise is None and torch.equal(plain.noise, full.noise)
    assert torch.equal(plain.token_ids, full.token_ids)


def test_a_slot_of_a_bank_has_the_loss_that_the_run_has_alone(
    resident: ResidentBase, made: Callable[..., tuple[Lease, Batches]]
) -> None:
    bank = None
    alone, parts = [], []
    for seed in (1, 2):
        lease, batches = made(EVERYTHING, train={"seed": seed})
        module = build_module(resident, lease.recipe, lease, 0)
        [batch] = batches.of_step(0)
        alone.append(torch.stack(module(batch)))
        bank = bank or Bank(resident, lease.recipe, 3)
        bank.take(seed, lease.recipe, lease.prompts)
        bank.adapters.start(seed, seed)
        parts.append(batch)
    assert bank is not None
    losses = bank(stack([None, *parts], 8))
    together = torch.stack([losses.loss, losses.subject, losses.of_class])[:, 1:].T
    assert torch.allclose(together, torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert float(losses.loss[0].detach()) == 0.0


def test_who_may_share_a_bank(made: Callable[..., tuple[Lease, Batches]]) -> None:
    plain, other = (made(o, validate=OFF)[0].recipe for o in ({}, {"weighting": "p2"}))
    assert bankable(other, 1) is None and bank_key(plain, "r") != bank_key(other, "r")
    taught = made({}, prior={"target": "base"}, validate=OFF)[0].recipe
    lengths = made({}, train={"lora": {"dora": True}}, validate=OFF)[0].recipe
    assert bankable(lengths, 1) == "train.lora.dora"
    assert bankable(taught, 1) == "prior.target" and bank_key(taught, "r") is None


@pytest.mark.parametrize("train", [{}, {"text_encoder": {"train": True}}, {"method": "full"}])
def test_the_class_term_may_be_what_the_pristine_base_predicts(
    resident: ResidentBase, made: Callable[..., tuple[Lease, Batches]], train: dict[str, Any]
) -> None:
    lease, batches = made({}, prior={"target": "base", "weight": 0.5}, train=train)
    module = build_module(resident, lease.recipe, lease, 0)
    [batch] = batches.of_step(0)
    _, subject, of_class = module(batch)
    assert float(subject) > 0.1 and float(of_class) < 1e-9  # nothing has moved yet
    pristine = {name: p.clone() for name, p in resident.unet.named_parameters()}
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.full_like(p, 0.02))
    loss, moved, drifted = module(batch)
    loss.backward()
    # the same in plain terms: with the class's prompt on the same noisy latents, by both
    rows = batch.role == Role.CLASS
    schedule = NoiseSchedule.from_config(resident.info.scheduler)
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)[rows]
    with torch.no_grad():
        encoder = module.text_encoder or resident.text_encoder
        ours = predict(module.unet, noisy, batch.timesteps[rows], encode_text(encoder, batch.token_ids[rows]))
        text = encode_text(resident.text_encoder, batch.token_ids[rows])
        theirs = predict(resident.unet, noisy, batch.timesteps[rows], text)
    assert float(drifted) == pytest.approx(float((ours - theirs).square().mean()), rel=1e-4)
    assert float(drifted) > 1e-5 and float(loss.detach()) == pytest.approx(
        float(moved + 0.5 * drifted), rel=1e-5
    )
    assert all(
        torch.equal(p, pristine[name]) and p.grad is None for name, p in resident.unet.named_parameters()
    )
    assert not any("teacher" in name for name in module.state_dict())


@pytest.mark.parametrize("target", ["images", "base"])
def test_masked_rows_hold_on_to_the_base_outside_and_those_of_the_class_have_no_mask(
    resident: ResidentBase, made: Callable[..., tuple[Lease, Batches]], target: str
) -> None:
    wanted = {"mask": "alpha", "mask_prior": 2.0}
    lease, batches = made(wanted, prior={"target": target, "weight": 0.5})
    masks = np.zeros((3, 8, 8), np.float32)
    masks[:, :4] = 1
    module = build_module(resident, lease.recipe, lease, 0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.full_like(p, 0.02) if p.requires_grad else 0.0)
    [batch] = replace(batches, masks=masks).of_step(0)
    assert batch.mask is not None and batch.mask.shape == (8, 1, 8, 8)
    assert torch.equal(batch.mask[batch.role == Role.CLASS], torch.ones(4, 1, 8, 8))
    _, subject, of_class = module(batch)
    schedule = NoiseSchedule.from_config(resident.info.scheduler)
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        text = encode_text(resident.text_encoder, batch.token_ids)
        ours = predict(module.unet, noisy, batch.timesteps, text)
        theirs = predict(resident.unet, noisy, batch.timesteps, text)
    own, other = batch.role == Role.SUBJECT, batch.role == Role.CLASS
    inside = (ours - batch.noise)[own][:, :, :4].square().mean()
    drift = (ours - theirs)[own][:, :, 4:].square().mean()
    assert float(subject) == pytest.approx(float(inside + 2.0 * drift), rel=1e-4) and float(drift) > 1e-5
    held = theirs if target == "base" else batch.noise
    assert float(of_class) == pytest.approx(float((ours - held)[other].square().mean()), rel=1e-4)
    assert bankable(made(wanted, validate=OFF)[0].recipe, 1) == "train.objective.mask"


def test_a_run_with_everything_needs_no_class_images_and_ends(
    make_job: Callable[..., Lease],
    alone: Callable[..., dict[str, Any]],
    storage: Storage,
    resident: ResidentBase,
) -> None:
    train = {**LORA, "steps": 3, "objective": EVERYTHING, "pairs_per_step": 2}
    job = make_job(
        "rex",
        train=train,
        prior={"target": "base"},
        validate={"every": 2, "samples": 2, "prompts": []},
    )
    masks = np.ones((3, 8, 8), np.float32)
    job = replace(job, masks=masks, class_latents=[], empty_ids=job.sample_ids[0], sample_ids=())
    done = alone(job)
    assert done["metrics"]["loss_class"] > 0 and "validation_loss" in done["metrics"]
    with open_artifact(storage, "rex", "v1") as artifact:
        assert artifact.manifest["recipe"]["train"]["objective"]["weighting"] == "min_snr"


def test_a_base_that_predicts_noise_is_not_shown_noise_alone(resident: ResidentBase) -> None:
    run = Run.model_validate(
        {
            "subject": {"name": "rex", "class": "dog", "images": ["x"]},
            "train": {"objective": {"zero_terminal_snr": True}},
        }
    )
    with pytest.raises(UserError, match="predicts the noise"):
        trained_scheduler(resident.info.scheduler, run.train.objective)


def test_what_was_trained_down_to_no_signal_is_drawn_from_there_by_us_and_by_stock_diffusers(
    tiny_base_v: Path, tmp_path: Path, make_lease: Callable[..., Lease]
) -> None:
    from training.artifact import write_weights

    info = open_base(str(tiny_base_v))
    base = ResidentBase.load(str(tiny_base_v), info.revision, torch.device("cpu"))
    lease = make_lease(base, train={"method": "full", "objective": {"zero_terminal_snr": True}})
    module = build_module(base, lease.recipe, lease, 0)
    assert float(module.schedule.alphas_cumprod[-1]) == 0.0
    write_weights(info, lease.recipe, module.unet, module.text_encoder or base.text_encoder, tmp_path)
    manifest = {"base": {"revision": info.revision}, "recipe": lease.run}
    studio = Studio(info, "cpu")
    request = DrawRequest("a photo of a dog", 7, steps=6, guidance=3.0)
    outfit = studio.read(tmp_path, manifest)
    row = studio.row(request, outfit)
    assert row.table.timesteps[0] == 999 and row.table.levels[0] == 0.0
    while not row.done:
        studio.step([row])
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(7)
    drawn = pipe(
        request.prompt, generator=generator, num_inference_steps=6, guidance_scale=3.0, output_type="np"
    ).images[0]
    apart = np.abs(studio.pixels(row.x).astype(int) - (drawn * 255).round().astype(int))
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.01


def test_a_photos_own_caption_goes_with_each_of_its_images(
    resident: ResidentBase, make_lease: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.lease.fetch", list)
    texts = ["a zwx dog, asleep", "a zwx dog, in snow"]
    ids = token_ids(load_tokenizer(resident.info), texts, resident.info.token_limit).tolist()
    data, train = {"flip": True}, {**LORA, "captions": "files"}
    lease = make_lease(resident, train=train, data=data)
    blocks = [{"mean": t.mean, "std": t.std} for t in (table(1, 4), table(2, 5))]
    lease = replace(lease, caption_ids=ids, subject_latents=blocks[:1], class_latents=blocks[1:])
    batches = Batches.of(lease, resident.info, torch.device("cpu"), 0, 1)
    for batch in (*batches.of_step(0), *batches.of_validation(4)):
        plan = batches.plan.rows(0, 0, 1) if len(batch.role) == 8 and int(batch.sample_index[0]) < 8 else None
        for i, row in enumerate(plan or []):
            expected = ids[row.table_row // 2] if row.role is Role.SUBJECT else list(lease.class_ids)
            assert batch.token_ids[i].tolist() == expected
    assert {tuple(row) for row in batch.token_ids.tolist()} == {*map(tuple, ids), tuple(lease.class_ids)}


def test_templates_take_turns_at_random_and_alike_in_a_bank(
    resident: ResidentBase, made: Callable[..., tuple[Lease, Batches]]
) -> None:
    texts = ["a zwx dog", "the photo of a zwx dog"]
    ids = token_ids(load_tokenizer(resident.info), texts, resident.info.token_limit).tolist()
    lease, batches = made({}, train={"templates": ["{subject}", "the photo of {subject}"]})
    lease = replace(lease, caption_ids=ids)
    batches = replace(batches, token_ids=torch.tensor(lease.prompts), templates=2)
    seen: dict[tuple[int, ...], int] = {}
    for step in range(12):
        [batch] = batches.of_step(step)
        for role, row in zip(batch.role.tolist(), batch.token_ids.tolist(), strict=True):
            assert role == Role.SUBJECT or row == list(lease.class_ids)
            if role == Role.SUBJECT:
                seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    assert seen.keys() == {tuple(lease.subject_ids), *map(tuple, ids)} and min(seen.values()) > 5
    module = build_module(resident, lease.recipe, lease, 0)
    bank = Bank(resident, lease.recipe, 2)
    other, [rows] = made({})[0], batches.of_step(0)
    for slot, taken in enumerate((other, lease)):
        bank.take(slot, taken.recipe, taken.prompts)
        bank.adapters.start(slot, taken.recipe.train.seed)
    losses = bank(stack([None, rows], 8))
    assert float(losses.loss[1].detach()) == pytest.approx(float(module(rows)[0].detach()), rel=1e-5)


@pytest.mark.parametrize(
    "lora", [{"kind": "lokr", "rank": 4}, {"kind": "oft", "rank": 4}, {"dora": True, "rank": 4}]
)
def test_a_run_of_another_kind_ends_and_is_drawn(
    make_job: Callable[..., Lease],
    alone: Callable[..., dict[str, Any]],
    storage: Storage,
    resident: ResidentBase,
    lora: dict[str, Any],
) -> None:
    train = {"steps": 3, "lr": 1e-2, "pairs_per_step": 2, "lora": lora}
    job = replace(make_job("rex", train=train, validate=OFF, checkpoint={"every": 2}), sample_ids=())
    assert alone(job)["metrics"]["loss_subject"] > 0
    studio = Studio(resident.info, "cpu")
    rows = [studio.row(DrawRequest("a zwx dog", 7, steps=2), PLAIN)]
    with open_artifact(storage, "rex", "v1") as artifact:
        rows.append(
            studio.row(DrawRequest("a zwx dog", 7, steps=2), studio.read(artifact.folder, artifact.manifest))
        )
    for row in rows:
        while not row.done:
            studio.step([row])
    assert float((rows[0].x - rows[1].x).abs().max()) > 1e-3
    assert bankable(job.recipe, 1) in ("train.lora.kind", "train.lora.dora")
