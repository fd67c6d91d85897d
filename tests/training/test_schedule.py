"""Our noise schedule is diffusers', bit for bit."""

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from cluster.errors import UserError
from training.schedule import NoiseSchedule

CONFIGS: list[dict[str, Any]] = [
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.1, 0.2, 0.3]},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_alphas_noising_and_targets_are_those_of_diffusers(config: dict[str, Any]) -> None:
    ours, theirs = NoiseSchedule.from_config(config), DDIMScheduler(**config)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    t = torch.tensor([0, 1, ours.num_timesteps - 1])
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    if ours.prediction_type == "v_prediction":
        assert torch.equal(ours.target(x0, noise, t), theirs.get_velocity(x0, noise, t))
    else:
        assert torch.equal(ours.target(x0, noise, t), noise)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_output_gives_back_the_clean_latents(prediction_type: str) -> None:
    schedule = NoiseSchedule.from_config({**CONFIGS[1], "prediction_type": prediction_type})
    t = torch.tensor([1, 500, 900])
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = schedule.add_noise(x0, noise, t)
    clean = schedule.clean(schedule.target(x0, noise, t), x, schedule.alphas_cumprod[t])
    assert (clean - x0).abs().max() < 1e-5


@pytest.mark.parametrize("config", [{"beta_schedule": "sigmoid"}, {"prediction_type": "sample"}])
def test_an_unknown_kind_is_refused(config: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(config.values()))):
        NoiseSchedule.from_config(config)
