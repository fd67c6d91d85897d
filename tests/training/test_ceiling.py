"""What is told of a run without its models: the memory it surely does not exceed, and that it can be trained."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from training.ceiling import memory_ceiling
from training.memory import estimate
from training.pipeline import open_base
from training.recipe import Run, Train
from training.shapes import refuse_untrainable

FULL = {"method": "full", "text_encoder": {"train": True}, "ema_decay": 0.9}


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"method": "lora"}},
        {"train": FULL},
        {"train": {**FULL, "pairs_per_step": 64}},
        {"train": {**FULL, "pairs_per_step": 8, "accumulation": 8}},
        {"train": {**FULL, "steps": 100}, "checkpoint": {"every": 10}, "validate": {"every": 10}},
        {"train": FULL, "engine": {"gradient_checkpointing": True}},
        {"train": FULL, "engine": {"zero_stage": 3}, "cluster": {"workers": 2}},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_estimate_is_above_the_ceiling(tiny_base: Path, sections: dict[str, Any], device: str) -> None:
    subject = {"name": "rex", "class": "dog", "images": ["x"]}
    run = Run.model_validate({"subject": subject, "validate": {"every": 0}, **sections})
    base = open_base(str(tiny_base))
    found = estimate(base, run, device, run.cluster.workers)
    assert found.peak + found.offloaded <= memory_ceiling(base, run, device)


@pytest.mark.parametrize(
    ("targets", "refused"),
    [
        (["to_q", "to_out.0", "ff.net.0.proj"], None),
        (["to_q", "to_nowhere"], "names 'to_nowhere'"),
        (["attn1"], "cannot be adapted"),  # a module of several layers
        (["conv1"], None),  # a convolution, which takes adapters too
    ],
)
def test_targets_are_refused_as_by_the_models(
    tiny_base: Path, targets: list[str], refused: str | None
) -> None:
    base = open_base(str(tiny_base))
    train = Train.model_validate({"method": "lora", "lora": {"targets": targets}})
    if refused is None:
        refuse_untrainable(base, train)
    else:
        with pytest.raises(UserError, match=refused):
            refuse_untrainable(base, train)


def test_a_usual_run_is_checked_without_the_models(tiny_base: Path) -> None:
    code = f"""
import sys
from orchestrator.fits import Memory, Room
from training.pipeline import open_base
from training.recipe import Run
from training.shapes import refuse_untrainable
run = Run.model_validate({{"subject": {{"name": "rex", "class": "dog", "images": ["x"]}}}})
base = open_base({str(tiny_base)!r})
refuse_untrainable(base, run.train)
Memory("cpu", Room(10**13, None)).check(base, run)
assert not {{"diffusers", "peft"}} & set(sys.modules), "it imports models"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
