"""Runs in a bank are trained as each would be alone, and none of them notices the others."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import SystemFailure
from cluster.storage import Storage
from training import checkpoint
from training.artifact import open_artifact
from training.bank import Bank, stack
from training.bank_key import bank_key, bankable
from training.bank_run import train_bank
from training.batches import Batches
from training.calibrate import choose_width
from training.checkpoint import State
from training.lease import Lease
from training.loop import ResidentBase, build_module
from training.wish import Wish

Trained = dict[str, Any]
Events = list[tuple[str, Any]]
TRAIN: dict[str, Any] = {"steps": 5, "lr": 1e-3, "pairs_per_step": 2, "lora": {"rank": 4, "alpha": 4.0}}
OFF = {"every": 0}


class Together:
    """Trains jobs in one bank in this process."""

    def __init__(self, base: ResidentBase) -> None:
        self.base = base

    def __call__(
        self,
        *slots: Lease | None,
        wishes: Mapping[int, Wish] | None = None,
        drops: Mapping[int, frozenset[int]] | None = None,
    ) -> tuple[bool, list[Events]]:
        """Whether it was done, and the events of each slot; wishes and drops come at steps of the bank from 0."""
        events: list[Events] = [[] for _ in slots]
        steps = {"wish": -1, "drop": -1}

        def wish() -> Wish:
            steps["wish"] += 1
            return (wishes or {}).get(steps["wish"], Wish.NONE)

        def dropped() -> frozenset[int]:
            steps["drop"] += 1
            return (drops or {}).get(steps["drop"], frozenset())

        done = train_bank(slots, self.base, lambda n, *event: events[n].append(event), wish, dropped)
        return done, events


@pytest.fixture
def together(group: None, resident: ResidentBase, monkeypatch: pytest.MonkeyPatch) -> Together:
    monkeypatch.setattr("training.lease.fetch", list)
    return Together(resident)


def of_kind(events: Events, kind: str) -> list[Any]:
    return [payload for event, payload in events if event == kind]


def rows(*told: Events) -> dict[int, list[float]]:
    """Losses, norm and rate of each step."""
    every = [row for events in told for part in of_kind(events, "steps") for row in part]
    return {row["step"]: [row[k] for k in ("loss_subject", "loss_class", "grad_norm", "lr")] for row in every}


def weights(storage: Storage, name: str) -> dict[str, torch.Tensor]:
    with open_artifact(storage, name, "v1") as artifact:
        return load_file(artifact.folder / "pytorch_lora_weights.safetensors")


def bits(storage: Storage, name: str) -> dict[str, bytes]:
    return {key: tensor.numpy().tobytes() for key, tensor in weights(storage, name).items()}


def close(ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for key, value in theirs.items():
        assert np.allclose(np.asarray(ours[key]), np.asarray(value), rtol=1e-5, atol=1e-5), key


def near(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """On the whole: where a gradient is next to nothing, Adam makes a step of its last digits."""
    assert ours.keys() == theirs.keys() and ours
    for key, value in theirs.items():
        assert (ours[key] - value).abs().mean() < 1e-6, key


DIFFERENT: list[dict[str, Any]] = [
    {"train": {**TRAIN, "seed": 1, "lr_scheduler": "cosine", "warmup_steps": 2}},
    {"train": {**TRAIN, "seed": 2, "lr": 3e-3, "max_grad_norm": 0.05, "weight_decay": 0.1}},
    {
        "train": {**TRAIN, "seed": 3, "steps": 4, "max_grad_norm": None, "lora": {"rank": 4, "alpha": 2.0}},
        "prior": {"weight": 0.5},
    },
]


@pytest.mark.parametrize("prior", [True, False])
def test_each_run_has_the_losses_gradients_and_weights_that_it_has_alone(
    prior: bool,
    make_job: Callable[..., Lease],
    alone: Callable[..., Trained],
    together: Together,
    storage: Storage,
) -> None:
    validate = {"every": 5, "samples": 3}
    weight = {"prior": {"weight": 0.0}} if not prior else {}
    one, both = (
        [make_job(f"{prefix}{n}", validate=validate, **{**s, **weight}) for n, s in enumerate(DIFFERENT)]
        for prefix in ("alone", "bank")
    )
    if not prior:
        one, both = ([replace(job, class_latents=[]) for job in jobs] for jobs in (one, both))
    done, told = together(*both)
    assert done
    for number, (job, events) in enumerate(zip(one, told, strict=True)):
        reference = alone(job)
        close(rows(events), rows(reference["events"]))
        near(weights(storage, f"bank{number}"), weights(storage, f"alone{number}"))
        [published] = of_kind(events, "published")
        close(published["metrics"], reference["metrics"])
        mine, theirs = (storage.manifest(f"artifacts/{kind}{number}/v1") for kind in ("bank", "alone"))
        assert mine and theirs and mine.keys() == theirs.keys()
        assert mine["files"].keys() == theirs["files"].keys()


def test_every_gradient_is_that_of_peft(
    make_job: Callable[..., Lease], resident: ResidentBase, together: Together
) -> None:
    jobs = [make_job(f"job{n}", **sections) for n, sections in enumerate(DIFFERENT)]
    bank = Bank(resident, jobs[0].recipe, len(jobs))
    rows, references = [], []
    for slot, job in enumerate(jobs):
        module = build_module(resident, job.recipe, job, 0)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for p in trained.values():
            torch.nn.init.normal_(p, std=0.1)  # with B at zero there is no gradient of A
        values = {name: p.detach() for name, p in trained.items()}
        bank.adapters.load(slot, State(0, values, values, values))
        bank.take(slot, job.recipe, job.prompts)
        [batch] = Batches.of(job, resident.info, torch.device("cpu"), 0, 1).of_step(slot)
        loss, *parts = module(batch)
        loss.backward()
        references.append((torch.stack((loss, *parts)), {name: p.grad for name, p in trained.items()}))
        rows.append(batch)
    losses = bank(stack(rows, rows=4))
    losses.loss.sum().backward()
    of = bank.adapters
    of.values.copy_(of.gradients)  # to be named and shaped
    for slot, (reference, gradients) in enumerate(references):
        ours = torch.stack((losses.loss, losses.subject, losses.of_class))[:, slot]
        assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-6)
        close(of.state(slot, 0).parameters, gradients)


def test_no_run_notices_what_becomes_of_another(
    make_job: Callable[..., Lease], together: Together, storage: Storage
) -> None:
    def pair(name: str, **changed: Any) -> tuple[Lease, Lease]:
        other = make_job(f"{name}-other", train={**TRAIN, "seed": 7, **changed}, validate=OFF)
        return other, make_job(name, train=TRAIN, validate=OFF, checkpoint={"every": 2})

    _, calm = pair("calm")
    together(None, calm)
    short, beside_short = pair("short", steps=2)
    together(short, beside_short)
    damaged, beside_damaged = pair("damaged")
    table = {key: value.copy() for key, value in damaged.subject_latents[0].items()}
    table["mean"][1] = np.nan
    _, (failed, _) = together(replace(damaged, subject_latents=[table]), beside_damaged)
    unwanted, beside_unwanted = pair("unwanted")
    _, (dropped, _) = together(unwanted, beside_unwanted, drops={3: frozenset({0})})
    for name in ("short", "damaged", "unwanted"):
        assert bits(storage, name) == bits(storage, "calm"), name
    assert bits(storage, "short-other")
    [error] = of_kind(failed, "failed")
    good = [row["step"] for part in of_kind(failed, "steps") for row in part]
    assert error["what"] == f"the training diverged at step {len(good) + 1}" and "two.png" in error["seen"]
    assert error["kind"] == "bad_input" and not storage.manifest("artifacts/damaged-other/v1")
    assert of_kind(dropped, "dropped") == [{"step": 3}]
    assert not checkpoint.steps_saved(storage, "runs/unwanted-other/v1")


def test_the_place_in_a_bank_does_not_matter(
    make_job: Callable[..., Lease], together: Together, storage: Storage
) -> None:
    jobs = [make_job(f"place{n}", train=TRAIN, validate=OFF) for n in range(3)]
    together(*jobs)
    assert bits(storage, "place0") == bits(storage, "place1") == bits(storage, "place2")


@pytest.mark.resume
def test_a_bank_that_was_left_goes_on_to_the_bits_of_one_that_stayed(
    make_job: Callable[..., Lease], together: Together, storage: Storage
) -> None:
    def jobs(name: str, validate: dict[str, Any]) -> list[Lease]:
        return [
            make_job(f"{name}{n}", validate=validate, checkpoint={"every": 2}, **sections)
            for n, sections in enumerate(DIFFERENT)
        ]

    _, calm = together(*jobs("calm", OFF))
    hurt = jobs("hurt", {"every": 5, "samples": 3})
    done, left = together(*hurt, wishes={0: Wish.CHECKPOINT, 2: Wish.LEAVE})
    assert not done and [of_kind(events, "left") for events in left] == [[{"step": 3}]] * 3
    assert [said["why"] for said in of_kind(left[0], "checkpoint")] == ["asked", "schedule", "leaving"]
    # now every run has another step: one starts again, one goes on, one is one step short of its end
    checkpoint.delete(storage, "runs/hurt0/v1")
    done, went_on = together(*hurt)
    assert done
    assert [of_kind(events, "started")[0]["from_step"] for events in went_on] == [0, 3, 3]
    for number in range(3):
        assert bits(storage, f"hurt{number}") == bits(storage, f"calm{number}")
        assert rows(left[number], went_on[number]) == rows(calm[number])
    _, again = together(*hurt)
    assert [kind for kind, _ in again[0]] == ["steps", "published"]
    assert rows(again[0]) == rows(calm[0])


@pytest.mark.resume
def test_a_run_goes_on_in_a_bank_and_from_a_bank_alone(
    make_job: Callable[..., Lease], alone: Callable[..., Trained], together: Together, storage: Storage
) -> None:
    job = {"train": TRAIN, "validate": OFF}
    calm, into, out_of = (make_job(name, **job) for name in ("calm", "into", "out"))
    reference = alone(calm)
    left = alone(into, {0: {0: Wish.LEAVE}})
    assert left["metrics"] is None
    _, (went_in,) = together(into)
    assert of_kind(went_in, "started")[0]["from_step"] == 3
    close(rows(left["events"], went_in), rows(reference["events"]))
    _, (left_bank,) = together(out_of, wishes={1: Wish.LEAVE})
    went_out = alone(out_of)
    assert of_kind(went_out["events"], "started")[0]["from_step"] == 2
    close(rows(left_bank, went_out["events"]), rows(reference["events"]))
    for name in ("into", "out"):
        near(weights(storage, name), weights(storage, "calm"))


def test_an_artifact_that_cannot_be_written_fails_its_run_alone(
    make_job: Callable[..., Lease], together: Together, storage: Storage
) -> None:
    jobs = [make_job(name, train=TRAIN, validate=OFF) for name in ("rex", "tom")]
    storage.write("artifacts/rex", b"in the way")
    done, (rex, tom) = together(*jobs)
    assert done and of_kind(rex, "failed")[0]["kind"] == "system" and of_kind(tom, "published")


@pytest.mark.parametrize("engine", [{"gradient_checkpointing": True}, {"precision": "bf16"}])
def test_other_ways_to_compute_agree_with_those_of_a_run_alone(
    engine: dict[str, Any], make_job: Callable[..., Lease], alone: Callable[..., Trained], together: Together
) -> None:
    train = {**TRAIN, "steps": 2}
    reference = alone(make_job("one", train=train, validate=OFF, engine=engine))
    _, (told, _) = together(make_job("two", train=train, validate=OFF, engine=engine), None)
    tolerance = 1e-5 if "precision" not in engine else 2e-2
    ours, theirs = (list(rows(events).values()) for events in (told, reference["events"]))
    assert np.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_runs_that_do_not_fit_together_are_refused(
    make_job: Callable[..., Lease], together: Together
) -> None:
    rank = {**TRAIN, "lora": {"rank": 2}}
    with pytest.raises(SystemFailure, match="do not fit together"):
        together(make_job("rex", train=TRAIN, validate=OFF), make_job("tom", train=rank, validate=OFF))


@pytest.mark.parametrize(
    ("sections", "setting"),
    [
        ({}, None),
        ({"train": {"lr": 1.0, "seed": 5, "steps": 9}, "prior": {"weight": 0.1}}, None),
        ({"validate": {"every": 100, "prompts": []}}, None),
        ({"train": {"method": "full"}}, "train.method"),
        ({"train": {"text_encoder": {"train": True}}}, "train.text_encoder.train"),
        ({"train": {"ema_decay": 0.9}}, "train.ema_decay"),
        ({"train": {"accumulation": 2, "pairs_per_step": 2}}, "train.accumulation"),
        ({"train": {"lora": {"targets": ["to_q", "proj_in"]}}}, "train.lora.targets"),
        ({"engine": {"zero_stage": 1}}, "engine.zero_stage"),
        ({"cluster": {"workers": 2}}, "cluster.workers"),
        ({"validate": {"every": 100}}, "validate.every"),
    ],
)
def test_what_keeps_a_run_out_of_a_bank(
    sections: dict[str, Any], setting: str | None, make_job: Callable[..., Lease]
) -> None:
    run = make_job("rex", **{"validate": OFF, **sections}).recipe
    assert bankable(run, run.cluster.workers) == setting
    assert (bank_key(run, "r") is None) == (setting is not None)


def test_what_has_to_be_equal_in_a_bank(make_job: Callable[..., Lease]) -> None:
    def key(**sections: Any) -> str | None:
        return bank_key(make_job("rex", **{"validate": OFF, **sections}).recipe, "r")

    same = key()
    assert (
        key(train={"lr": 1.0, "seed": 5, "steps": 9, "lora": {"alpha": 1.0}}, prior={"weight": 0.1}) == same
    )
    different = [
        key(train={"pairs_per_step": 3}),
        key(train={"lora": {"rank": 2}}),
        key(train={"lora": {"targets": ["to_q"]}}),
        key(prior={"weight": 0.0}),
        key(engine={"precision": "bf16"}),
        key(engine={"gradient_checkpointing": True}),
    ]
    assert len({same, *different}) == len(different) + 1


def test_a_short_slot_is_filled_up_with_rows_of_no_weight(
    make_batches: Callable[..., Any], make_job: Callable[..., Lease], resident: ResidentBase
) -> None:
    [batch] = make_batches(make_job("rex", train=TRAIN), resident).of_step(0)
    stacked = stack([None, batch], rows=6)
    assert len(stacked.role) == 12 and torch.equal(stacked.latents[6:10], batch.latents)
    assert not stacked.weight[:6].any() and not stacked.weight[10:].any()


def test_the_width_is_chosen_by_speed_and_memory(
    make_job: Callable[..., Lease], resident: ResidentBase, together: Together, storage: Storage
) -> None:
    job = make_job("rex", train={**TRAIN, "steps": 2}, validate=OFF)
    found = choose_width(job, resident, None, most=4)
    assert found.width in found.seconds and found.seconds.keys() == found.bytes.keys()
    assert 1.5 < found.bytes[2] / found.bytes[1] < 2.5
    assert choose_width(job, resident, room_bytes=0).seconds.keys() == {1}
    assert not storage.exists("runs") and not storage.exists("artifacts")
