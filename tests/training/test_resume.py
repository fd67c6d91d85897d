"""A run that was interrupted ends as one that was not: whole runs of the loop, in plain processes."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.storage import Storage
from training.lease import Lease
from training.png import decode_png, tiles
from training.wish import Wish

# everything that a checkpoint has to bring back, the average and the position in the schedule with it
TRAIN = {
    "steps": 5,
    "lr": 1e-3,
    "pairs_per_step": 3,
    "lr_scheduler": "cosine",
    "warmup_steps": 1,
    "ema_decay": 0.9,
    "text_encoder": {"train": True, "lr": 1e-4},
    "changes": [
        {"after": 2, "train": {"weight_decay": 0.5, "text_encoder": {"lr": 3e-4}}},
        {"after": 3, "train": {"lr": 3e-4, "max_grad_norm": 0.05}, "prior": {"weight": 0.5}},
    ],
}
OFF: dict[str, Any] = {"every": 0}
ON: dict[str, Any] = {"every": 2, "samples": 3, "steps": 2, "num_images": 3, "guidance": 2.0}
LEAVE = {1: {0: Wish.LEAVE}}  # rank 1 wishes at its first step; all leave after the third

Trained = dict[str, Any]


def rows(*trained: Trained) -> dict[int, list[float]]:
    """Losses and gradient norm of each step, the last time it was told."""
    told = [row for part in trained for kind, payload in part["events"] if kind == "steps" for row in payload]
    return {row["step"]: [row[k] for k in ("loss_subject", "loss_class", "grad_norm", "lr")] for row in told}


def kinds(trained: Trained) -> list[str]:
    return [kind for kind, _ in trained["events"] if kind != "steps"]


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_workers_that_left_go_on_to_the_bits_of_those_that_stayed(
    stage: int,
    method: str,
    make_job: Callable[..., Lease],
    pair: Any,
    storage: Storage,
    weights: Callable[[str], dict[str, bytes]],
) -> None:
    sections = {"train": {**TRAIN, "method": method}, "engine": {"zero_stage": stage}}
    calm, _ = pair(make_job("calm", validate=OFF, **sections))
    # what this one validates and draws must not change a bit either
    hurt = make_job("hurt", validate=ON, **sections)
    left, too = pair(hurt, {1: {1: Wish.LEAVE}})  # heard at the validation after step 2
    assert left["metrics"] is too["metrics"] is None
    went_on, _ = pair(hurt)
    assert went_on["events"][1][1]["from_step"] == 2
    assert rows(left, went_on) == rows(calm) and len(rows(calm)) == 5
    assert weights("hurt") == weights("calm")


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize(("stage", "then"), [(0, 2), (2, 3), (3, 0)])
def test_another_stage_goes_on_with_the_same_losses(
    stage: int, then: int, make_job: Callable[..., Lease], pair: Any
) -> None:
    def job(name: str, zero_stage: int) -> Lease:
        return make_job(
            name, train={**TRAIN, "method": "full"}, engine={"zero_stage": zero_stage}, validate=OFF
        )

    calm, _ = pair(job("calm", 0))
    left, _ = pair(job("hurt", stage), LEAVE)
    went_on, _ = pair(job("hurt", then))
    ours, theirs = rows(left, went_on), rows(calm)
    assert ours.keys() == theirs.keys() and np.allclose(list(ours.values()), list(theirs.values()), atol=1e-5)


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_workers_goes_on_with_the_same_losses(
    first: int,
    then: int,
    make_job: Callable[..., Lease],
    alone: Callable[..., Trained],
    pair: Any,
    storage: Storage,
) -> None:
    def train(workers: int, lease: Lease, leaves: bool = False) -> Trained:
        if workers == 2:
            together: Trained = pair(lease, LEAVE if leaves else None)[0]
            return together
        return alone(lease, {0: LEAVE[1]} if leaves else None)

    sections = {"train": {**TRAIN, "method": "full"}, "validate": OFF}  # ZeRO is 0 on one worker, 2 on two
    calm = train(first, make_job("calm", **sections))
    left = train(first, make_job("hurt", **sections), leaves=True)
    went_on = train(then, make_job("hurt", **sections))
    ours, theirs = rows(left, went_on), rows(calm)
    assert ours.keys() == theirs.keys() and np.allclose(list(ours.values()), list(theirs.values()), atol=1e-5)
    told = [row for kind, payload in went_on["events"] if kind == "steps" for row in payload]
    assert [row["workers"] for row in told] == [first] * 3 + [then] * 2
    kept = [json.loads(line) for line in storage.read("runs/hurt/v1/figures.jsonl").splitlines()]
    assert kept == told


@pytest.mark.resume
def test_a_run_that_was_left_at_rungs_ends_as_one_that_was_not(
    make_job: Callable[..., Lease],
    alone: Callable[..., Trained],
    storage: Storage,
    weights: Callable[[str], dict[str, bytes]],
) -> None:
    sections = {"train": TRAIN, "validate": {**ON, "every": 5, "unguided": False}}
    calm = alone(make_job("calm", **sections))
    job = make_job("rung", **sections)
    first = alone(replace(job, until=2))
    again = alone(replace(job, until=2))  # asked twice, as after a crash: nothing is trained twice
    second = alone(replace(job, until=4))
    last = alone(job)
    assert kinds(first)[-3:] == ["validation", "sample", "checkpoint"]
    assert kinds(again) == kinds(first)[:-1] and dict(again["events"])["started"]["from_step"] == 2
    assert rows(first, second, last) == rows(calm) and weights("rung") == weights("calm")
    width = decode_png(storage.read("runs/rung/v1/samples/step_000002.png"))
    assert len(tiles(width, 3, len(width) // 16)) == 3 * (len(width) // 16)
