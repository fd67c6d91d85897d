"""A recipe that changes on its way: what is in force when, what is refused, and that the step alone decides it.

Restarts and ZeRO: the recipe of `test_resume.py` is one.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.errors import UserError
from cluster.storage import Storage
from orchestrator.space import sections
from orchestrator.spec import parse_run
from orchestrator.tracking import flatten
from training import checkpoint
from training.bank_key import bankable
from training.change_settings import CHANGEABLE, Change
from training.changes import course, in_force, prior_course, settled
from training.dataplan import DataPlan, Role
from training.lease import Lease
from training.recipe import Run

Trained = dict[str, Any]
OFF = {"every": 0}
CHANGES = [
    {"after": 2, "train": {"lr": 3e-4, "weight_decay": 0.5, "text_encoder": {"lr": 5e-4}}},
    {"after": 3, "train": {"max_grad_norm": 0.01}, "prior": {"weight": 0.25}},
]
TRAIN: dict[str, Any] = {
    "steps": 5,
    "lr": 1e-3,
    "pairs_per_step": 3,
    "lr_scheduler": "cosine",
    "warmup_steps": 1,
    "text_encoder": {"train": True, "lr": 1e-4},
    "changes": CHANGES,
}


def run_of(train: dict[str, Any], **others: Any) -> Run:
    subject = {"name": "rex", "class": "dog", "images": ["x"]}
    return parse_run({"subject": subject, "train": train, **others})


def test_what_a_change_says_is_in_force_from_its_step_on() -> None:
    run = run_of(TRAIN)
    settings, weights = course(run.train), prior_course(run.train, run.prior.weight)
    told = [in_force(settings, step) for step in range(5)]
    assert [one.lr for one in told] == [1e-3, 1e-3, 3e-4, 3e-4, 3e-4]
    assert [one.text_encoder.lr for one in told] == [1e-4, 1e-4, 5e-4, 5e-4, 5e-4]
    assert [one.weight_decay for one in told] == [0.01, 0.01, 0.5, 0.5, 0.5]
    assert [one.max_grad_norm for one in told] == [1.0, 1.0, 1.0, 0.01, 0.01]
    assert [in_force(weights, step) for step in range(5)] == [1.0, 1.0, 1.0, 0.25, 0.25]
    assert all(one.steps == 5 and one.text_encoder.train for one in told)
    plan = DataPlan(0, 3, 5, 2, 1000, 1.0, prior_course=weights)
    of_class = [
        sum(row.weight for row in plan.rows(step, 0, 1) if row.role is Role.CLASS) for step in range(5)
    ]
    assert of_class == [1.0, 1.0, 1.0, 0.25, 0.25]
    assert bankable(run_of({"steps": 5}), 1) is None
    assert bankable(run_of({"steps": 5, "changes": CHANGES[1:]}), 1) == "train.changes"


def test_a_change_says_what_can_be_changed_and_is_written_down_without_the_rest() -> None:
    flat = dict.fromkeys(CHANGEABLE, 0.5)
    change = Change.model_validate({"after": 7, **sections(flat)})
    assert flatten(change.model_dump()) == {"after": 7, **flat}
    assert Change(after=7).model_dump(mode="json") == {"after": 7}
    run = run_of(TRAIN)
    assert Run.model_validate(run.model_dump(mode="json", by_alias=True)) == run


@pytest.mark.parametrize(
    ("changes", "others", "what"),
    [
        ([{"after": 5, "train": {"lr": 1e-4}}], {}, "train.changes.0 takes no effect"),
        ([{"after": 3, "train": {"lr": 1e-4}}] * 2, {}, "train.changes.1.after is not above that"),
        ([{"after": 3}], {}, "train.changes.0 changes nothing"),
        ([{"after": 3, "train": {"max_grad_norm": None}}], {}, "train.changes.0 changes nothing"),
        ([{"after": 0, "train": {"lr": 1e-4}}], {}, "train.changes.0.after cannot be used"),
        ([{"after": 3, "train": {"steps": 9}}], {}, "train.changes.0.train.steps is not a setting"),
        ([{"after": 3, "prior": {"weight": 0}}], {}, "train.changes.0.prior.weight cannot be used"),
        (
            [{"after": 3, "prior": {"weight": 0.5}}],
            {"prior": {"weight": 0}},
            "train.changes.0.prior.weight cannot be had",
        ),
        (
            [{"after": 3, "train": {"text_encoder": {"lr": 1e-4}}}],
            {},
            "train.changes.0.train.text_encoder.lr takes no effect",
        ),
        (
            [{"after": 3, "train": {"new_tokens": {"lr": 1e-4}}}],
            {},
            "train.changes.0.train.new_tokens.lr takes no effect",
        ),
        (
            [{"after": 3, "train": {"lr": 1e-4}}],
            {"train": {"optimizer": {"name": "prodigy"}}},
            "train.lr is too low for prodigy",
        ),
    ],
)
def test_a_change_that_cannot_be_had_or_does_nothing_is_refused(
    changes: list[Any], others: dict[str, Any], what: str
) -> None:
    train = {"steps": 5, **others.pop("train", {}), "changes": changes}
    with pytest.raises(UserError) as refused:
        run_of(train, **others)
    assert refused.value.what.startswith(what)


def test_rates_of_parts_that_have_stopped_are_settled_and_cannot_be_changed() -> None:
    parts = {"text_encoder": {"train": True, "stop_after": 2}, "new_tokens": {"count": 1, "stop_after": 3}}
    rates = ["train.text_encoder.lr", "train.new_tokens.lr"]
    train = run_of({"steps": 5, **parts}).train
    assert [settled(train, after) for after in (1, 2, 3)] == [[], rates[:1], rates]
    assert settled(run_of(TRAIN).train, 5) == []
    for rate, last in zip(rates, (1, 2), strict=True):
        for after in range(1, 5):
            change = {"after": after, **sections({rate: 1e-4})}
            with nullcontext() if after <= last else pytest.raises(UserError, match="takes no effect"):
                run_of({"steps": 5, **parts, "changes": [change]})


# -- trained -------------------------------------------------------------------------------------------------


def rows(*trained: Trained) -> list[Any]:
    told = [row for part in trained for kind, payload in part["events"] if kind == "steps" for row in payload]
    found = {row["step"]: row for row in told}
    return [[found[step][key] for key in ("loss_class", "grad_norm", "lr")] for step in sorted(found)]


def test_a_run_that_takes_over_a_checkpoint_ends_as_one_that_was_trained_so_from_its_first_step(
    make_job: Callable[..., Lease],
    alone: Callable[..., Trained],
    storage: Storage,
    weights: Callable[[str], dict[str, bytes]],
) -> None:
    whole = alone(make_job("whole", train=TRAIN, validate=OFF))
    plain = alone(make_job("plain", train={**TRAIN, "changes": []}, validate=OFF))
    donor = make_job("donor", train={**TRAIN, "changes": CHANGES[:1]}, validate=OFF)
    first = alone(replace(donor, until=3))
    heir = make_job("heir", train=TRAIN, validate=OFF)
    for _ in range(2):  # again, as after a crash
        assert checkpoint.adopt(
            storage, heir.run_path, heir.fingerprint, donor.run_path, donor.fingerprint, 3
        )
    assert not checkpoint.adopt(storage, "runs/none/v1", "f", donor.run_path, donor.fingerprint, 2)
    assert not checkpoint.adopt(storage, "runs/none/v1", "f", donor.run_path, "another", 3)
    second = alone(heir)
    assert dict(second["events"])["started"]["from_step"] == 3
    assert weights("heir") == weights("whole") != weights("plain")
    assert rows(first, second) == rows(whole)
    assert second["metrics"] == whole["metrics"]  # the figures of the steps before went along
    # what was changed is what is different, and nothing before it is
    assert rows(whole)[:2] == rows(plain)[:2]
    assert rows(whole)[2][2] == pytest.approx(0.3 * rows(plain)[2][2])
    assert all(torch.isfinite(torch.tensor(row)).all() for row in rows(whole))
