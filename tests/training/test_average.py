"""The moving average of weights."""

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from training.average import Average, average_decay


def test_the_average_is_that_of_diffusers_and_steps_in_for_the_weights() -> None:
    weights = {"a": nn.Parameter(torch.randn(5, 3)), "b": nn.Parameter(torch.randn(7))}
    ours = Average(weights, 0.5, saved=None)
    theirs = EMAModel(list(weights.values()), decay=0.5)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        with torch.no_grad():
            for weight in weights.values():
                weight += torch.randn(weight.shape, generator=generator)
        ours.update(step)
        # theirs takes the first weights whole; ours begins with those before the first step
        theirs.optimization_step = step
        if step == 0:
            with ours.in_place():
                theirs.shadow_params = [weight.detach().clone() for weight in weights.values()]
        else:
            theirs.step(list(weights.values()))
    live = {name: weight.detach().clone() for name, weight in weights.items()}
    with ours.in_place():
        for weight, shadow in zip(weights.values(), theirs.shadow_params, strict=True):
            assert torch.allclose(weight, shadow, atol=1e-6)
        assert not torch.equal(weights["a"], live["a"])
    assert all(torch.equal(weights[name], kept) for name, kept in live.items())


def test_the_average_is_young_at_first() -> None:
    assert [average_decay(0.999, step) for step in (0, 9, 10**6)] == [0.1, 10 / 19, 0.999]
