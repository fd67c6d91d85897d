"""The learning rate of a step."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from training.rates import learning_rate
from training.recipe import LrScheduler, Train


def rates(steps: int, **train: object) -> list[float]:
    settings = Train.model_validate({"steps": steps, **train})
    return [learning_rate(1.0, step, settings) for step in range(steps)]


def test_a_warm_up_wastes_no_step_and_ends_at_the_full_rate() -> None:
    assert rates(5, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(2, warmup_steps=5, lr_scheduler="cosine") == pytest.approx([1 / 6, 2 / 6])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "polynomial"])
def test_rates_after_the_warm_up_are_those_of_diffusers(kind: LrScheduler) -> None:
    steps, warmup = 20, 4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    expected = []
    for _ in range(steps):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = rates(steps, warmup_steps=warmup, lr_scheduler=kind)
    assert ours[warmup:] == pytest.approx(expected[warmup:], abs=1e-9)
