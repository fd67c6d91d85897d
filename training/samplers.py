"""This file is where denoising steps are tables of numbers, so that rows of one batch may differ in all of them.

Every sampler here is linear in what it knows, so a step of any of them is one formula with four coefficients:

    x_next = c_x x + c_0 x0 + c_1 x0_previous + c_n noise

with x0 the clean latents that the model implies now and x0_previous those of the step before. Rows at different
steps, with different samplers and different numbers of steps, share one update.

n steps, B batch, C H W latent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import UserError
from training.recipe import SamplerName
from training.schedule import NoiseSchedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SamplerTable:
    """One sampler with one number of steps. The first x is noise of unit variance times `start`."""

    timesteps: Floats
    """[n], falling: where the model is asked; of `euler` they may lie between two of the base's."""
    alphas: Floats
    """[n]: `alphas_cumprod` there."""
    coefficients: Floats
    """[n, 4]: c_x, c_0, c_1, c_n of each step."""
    stochastic: bool
    """Whether each step draws noise."""
    start: float = 1.0
    """Of `euler` a little less than 1 where its first step is not the base's last."""

    def __len__(self) -> int:
        return len(self.timesteps)


def sampler_table(
    name: SamplerName, steps: int, scheduler: Mapping[str, Any], eta: float = 0.0
) -> SamplerTable:
    """The table of a sampler for a base.

    Args:
        name: `ddim`, `euler`, or `dpm++2m` (DPM-Solver++, order 2, multistep, midpoint).
        steps: Denoising steps, 1 to the base's number of timesteps.
        scheduler: The base's scheduler config; timesteps are spaced as it says.
        eta: Of `ddim`: 0 is deterministic, 1 adds as much noise as DDPM.

    Raises:
        UserError: The steps, the eta or the spacing cannot be had.
    """
    schedule = NoiseSchedule.from_config(scheduler)
    total = schedule.num_timesteps
    if not 1 <= steps <= total:
        raise UserError(
            f"{steps} denoising steps cannot be had",
            f"the base has {total} timesteps",
            f"ask for 1 to {total}",
        )
    if not 0.0 <= eta <= 1.0 or (eta and name != "ddim"):
        raise UserError(f"eta {eta} cannot be had with {name}", "", "eta is 0 to 1, with ddim only")
    alphas = schedule.alphas_cumprod.double().numpy()
    if name == "ddim":
        return _ddim(steps, scheduler, alphas, eta)
    if name == "dpm++2m":
        return _dpmpp_2m(steps, scheduler, alphas)
    if name == "euler":
        return _euler(steps, scheduler, alphas)
    raise UserError(f"there is no sampler {name!r}", "", "use ddim, euler or dpm++2m")


def advance(
    x: torch.Tensor,
    x0: torch.Tensor,
    x0_previous: torch.Tensor,
    noise: torch.Tensor,
    coefficients: torch.Tensor,
) -> torch.Tensor:
    """x_next [B, C, H, W]; all but `coefficients` [B, 4] are [B, C, H, W]."""
    c_x, c_0, c_1, c_n = coefficients.to(x).reshape(-1, 4, 1, 1, 1).unbind(1)
    return c_x * x + c_0 * x0 + c_1 * x0_previous + c_n * noise


def _ddim(steps: int, scheduler: Mapping[str, Any], alphas: Floats, eta: float) -> SamplerTable:
    """Source: DDIM (arXiv 2010.02502) eq. 12 and 16, with its noise estimate written in terms of x and x0."""
    total = len(alphas)
    offset = int(scheduler.get("steps_offset", 0))
    spacing = scheduler.get("timestep_spacing", "leading")
    if spacing == "linspace":
        timesteps: NDArray[Any] = np.linspace(0, total - 1, steps).round()[::-1]
    elif spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (total // steps) + offset
    else:
        timesteps = _trailing(steps, total, spacing)
    t = np.minimum(timesteps.astype(np.int64), total - 1)
    last = 1.0 if scheduler.get("set_alpha_to_one", True) else alphas[0]
    before = t - total // steps
    a, a_next = alphas[t], np.where(before >= 0, alphas[np.maximum(before, 0)], last)
    sigma = eta * np.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    c_x = np.sqrt(np.maximum(1 - a_next - sigma**2, 0) / (1 - a))
    c_0 = np.sqrt(a_next) - c_x * np.sqrt(a)
    rows = np.stack([c_x, c_0, np.zeros(len(t)), sigma], axis=1)
    return SamplerTable(t.astype(np.float64), a, rows, eta > 0)


def _euler(steps: int, scheduler: Mapping[str, Any], alphas: Floats) -> SamplerTable:
    """Euler's method on the noise level sigma, of which x / sqrt(1 + sigma^2) is our x.

    Source: Elucidating the design space (arXiv 2206.00364) algorithm 1 without noise, as k-diffusion and diffusers
    space it.
    """
    total, alphas = len(alphas), np.maximum(alphas, 2.0**-24)  # as diffusers bounds a terminal SNR of zero
    offset = int(scheduler.get("steps_offset", 0))
    spacing = scheduler.get("timestep_spacing", "linspace")
    t: NDArray[Any]
    if spacing == "linspace":
        t = np.linspace(0, total - 1, steps)[::-1]
    elif spacing == "leading":
        t = np.arange(steps)[::-1] * float(total // steps) + offset
    else:
        t = _trailing(steps, total, spacing).astype(np.float64)
    t = t.astype(np.float32).astype(np.float64)  # what the model is asked is in single precision
    levels = np.sqrt((1 - alphas) / alphas)
    sigma = np.interp(t, np.arange(total), levels)
    after = np.append(sigma[1:], 0.0)
    size, size_after = np.sqrt(1 + sigma**2), np.sqrt(1 + after**2)
    c_x, c_0 = after / sigma * size / size_after, (1 - after / sigma) / size_after
    rows = np.stack([c_x, c_0, np.zeros(steps), np.zeros(steps)], axis=1)
    start = 1.0 if spacing == "leading" else float(sigma[0] / size[0])
    return SamplerTable(t, 1 / size**2, rows, stochastic=False, start=start)


def _dpmpp_2m(steps: int, scheduler: Mapping[str, Any], alphas: Floats) -> SamplerTable:
    """Source: DPM-Solver++ (arXiv 2211.01095) algorithm 2; first and last step are of order 1."""
    total = len(alphas)
    spacing = scheduler.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        timesteps: NDArray[Any] = np.linspace(0, total - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        timesteps = np.arange(1, steps + 1)[::-1] * (total // (steps + 1))
        timesteps = timesteps + int(scheduler.get("steps_offset", 0))
    else:
        timesteps = _trailing(steps, total, spacing)
    t = timesteps.astype(np.int64)
    # A terminal SNR of zero would put the first step infinitely far out; diffusers bounds it alike.
    a = np.maximum(alphas[t], 2.0**-24)
    signal, spread = np.sqrt(np.append(a, 1.0)), np.sqrt(np.append(1 - a, 0.0))
    with np.errstate(divide="ignore"):
        log_snr = np.log(signal) - np.log(spread)
    rows = []
    for i in range(len(t)):
        h = log_snr[i + 1] - log_snr[i]
        gain = -signal[i + 1] * np.expm1(-h)  # weight of the model's estimate
        order_2 = 0 < i < len(t) - 1 and log_snr[i] > log_snr[i - 1]
        slope = 0.5 * gain * h / (log_snr[i] - log_snr[i - 1]) if order_2 else 0.0
        rows.append([spread[i + 1] / spread[i], gain + slope, -slope, 0.0])
    return SamplerTable(t.astype(np.float64), a, np.array(rows, dtype=np.float64), stochastic=False)


def _trailing(steps: int, total: int, spacing: str) -> NDArray[Any]:
    """Timesteps of `trailing` spacing; the last of the known ones."""
    if spacing != "trailing":
        raise UserError(
            "the base's scheduler is of an unknown kind",
            f"timestep_spacing: {spacing!r}",
            "use a base with linspace, leading or trailing",
        )
    timesteps: NDArray[Any] = np.round(np.arange(total, 0, -total / steps)) - 1
    return timesteps
