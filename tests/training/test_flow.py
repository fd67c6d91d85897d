"""The rectified flow of a base is diffusers' own, and an objective of diffusion is refused for it."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pydantic import ValidationError

from cluster.errors import UserError
from training.criterion import huber_widths
from training.dataplan import DataPlan
from training.denoising import MEMORY, advance
from training.flow import FlowSchedule
from training.noise import noise_process, trained_scheduler
from training.objective_settings import Objective
from training.samplers import sampler_table


def config(shift: float) -> dict[str, Any]:
    """As it stands in a base."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    return {**theirs.config, "_class_name": type(theirs).__name__}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_latents_are_noised_and_the_model_is_asked_as_in_diffusers(shift: float) -> None:
    process, theirs = noise_process(config(shift)), FlowMatchEulerDiscreteScheduler(shift=shift)
    assert isinstance(process, FlowSchedule)
    t = torch.tensor([0, 1, 500, 999])
    asked = process.asked(t)
    # theirs begin with the noisiest
    assert torch.equal(asked, theirs.timesteps[999 - t])
    x0, noise = torch.randn(2, 4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = process.add_noise(x0, noise, t)
    assert torch.equal(noisy, theirs.scale_noise(x0, asked, noise))
    level = process.sigmas[t]
    assert torch.allclose(process.clean(process.target(x0, noise, t), noisy, level), x0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_euler_is_diffusers_euler(steps: int, shift: float) -> None:
    table, process = sampler_table("euler", steps, config(shift)), noise_process(config(shift))
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    assert np.array_equal(table.timesteps, theirs.timesteps.double().numpy())
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    reference, kept = x.clone(), x.new_zeros(2, MEMORY, 16, 8, 8)

    def says(x: torch.Tensor, t: float) -> torch.Tensor:
        """What a model says that knows data of unit variance, and a wave that it learnt."""
        return 0.7 * x + 0.5 * torch.sin(1.7 * x + 0.003 * t)

    for i, t in enumerate(theirs.timesteps):
        reference = theirs.step(says(reference, float(t)), t, reference).prev_sample
        level = torch.tensor(table.levels[i].repeat(2), dtype=torch.float32)
        x0 = process.clean(says(x, float(t)), x, level)
        x, kept = advance(
            x, x0, kept, torch.zeros_like(x), torch.tensor(table.coefficients[i]).repeat(2, 1, 1)
        )
        assert torch.allclose(x, reference, atol=1e-5)


def test_samplers_of_diffusion_are_refused() -> None:
    for name in ("ddim", "ddpm", "euler-a", "plms", "dpm++2m", "unipc", "lcm"):
        with pytest.raises(UserError, match="flow matching") as refused:
            sampler_table(name, 4, config(3.0))  # type: ignore[arg-type]
        assert "use euler" in refused.value.do


@pytest.mark.parametrize("setting", ["use_dynamic_shifting", "stochastic_sampling", "invert_sigmas"])
def test_a_scheduler_that_does_otherwise_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match=setting):
        noise_process({**config(3.0), setting: True})


@pytest.mark.parametrize("shift", [None, 0, -1.0, "3", float("inf")])
def test_a_shift_that_is_no_number_above_0_is_refused(shift: Any) -> None:
    with pytest.raises(UserError, match="shift") as refused:
        noise_process({**config(3.0), "shift": shift})
    assert refused.value.seen == f"it is {shift!r}" and "leave it out" in refused.value.do


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"weighting": "min_snr"}, "weighting: min_snr"),
        ({"weighting": "debiased"}, "weighting: debiased"),
        ({"weighting": "p2"}, "weighting: p2"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr"),
    ],
)
def test_an_objective_of_diffusion_is_refused(objective: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        trained_scheduler(config(3.0), Objective.model_validate(objective))
    assert "flow matching" in refused.value.seen and refused.value.do


def test_hubers_width_follows_the_noise_of_the_flow() -> None:
    process = FlowSchedule.from_config(config(3.0))
    widths = huber_widths(Objective(loss="huber", huber_c=0.2), process)
    assert widths is not None
    # noise over signal is s / (1 - s)
    assert torch.allclose(widths, 0.8 * (1 - process.sigmas) ** 2 + 0.2, atol=1e-5)


def test_timesteps_in_the_middle_are_the_most_frequent() -> None:
    places = {}
    for name, density in (("uniform", None), ("middle", (0.0, 1.0)), ("noisy", (1.0, 0.5))):
        plan = DataPlan(0, 1, 0, 64, 1000, 1.0, logit_normal=density)
        places[name] = np.array([row.timestep for step in range(40) for row in plan.rows(step, 0, 1)])
        assert places[name].min() >= 0 and places[name].max() <= 999
    for name, mean, std in (("middle", 0.0, 1.0), ("noisy", 1.0, 0.5)):
        part = (places[name] + 0.5) / 1000
        logits = np.log(part / (1 - part))
        assert logits.mean() == pytest.approx(mean, abs=0.06) and logits.std() == pytest.approx(std, rel=0.06)
    assert places["uniform"].std() == pytest.approx(1000 / 12**0.5, rel=0.05)


def test_a_density_that_takes_no_effect_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"`logit_mean` takes no effect.*set timesteps: logit_normal"):
        Objective(logit_mean=1.0)
    assert Objective(timesteps="logit_normal", logit_mean=1.0).logit_mean == 1.0
