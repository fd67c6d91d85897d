"""Our sampler tables walk where diffusers' schedulers walk."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from cluster.errors import UserError
from training.denoising import MEMORY, advance
from training.recipe import SamplerName
from training.samplers import sampler_table
from training.schedule import NoiseSchedule

CONFIG: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SPACINGS = ("leading", "linspace", "trailing")
# States are of size 4; theirs are computed in float32 throughout, ours with coefficients from float64.
TOLERANCE = 1e-5


def model(schedule: NoiseSchedule, x: torch.Tensor, t: int) -> torch.Tensor:
    """A stand-in for a UNet: what one that knows data of unit variance would say, and a wave that it learnt."""
    a = schedule.alphas_cumprod[t]
    wave = 0.5 * torch.sin(1.7 * x + 0.003 * t)
    if schedule.prediction_type == "epsilon":
        return (1 - a) ** 0.5 * x + a**0.5 * wave
    return wave


def ours(name: Any, steps: int, config: dict[str, Any], eta: float, seed: int) -> list[torch.Tensor]:
    table, schedule = sampler_table(name, steps, config, eta), NoiseSchedule.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    kept, states = x.new_zeros(2, MEMORY, 4, 8, 8), []
    for i in range(len(table)):
        noise = torch.randn(x.shape, generator=generator) if table.stochastic else torch.zeros_like(x)
        alphas = torch.tensor(table.levels[i].repeat(2), dtype=torch.float32)
        x0 = schedule.clean(model(schedule, x, int(table.timesteps[i])), x, alphas)
        x, kept = advance(x, x0, kept, noise, torch.tensor(table.coefficients[i]).repeat(2, 1, 1))
        states.append(x)
    return states


def theirs(scheduler: Any, steps: int, seed: int, **step: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, states = torch.randn(2, 4, 8, 8, generator=generator), []
    schedule = NoiseSchedule.from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        drawn = (
            {} if isinstance(scheduler, PNDMScheduler | UniPCMultistepScheduler) else {"generator": generator}
        )
        x = scheduler.step(model(schedule, x, int(t)), t, x, **drawn, **step).prev_sample
        states.append(x)
    return states


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    assert len(a) == len(b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 25, 50])
def test_ddim_is_diffusers_ddim(spacing: str, prediction_type: str, eta: float, steps: int) -> None:
    config = {**CONFIG, "timestep_spacing": spacing, "prediction_type": prediction_type}
    reference = theirs(DDIMScheduler(**config), steps, 3, eta=eta)
    assert distance(ours("ddim", steps, config, eta, 3), reference) < TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 25, 50])
def test_dpmpp_2m_is_diffusers_multistep_solver(spacing: str, prediction_type: str, steps: int) -> None:
    config = {**CONFIG, "timestep_spacing": spacing, "prediction_type": prediction_type}
    reference = DPMSolverMultistepScheduler.from_config(DDIMScheduler(**config).config)
    assert distance(ours("dpm++2m", steps, config, 0.0, 3), theirs(reference, steps, 3)) < TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("one", [True, False])
def test_plms_is_diffusers_pndm(spacing: str, prediction_type: str, steps: int, one: bool) -> None:
    config = {
        **CONFIG,
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
        "set_alpha_to_one": one,
    }
    known = {key: value for key, value in config.items() if key != "clip_sample"}
    reference = theirs(PNDMScheduler(**known, skip_prk_steps=True), steps, 3)
    assert len(reference) == (steps + 1 if steps > 1 else 1)
    assert distance(ours("plms", steps, config, 0.0, 3), reference) < 2 * TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddpm_is_diffusers_ddpm(spacing: str, prediction_type: str, steps: int) -> None:
    config = {**CONFIG, "timestep_spacing": spacing, "prediction_type": prediction_type}
    reference = DDPMScheduler.from_config(DDIMScheduler(**config).config)
    assert distance(ours("ddpm", steps, config, 0.0, 3), theirs(reference, steps, 3)) < TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 50])
def test_unipc_is_diffusers_unipc(spacing: str, prediction_type: str, steps: int) -> None:
    config = {**CONFIG, "timestep_spacing": spacing, "prediction_type": prediction_type}
    reference = UniPCMultistepScheduler.from_config(DDIMScheduler(**config).config)
    assert distance(ours("unipc", steps, config, 0.0, 3), theirs(reference, steps, 3)) < 2 * TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_is_diffusers_lcm(prediction_type: str, steps: int) -> None:
    config = {**CONFIG, "prediction_type": prediction_type}
    reference = LCMScheduler.from_config(DDIMScheduler(**config).config)
    assert distance(ours("lcm", steps, config, 0.0, 3), theirs(reference, steps, 3)) < TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 25, 50])
@pytest.mark.parametrize(
    ("name", "kind"), [("euler", EulerDiscreteScheduler), ("euler-a", EulerAncestralDiscreteScheduler)]
)
def test_euler_is_diffusers_euler(
    name: Any, kind: Any, spacing: str, prediction_type: str, steps: int
) -> None:
    config = {**CONFIG, "timestep_spacing": spacing, "prediction_type": prediction_type}
    schedule, table = NoiseSchedule.from_config(config), sampler_table(name, steps, config)
    scheduler = kind.from_config(DDIMScheduler(**config).config)
    scheduler.set_timesteps(steps)
    assert np.array_equal(table.timesteps, scheduler.timesteps.numpy())
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    x, theirs = noise * table.start, noise * scheduler.init_noise_sigma
    kept, draws = x.new_zeros(2, MEMORY, 4, 8, 8), [torch.Generator().manual_seed(4) for _ in range(2)]
    for i, t in enumerate(scheduler.timesteps):
        alpha = torch.tensor(table.levels[i : i + 1].repeat(2), dtype=torch.float32)

        def says(x: torch.Tensor) -> torch.Tensor:
            """What a model says that knows data of unit variance, and a wave that it learnt."""
            return (1 - alpha[0]) ** 0.5 * x + 0.5 * torch.sin(1.7 * x + 0.003 * t)  # noqa: B023

        said = says(scheduler.scale_model_input(theirs, t))
        theirs = scheduler.step(said, t, theirs, generator=draws[0]).prev_sample
        added = torch.randn(x.shape, generator=draws[1]) if table.stochastic else torch.zeros_like(x)
        matrix = torch.tensor(table.coefficients[i]).repeat(2, 1, 1)
        x, kept = advance(x, schedule.clean(says(x), x, alpha), kept, added, matrix)
        level = float(scheduler.sigmas[i + 1])
        assert float((x * (1 + level**2) ** 0.5 - theirs).abs().max()) < 5e-5 * (1 + level)


def test_a_config_that_names_no_spacing_gets_each_schedulers_own() -> None:
    pairs: list[tuple[Any, Any]] = [
        ("ddim", DDIMScheduler),
        ("euler", EulerDiscreteScheduler),
        ("dpm++2m", DPMSolverMultistepScheduler),
        ("ddpm", DDPMScheduler),
        ("euler-a", EulerAncestralDiscreteScheduler),
        ("unipc", UniPCMultistepScheduler),
    ]
    for name, scheduler in pairs:
        known = {k: v for k, v in CONFIG.items() if k in scheduler().config}
        reference = scheduler.from_config(known)
        reference.set_timesteps(10)
        assert np.array_equal(sampler_table(name, 10, CONFIG).timesteps, reference.timesteps.numpy())


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "ddpm", "unipc"])
def test_a_terminal_snr_of_zero_stays_finite(name: Any) -> None:
    config = {**CONFIG, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    config |= {"timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**config)
    kinds = {"dpm++2m": DPMSolverMultistepScheduler, "ddpm": DDPMScheduler, "unipc": UniPCMultistepScheduler}
    if name in kinds:
        scheduler = kinds[name].from_config(scheduler.config)
    states = ours(name, 20, config, 0.0, 3)
    # the last timestep leaves 2**-24 of the signal with theirs too, whose float32 cannot tell its neighbours
    assert distance(states, theirs(scheduler, 20, 3)) < 1e-3


@pytest.mark.parametrize("name", sorted({*get_args(SamplerName)} - {"lcm"}))
def test_as_many_steps_as_timesteps_stay_finite(name: Any) -> None:
    assert np.isfinite(sampler_table(name, 1000, CONFIG).coefficients).all()


@pytest.mark.parametrize(
    ("name", "steps", "eta", "said"),
    [
        ("ddim", 0, 0.0, "0 denoising steps"),
        ("ddim", 1001, 0.0, "1 to 1000"),
        ("ddim", 10, 1.5, "eta 1.5"),
        ("dpm++2m", 10, 0.5, "ddim only"),
        ("heun", 10, 0.0, "'heun'"),
        ("euler", 10, 0.5, "ddim only"),
        ("ddpm", 10, 1.0, "ddim only"),
        ("lcm", 51, 0.0, "distilled from 50"),
    ],
)
def test_what_cannot_take_effect_is_refused(name: Any, steps: int, eta: float, said: str) -> None:
    with pytest.raises(UserError, match=said):
        sampler_table(name, steps, CONFIG, eta)


def test_an_unknown_spacing_is_refused() -> None:
    with pytest.raises(UserError, match="karras"):
        sampler_table("ddim", 10, {**CONFIG, "timestep_spacing": "karras"})
