"""The memory a worker is said to need: how it follows from the settings, and beside what workers then take."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import UserError
from training.batches import Batches
from training.checkpoint import State
from training.engine import TrainingEngine, zero_stage
from training.lease import Lease
from training.loop import ResidentBase, build_module
from training.memory import MemoryEstimate, estimate
from training.pipeline import open_base
from training.recipe import Engine, Run, Train

FULL = {"method": "full", "text_encoder": {"train": True}, "pairs_per_step": 8}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def of(tiny_base: Path) -> Callable[..., MemoryEstimate]:
    """The estimate of a full run on the tiny base with settings changed."""

    def make(device: str = "cpu", world: int = 1, **sections: Any) -> MemoryEstimate:
        subject = {"name": "rex", "class": "dog", "images": ["x"]}
        train = {**FULL, **sections.pop("train", {})}
        plain: dict[str, Any] = {"subject": subject, "validate": {"every": 0}}
        run = Run.model_validate({**plain, "train": train, **sections})
        return estimate(open_base(str(tiny_base)), run, device, world)

    return make


def parameters(base: Path) -> int:
    """Bytes of UNet and text encoder."""
    info = open_base(str(base))
    resident = ResidentBase.load(str(base), info.revision, torch.device("cpu"))
    return sum(4 * p.numel() for part in (resident.unet, resident.text_encoder) for p in part.parameters())


def test_one_worker_holds_the_base_a_copy_and_two_moments(
    of: Callable[..., MemoryEstimate], tiny_base: Path
) -> None:
    size, found = parameters(tiny_base), of()
    assert (found.base, found.weights, found.optimizer) == (size, size, 2 * size)
    assert of(train={"ema_decay": 0.9}).weights == 2 * size
    assert found.step > size  # gradients, and activations at their side


def test_workers_share_what_their_stage_shards(of: Callable[..., MemoryEstimate], tiny_base: Path) -> None:
    size = parameters(tiny_base)
    found = {stage: of(world=4, engine={"zero_stage": stage}) for stage in (0, 1, 2, 3)}
    held = {stage: (e.weights, e.optimizer) for stage, e in found.items()}
    assert held == {
        0: (size, 2 * size),
        1: (size, 3 * size // 4),  # a master beside the moments
        2: (size, 3 * size // 4),
        3: (size // 4, size + 3 * size // 4),  # a bucket, and the gradients beside the moments
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": {"gradient_checkpointing": True}, "train": {"pairs_per_step": 64}},
        {"train": {"accumulation": 8, "pairs_per_step": 64}},
        {"train": {"method": "lora", "pairs_per_step": 1}},
        {"prior": {"weight": 0}, "train": {"pairs_per_step": 64}},
    ],
    ids=["checkpointing", "accumulation", "lora", "no prior"],
)
def test_settings_that_save_memory_are_seen_to(
    settings: dict[str, Any], of: Callable[..., MemoryEstimate]
) -> None:
    plain = {"pairs_per_step": settings["train"]["pairs_per_step"]}
    assert of("cuda", **settings).peak < 0.9 * of("cuda", train=plain).peak


def test_bf16_halves_what_is_kept_for_the_backward_pass_at_most(of: Callable[..., MemoryEstimate]) -> None:
    train = {"method": "lora", "pairs_per_step": 64}
    bf16, fp32 = (of("cuda", train=train, engine={"precision": p}).step for p in ("bf16", "fp32"))
    assert 0.5 * fp32 < bf16 < 0.9 * fp32  # norms stay fp32


def test_offloading_takes_masters_and_moments_off_the_gpu(
    of: Callable[..., MemoryEstimate], tiny_base: Path
) -> None:
    size, engine = parameters(tiny_base), {"offload": True}
    found = of("cuda", engine=engine)
    assert (found.weights, found.optimizer, found.offloaded) == (size, 0, 5 * size)
    assert of("cpu", engine=engine).offloaded == 0  # it is the same memory there


def test_the_vae_is_held_once_samples_are_drawn(of: Callable[..., MemoryEstimate]) -> None:
    drawn, too_late = of(validate={"every": 100}), of(validate={"every": 1000})
    assert drawn.base > too_late.base == of().base


@pytest.mark.slow
def test_the_estimate_is_within_a_fifth_of_what_workers_take() -> None:
    cases = ["pocket lora", "ZeRO-2, 2"]  # `python -m benchmarks.memory` measures ten more
    command = [sys.executable, "-m", "benchmarks.memory", "--json", "--only", *cases]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = json.loads(said.splitlines()[-1])
    assert len(rows) == len(cases)
    for row in rows:
        assert row["estimated_mb"] == pytest.approx(row["measured_mb"], rel=0.2), row


@pytest.mark.usefixtures("group")
class TestOffload:
    """An optimizer in the memory of the CPU."""

    @pytest.fixture
    def steps(
        self, resident: ResidentBase, make_lease: Callable[..., Lease], make_batches: Callable[..., Batches]
    ) -> Callable[..., tuple[list[list[float]], State]]:
        """Trains steps at a stage, with or without offloading; losses and norms, and the state after."""

        def train(
            stage: int, offload: bool, first: int, last: int, state: State | None = None
        ) -> tuple[list[list[float]], State]:
            lease = make_lease(resident, train={**FULL, "lr": 1e-3, "pairs_per_step": 2, "accumulation": 2})
            module = build_module(resident, lease.recipe, lease, stage)
            batches = make_batches(lease, resident)
            engine = TrainingEngine(module, lease.recipe.train, stage, batches.per_step, state, offload)
            reports = [engine.step(step, list(batches.of_step(step))) for step in range(first, last)]
            return [report.figures[:3].tolist() for report in reports], engine.state(last)

        return train

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_it_changes_no_figure_and_goes_on_from_a_checkpoint(
        self, stage: int, steps: Callable[..., tuple[list[list[float]], State]]
    ) -> None:
        expected, _ = steps(0, False, 0, 4)
        first, state = steps(stage, True, 0, 2)
        rest, _ = steps(stage, True, 2, 4, state)
        assert torch.allclose(torch.tensor(first + rest), torch.tensor(expected), atol=1e-5)

    def test_it_picks_a_stage_that_can_or_is_refused(self) -> None:
        assert zero_stage(Engine(offload=True), Train(), 1) == 2
        assert zero_stage(Engine(offload=True, zero_stage=3), Train(), 1) == 3
        with pytest.raises(UserError, match="zero_stage"):
            zero_stage(Engine(offload=True, zero_stage=0), Train(), 1)
