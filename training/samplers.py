"""This file is where a sampler is chosen by name: each becomes a table of steps for a base.

Source: our tables are tested against diffusers' schedulers, which keep one step index per batch and so cannot serve
rows at different steps.
"""

from collections.abc import Mapping
from typing import Any, get_args

from cluster.errors import UserError
from training.denoising import SamplerTable
from training.flow import flow_euler
from training.multistep import dpmpp_2m, plms, unipc
from training.noise import noise_process
from training.onestep import ddim, ddpm, euler, lcm
from training.recipe import SamplerName
from training.schedule import NoiseSchedule


def sampler_table(
    name: SamplerName, steps: int, scheduler: Mapping[str, Any], eta: float = 0.0
) -> SamplerTable:
    """The table of a sampler for a base.

    Args:
        name: `ddim`, `ddpm`, `euler`, `euler-a` (ancestral), `plms`, `dpm++2m` (DPM-Solver++, order 2, multistep,
            midpoint), `unipc` (order 2), or `lcm`. For a base of flow matching there is `euler`.
        steps: Denoising steps, 1 to the base's number of timesteps.
        scheduler: The base's scheduler config; timesteps are spaced as it says.
        eta: Of `ddim`: 0 is deterministic, 1 adds as much noise as DDPM.

    Raises:
        UserError: The steps, the eta or the spacing cannot be had, or the base cannot be drawn with that sampler.
    """
    schedule = noise_process(scheduler)
    total = schedule.num_timesteps
    if not 1 <= steps <= total:
        raise UserError(
            f"{steps} denoising steps cannot be had",
            f"the base has {total} timesteps",
            f"ask for 1 to {total}",
        )
    if not 0.0 <= eta <= 1.0 or (eta and name != "ddim"):
        raise UserError(f"eta {eta} cannot be had with {name}", "", "eta is 0 to 1, with ddim only")
    if not isinstance(schedule, NoiseSchedule):
        if name != "euler":
            raise UserError(
                f"the sampler {name} cannot be had with this base",
                "it is of flow matching, and the sampler goes the way back of diffusion",
                "use euler, or leave the sampler out",
            )
        return flow_euler(steps, scheduler)
    alphas = schedule.alphas_cumprod.double().numpy()
    match name:
        case "ddim":
            return ddim(steps, scheduler, alphas, eta)
        case "ddpm":
            return ddpm(steps, scheduler, alphas)
        case "euler" | "euler-a":
            return euler(steps, scheduler, alphas, ancestral=name == "euler-a")
        case "plms":
            return plms(steps, scheduler, alphas)
        case "dpm++2m":
            return dpmpp_2m(steps, scheduler, alphas)
        case "unipc":
            return unipc(steps, scheduler, alphas)
        case "lcm":
            return lcm(steps, alphas)
    raise UserError(f"there is no sampler {name!r}", "", f"use one of {', '.join(get_args(SamplerName))}")
