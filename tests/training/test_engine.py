"""An optimizer step, at ZeRO stages 0 to 3 on one worker; two workers are in test_gang.py."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from training.batches import Batches
from training.checkpoint import State, latest, save
from training.engine import TrainingEngine, compute_type, zero_stage
from training.lease import Lease
from training.loop import ResidentBase, build_module
from training.recipe import Engine, Train

FULL = {"method": "full", "lr": 1e-3, "text_encoder": {"train": True, "lr": 1e-4}, "pairs_per_step": 2}

pytestmark = pytest.mark.usefixtures("group")


class Rig:
    """An engine on the tiny base with its batches."""

    def __init__(
        self, lease: Lease, base: ResidentBase, batches: Batches, stage: int, state: State | None = None
    ) -> None:
        self.module = build_module(base, lease.recipe, lease, stage)
        self.before = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self.engine = TrainingEngine(self.module, lease.recipe.train, stage, batches.per_step, state)
        self.batches = batches

    def steps(self, first: int, last: int) -> list[list[float]]:
        reports = [self.engine.step(step, list(self.batches.of_step(step))) for step in range(first, last)]
        return [report.figures[:3].tolist() for report in reports]


@pytest.fixture
def make_rig(
    resident: ResidentBase, make_lease: Callable[..., Lease], make_batches: Callable[..., Batches]
) -> Callable[..., Rig]:
    def make(stage: int = 0, state: State | None = None, engine: Any = None, **train: Any) -> Rig:
        lease = make_lease(resident, train={**FULL, **train}, engine=engine or {})
        return Rig(lease, resident, make_batches(lease, resident), stage, state)

    return make


def whole(state: State) -> dict[str, torch.Tensor]:
    parts = {"p": state.parameters, "m": state.first_moments, "v": state.second_moments}
    parts |= {"e": state.average} if state.average else {}
    return {f"{part}/{name}": t.clone() for part, named in parts.items() for name, t in named.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_at_a_tiny_lr_moves_almost_every_master(
    stage: int, precision: str, make_rig: Callable[..., Rig]
) -> None:
    rig = make_rig(stage, engine={"precision": precision}, lr=1e-6, text_encoder={"train": True, "lr": 1e-6})
    rig.steps(0, 1)
    after = rig.engine.state(1).parameters
    # rows of tokens that no prompt holds have no gradient, and rows below are only those that have one
    moments = rig.engine.state(1).first_moments
    reached = {name: moments[name] != 0 for name in after}
    moved = sum(int(((after[n] != rig.before[n]) & reached[n]).sum()) for n in after)
    assert moved > 0.99 * sum(int(mask.sum()) for mask in reached.values())
    assert sum(int(mask.sum()) for mask in reached.values()) > 0.98 * sum(p.numel() for p in after.values())


@pytest.mark.parametrize("stage", [0, 2])
def test_gradients_are_clipped_and_the_norm_before_is_reported(
    stage: int, make_rig: Callable[..., Rig]
) -> None:
    free, clipped = make_rig(stage, max_grad_norm=None), make_rig(stage, max_grad_norm=0.01)
    ((_, _, norm),), ((_, _, same),) = free.steps(0, 1), clipped.steps(0, 1)
    assert norm == pytest.approx(same) and norm > 0.1
    moments = [rig.engine.state(1).first_moments for rig in (free, clipped)]
    lengths = [float(torch.nn.utils.get_total_norm(list(m.values()))) for m in moments]
    assert lengths[0] == pytest.approx(0.1 * norm, rel=1e-3)  # Adam's first moment is (1 - 0.9) * gradient
    assert lengths[1] == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("stage", [0, 2])
def test_accumulation_changes_nothing_but_memory(stage: int, make_rig: Callable[..., Rig]) -> None:
    once, twice = (make_rig(stage, accumulation=n, pairs_per_step=3).steps(0, 3) for n in (1, 2))
    assert torch.allclose(torch.tensor(once), torch.tensor(twice), atol=1e-5)


def test_every_stage_gives_the_same_losses(make_rig: Callable[..., Rig]) -> None:
    runs = [torch.tensor(make_rig(stage).steps(0, 3)) for stage in (0, 1, 2, 3)]
    for run in runs[1:]:
        assert torch.allclose(run, runs[0], atol=1e-5)


def test_unet_and_text_encoder_have_their_own_lr_and_a_warm_up(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(warmup_steps=1, weight_decay=0.0)
    report = rig.engine.step(0, list(rig.batches.of_step(0)))
    assert (report.step, report.lr, report.lr_text) == (1, 5e-4, 5e-5)
    moved = {"unet": 0.0, "text_encoder": 0.0}
    for name, parameter in rig.module.named_parameters():
        part = name.split(".")[0]
        moved[part] = max(moved[part], float((parameter.detach() - rig.before[name]).abs().max()))
    # Adam's first step is its learning rate
    assert moved == {"unet": pytest.approx(5e-4, rel=0.01), "text_encoder": pytest.approx(5e-5, rel=0.01)}


@pytest.mark.parametrize(
    "train", [{"method": "lora"}, {"method": "full", "text_encoder": {"train": False}}], ids=["lora", "unet"]
)
def test_frozen_tensors_are_untouched_to_the_bit(
    train: dict[str, Any], resident: ResidentBase, make_rig: Callable[..., Rig]
) -> None:
    def digest(module: torch.nn.Module, names: set[str]) -> str:
        tensors = (t for n, t in sorted(module.state_dict().items()) if n in names)
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()

    parts = (resident.unet, resident.text_encoder)
    before = [digest(part, set(part.state_dict())) for part in parts]
    rig = make_rig(**train)
    frozen = {n for n, p in rig.module.named_parameters() if not p.requires_grad}
    inside = digest(rig.module, frozen)
    rig.steps(0, 2)
    assert digest(rig.module, frozen) == inside
    assert [digest(part, set(part.state_dict())) for part in parts] == before
    trained = {n: p for n, p in rig.module.named_parameters() if p.requires_grad}
    assert any(not torch.equal(p, rig.before[n]) for n, p in trained.items())
    assert bool(frozen) == (train["method"] == "lora")


@pytest.mark.resume
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stage", [0, 2])
def test_six_steps_are_three_a_checkpoint_and_three_bit_for_bit(
    stage: int, method: str, make_rig: Callable[..., Rig], tmp_path: Any
) -> None:
    from cluster.storage import Storage

    storage = Storage(str(tmp_path / "storage"))
    train = {"method": method, "ema_decay": 0.9, "lr_scheduler": "cosine", "steps": 6}
    straight = make_rig(stage, **train)
    expected = straight.steps(0, 6)
    first = make_rig(stage, **train)
    figures = first.steps(0, 3)
    save(storage, "runs/rex/v1", first.engine.state(3), "f", keep=1)
    first.engine.close()
    state = latest(storage, "runs/rex/v1", "f", pytest.fail)
    second = make_rig(stage, state, **train)
    figures += second.steps(3, 6)
    assert figures == expected
    ours, theirs = whole(second.engine.state(6)), whole(straight.engine.state(6))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_goes_on_at_another_stage(make_rig: Callable[..., Rig]) -> None:
    straight = make_rig(2)
    expected = torch.tensor(straight.steps(0, 4))
    first = make_rig(2)
    first.steps(0, 2)
    state = first.engine.state(2)
    for stage in (0, 3):
        figures = torch.tensor(make_rig(stage, state).steps(2, 4))
        assert torch.allclose(figures, expected[2:], atol=1e-5)


def test_auto_shards_only_where_that_saves_something() -> None:
    full, lora = Train(method="full"), Train(method="lora")
    assert [zero_stage(Engine(), t, w) for t, w in ((full, 1), (lora, 2), (full, 2))] == [0, 0, 2]
    assert zero_stage(Engine(zero_stage=3), lora, 1) == 3


def test_auto_precision_on_a_cpu_is_fp32_whatever_gpu_the_machine_has() -> None:
    cpu = torch.device("cpu")
    assert compute_type(Engine(), cpu) is None
    assert compute_type(Engine(precision="bf16"), cpu) is torch.bfloat16


@pytest.mark.parametrize("stage", [0, 2])
def test_a_text_encoder_stays_as_it_is_after_the_step_it_is_stopped_at(
    make_lease: Callable[..., Lease],
    make_batches: Callable[..., Batches],
    resident: ResidentBase,
    stage: int,
) -> None:
    train = {**FULL, "steps": 4, "text_encoder": {"train": True, "lr": 1e-3, "stop_after": 2}}
    lease = make_lease(resident, train=train)
    rig = Rig(lease, resident, make_batches(lease, resident), stage)
    after: list[dict[str, torch.Tensor]] = []
    for step in range(1, 4):
        rig.steps(step - 1, step)
        after.append({name: p.detach().clone() for name, p in rig.engine.state(step).parameters.items()})
    rig.engine.close()
    text = [name for name in after[0] if name.startswith("text_encoder.")]
    assert any(not torch.equal(after[0][n], after[1][n]) for n in text)
    assert all(torch.equal(after[1][n], after[2][n]) for n in text)
    assert any(not torch.equal(after[1][n], after[2][n]) for n in after[0] if n.startswith("unet."))
