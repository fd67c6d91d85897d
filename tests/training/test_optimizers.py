"""Optimizers besides AdamW: each beside its package used by hand, left and gone on with, and where it cannot be had."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cluster.errors import UserError
from cluster.storage import Storage
from training.artifact import open_artifact
from training.bank_key import bankable
from training.batches import Batches
from training.checkpoint import State, latest, save
from training.engine import TrainingEngine, zero_stage
from training.lease import Lease
from training.loop import ResidentBase, build_module
from training.memory import estimate
from training.optimizer_settings import Optimizer, refuse_missing, state_bytes
from training.optimizers import make_optimizer
from training.pipeline import open_base
from training.recipe import Engine, Run, Train
from training.wish import Wish

OTHERS = ("adamw-8bit", "adafactor", "lion", "prodigy", "adamw-schedulefree")
HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(
    not HAS_BITSANDBYTES, reason="bitsandbytes is not installed: pip install 'raybooth[bitsandbytes]'"
)
INSTALLED = tuple(name for name in OTHERS if HAS_BITSANDBYTES or name != "adamw-8bit")


def of_need(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return (needs_bitsandbytes,) if name == "adamw-8bit" else ()


RATES = {"prodigy": {"lr": 1.0, "text": 1.0}}  # which finds one for both
FULL = {"method": "full", "pairs_per_step": 2, "max_grad_norm": 0.5, "weight_decay": 0.1, "warmup_steps": 2}

pytestmark = pytest.mark.usefixtures("group")

Made = tuple[TrainingEngine, Batches]


def settings(name: str, **more: Any) -> dict[str, Any]:
    """A `train` section in which everything is trained with an optimizer."""
    rates = RATES.get(name, {"lr": 1e-3, "text": 1e-4})
    text = {"train": True, "lr": rates["text"]}
    return {**FULL, "lr": rates["lr"], "text_encoder": text, "optimizer": {"name": name}, **more}


@pytest.fixture
def make(
    resident: ResidentBase, make_lease: Callable[..., Lease], make_batches: Callable[..., Batches]
) -> Callable[..., Made]:
    """An engine on the tiny base, with its batches."""

    def made(
        name: str, state: State | None = None, stage: int = 0, offload: bool = False, **train: Any
    ) -> Made:
        lease = make_lease(resident, train=settings(name, **train))
        batches = make_batches(lease, resident)
        module = build_module(resident, lease.recipe, lease, stage)
        return TrainingEngine(module, lease.recipe.train, stage, batches.per_step, state, offload), batches

    return made


def steps(made: Made, first: int, last: int) -> list[list[float]]:
    engine, batches = made
    reports = [engine.step(step, list(batches.of_step(step))) for step in range(first, last)]
    return [[*report.figures[:3].tolist(), report.lr] for report in reports]


def copied(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def whole(state: State) -> dict[str, torch.Tensor]:
    parts = {"p": state.parameters, "m": state.first_moments, "v": state.second_moments}
    parts |= {"e": state.average or {}, "o": state.optimizer}
    return {f"{part}/{name}": t.clone() for part, named in parts.items() for name, t in named.items()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=of_need(name)) for name in OTHERS])
def test_a_run_trains_as_the_package_does_by_hand(
    name: str, make: Callable[..., Made], resident: ResidentBase, make_lease: Callable[..., Lease]
) -> None:
    engine, batches = made = make(name)
    figures = steps(made, 0, 4)
    lease = make_lease(resident, train=settings(name))
    train, module = lease.recipe.train, build_module(resident, lease.recipe, lease, 0)
    parts = module.parameter_groups()
    groups = [
        {"params": parts["unet"], "lr": train.lr},
        {"params": parts["text_encoder"], "lr": train.text_encoder.lr},
    ]
    plain = make_optimizer(train.optimizer, groups, train.weight_decay)
    losses = []
    for step in range(4):
        for group, lr in zip(plain.param_groups, (train.lr, train.text_encoder.lr), strict=True):
            group["lr"] = lr * min(1.0, (step + 1) / 3)
        plain.zero_grad()
        [batch] = batches.of_step(step)
        loss, subject, of_class = module(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(list(module.parameters()), 0.5)
        plain.step()
        losses.append([float(subject), float(of_class)])
    assert torch.allclose(torch.tensor([row[:2] for row in figures]), torch.tensor(losses), atol=1e-5)
    ours, theirs = engine.state(4).parameters, dict(module.named_parameters())
    assert all(torch.allclose(ours[n], theirs[n], atol=2e-5) for n in ours)
    start = dict(build_module(resident, lease.recipe, lease, 0).named_parameters())
    assert sum(not torch.equal(ours[n], start[n]) for n in ours) > 0.9 * len(ours)


@pytest.mark.resume
@pytest.mark.parametrize(
    ("name", "stage"),
    [pytest.param(name, 2 if name == "lion" else 0, marks=of_need(name)) for name in OTHERS],
)
def test_six_steps_are_three_a_checkpoint_and_three_bit_for_bit(
    name: str, stage: int, make: Callable[..., Made], tmp_path: Path
) -> None:
    storage = Storage(str(tmp_path / "storage"))
    straight = make(name, stage=stage)
    expected = steps(straight, 0, 6)
    first = make(name, stage=stage)
    figures = steps(first, 0, 3)
    with first[0].evaluating():
        published = copied(first[0].module.state_dict())
    save(storage, "runs/rex/v1", first[0].state(3), "f", keep=1)
    first[0].close()
    state = latest(storage, "runs/rex/v1", "f", pytest.fail)
    assert state is not None
    assert all(torch.equal(state.weights[n], published[n]) for n in state.weights)
    second = make(name, state, stage)
    with second[0].evaluating():  # before its first step
        again = copied(second[0].module.state_dict())
    assert all(torch.equal(again[n], published[n]) for n in again)
    figures += steps(second, 3, 6)
    assert figures == expected
    ours, theirs = whole(second[0].state(6)), whole(straight[0].state(6))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.resume
@pytest.mark.parametrize("name", ["prodigy", "adamw-schedulefree"])
def test_a_run_that_was_left_publishes_what_one_that_was_not_does(
    name: str, make_job: Callable[..., Lease], alone: Callable[..., Any], storage: Storage
) -> None:
    train = settings(name, method="lora", steps=4)
    drawn = {"every": 2, "samples": 3, "steps": 2, "num_images": 1, "guidance": 2.0}
    calm = alone(make_job("calm", train=train, validate=drawn))
    left = alone(make_job("hurt", train=train, validate=drawn), {0: {0: Wish.LEAVE}})
    assert left["metrics"] is None and calm["metrics"]
    went_on = alone(make_job("hurt", train=train, validate=drawn))
    assert went_on["metrics"] == calm["metrics"]
    artifacts = []
    for subject in ("calm", "hurt"):
        with open_artifact(storage, subject, "v1") as artifact:
            [file] = artifact.folder.glob("*.safetensors")
            artifacts.append(copied(load_file(file)))
    assert all(torch.equal(artifacts[0][n], artifacts[1][n]) for n in artifacts[0])


def test_what_schedule_free_trains_is_not_what_it_publishes(make: Callable[..., Made]) -> None:
    engine, _ = made = make("adamw-schedulefree")
    steps(made, 0, 3)
    trained, state = copied(engine.module.state_dict()), engine.state(3)
    with engine.evaluating():
        shown = copied(engine.module.state_dict())
    after = copied(engine.module.state_dict())
    assert all(torch.equal(after[n], trained[n]) for n in trained)
    # Source: Schedule-Free (arXiv 2405.15682) eq. 2, x of y and z
    for name, y in state.parameters.items():
        x = (y - (1 - 0.9) * state.optimizer[f"z/{name}"]) / 0.9
        assert torch.allclose(shown[name], x, atol=1e-5)
    assert any(not torch.equal(shown[n], trained[n]) for n in shown)


def test_lion_gives_the_same_losses_at_every_stage_and_offloaded(make: Callable[..., Made]) -> None:
    runs = []
    for stage, offload in ((0, False), (2, True), (3, False)):
        made = make("lion", stage=stage, offload=offload)
        runs.append(torch.tensor(steps(made, 0, 2)))
        made[0].close()
    assert all(torch.allclose(run, runs[0], atol=1e-5) for run in runs[1:])


def test_the_memory_plan_knows_every_byte_of_a_state(tiny_base: Path) -> None:
    shapes = ((8, 4, 3, 3), (5000,), (16,), (70, 60))
    for name in ("adamw", *INSTALLED):
        parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = Optimizer(name=name)  # type: ignore[arg-type]
        made = make_optimizer(optimizer, [{"params": parameters, "lr": 0.1}], 0.0)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        made.step()
        state = [(key, value) for held in made.state.values() for key, value in held.items()]
        own = [t for key, t in state if isinstance(t, torch.Tensor) and t.dim() and "qmap" not in key]
        assert state_bytes(optimizer, shapes) == sum(t.nbytes for t in own), name
    found = {}
    for name in ("adamw", "adafactor", "prodigy"):
        spec = {"subject": {"name": "rex", "class": "dog", "images": ["x"]}, "train": settings(name)}
        run = Run.model_validate({**spec, "validate": {"every": 0}})
        found[name] = estimate(open_base(str(tiny_base)), run, "cpu", 1).optimizer
    assert found["prodigy"] == 2 * found["adamw"] and found["adafactor"] < 0.3 * found["adamw"]


def test_prodigy_tells_the_rate_that_it_found(make: Callable[..., Made]) -> None:
    rates = [row[3] for row in steps(make("prodigy", warmup_steps=0), 0, 6)]
    assert rates[0] == pytest.approx(1e-6) and rates == sorted(rates) and rates[-1] > 1.5 * rates[0]


@pytest.mark.slow
def test_two_workers_find_the_rate_that_one_does(
    make_job: Callable[..., Lease], alone: Callable[..., Any], pair: Any
) -> None:
    def told(name: str, train: Callable[..., Any]) -> torch.Tensor:
        done = train(make_job(name, train=settings("prodigy", steps=4), validate={"every": 0}))
        rows = [row for kind, payload in done["events"] if kind == "steps" for row in payload]
        assert dict(done["events"])["started"]["zero_stage"] == 0 and len(rows) == 4
        return torch.tensor([[row["loss_subject"], row["loss_class"], 1e4 * row["lr"]] for row in rows])

    def both(lease: Lease) -> Any:
        return pair(lease)[0]

    assert torch.allclose(told("one", alone), told("two", both), atol=1e-5)


def test_options_reach_the_optimizer() -> None:
    p = nn.Parameter(torch.zeros(4))
    for name, given in (
        ("adamw", {"betas": (0.5, 0.6), "eps": 1e-6}),
        ("adamw-8bit", {"betas": (0.5, 0.6), "eps": 1e-6}),
        ("adafactor", {"scale_parameter": True}),
        ("lion", {"betas": (0.5, 0.6)}),
        (
            "prodigy",
            {"d0": 1e-5, "d_coef": 2.0, "use_bias_correction": True, "safeguard_warmup": True, "eps": 1e-6},
        ),
        ("adamw-schedulefree", {"betas": (0.5, 0.6), "eps": 1e-6}),
    ):
        if name == "adamw-8bit" and not HAS_BITSANDBYTES:
            continue
        made = make_optimizer(Optimizer(name=name, **given), [{"params": [p], "lr": 0.5}], 0.2)  # type: ignore[arg-type]
        [group] = made.param_groups
        assert {**given, "lr": 0.5, "weight_decay": 0.2}.items() <= group.items()


def test_one_that_cannot_be_sharded_is_not() -> None:
    for name in OTHERS:
        train = Train.model_validate({"method": "full", "optimizer": {"name": name}})
        if name == "lion":
            assert zero_stage(Engine(), train, 2) == 2 and zero_stage(Engine(offload=True), train, 1) == 2
            continue
        assert zero_stage(Engine(), train, 2) == 0
        for engine in (Engine(zero_stage=2), Engine(offload=True)):
            with pytest.raises(UserError, match=f"cannot be had with train.optimizer.name: {name}"):
                zero_stage(engine, train, 2)


def test_a_bank_updates_as_adamw_does_and_takes_no_other(make_job: Callable[..., Lease]) -> None:
    run = make_job("rex", train={"optimizer": {"name": "lion"}}, validate={"every": 0}).recipe
    assert bankable(run, 1) == "train.optimizer"


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(UserError, match=r"prodigyopt is not installed.*pip install 'raybooth\[optimizers\]'"):
        refuse_missing(Optimizer(name="prodigy"))
    refuse_missing(Optimizer(name="adafactor"))


@needs_bitsandbytes
def test_where_bitsandbytes_does_not_run_it_is_refused() -> None:
    nowhere = nn.Parameter(torch.zeros(8, device="meta"))
    with pytest.raises(UserError, match="adamw-8bit does not run on meta here"):
        make_optimizer(Optimizer(name="adamw-8bit"), [{"params": [nowhere], "lr": 0.1}], 0.0)
