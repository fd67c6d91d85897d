"""This file is where the samplers are that look at one step alone: DDIM, DDPM, Euler, Euler ancestral, LCM.

n steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.errors import UserError
from training.denoising import LEAST_ALPHA, Floats, SamplerTable, clipped, one_step, spaced

LCM_STEPS = 50  # that a latent consistency model was distilled from; diffusers' and the paper's
LCM_SCALING, LCM_SIGMA = 10.0, 0.5  # of its boundary condition, likewise


def ddim(steps: int, scheduler: Mapping[str, Any], alphas: Floats, eta: float) -> SamplerTable:
    """Source: DDIM (arXiv 2010.02502) eq. 12 and 16, with its noise estimate written in terms of x and x0."""
    total = len(alphas)
    t = clipped(spaced(steps, total, scheduler), total)
    last = 1.0 if scheduler.get("set_alpha_to_one", True) else alphas[0]
    before = t - total // steps
    a, a_next = alphas[t], np.where(before >= 0, alphas[np.maximum(before, 0)], last)
    sigma = eta * np.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    c_x = np.sqrt(np.maximum(1 - a_next - sigma**2, 0) / (1 - a))
    c_0 = np.sqrt(a_next) - c_x * np.sqrt(a)
    return SamplerTable(t.astype(np.float64), a, one_step(c_x, c_0, sigma), eta > 0)


def ddpm(steps: int, scheduler: Mapping[str, Any], alphas: Floats) -> SamplerTable:
    """The reverse process that the base was trained for, with the smaller of its two variances.

    Source: DDPM (arXiv 2006.11239) eq. 7.
    """
    total = len(alphas)
    t = clipped(spaced(steps, total, scheduler), total)
    a, a_next = alphas[t], np.append(alphas[t[1:]], 1.0)
    kept = a / a_next  # of the signal's variance, by this step
    c_x = np.sqrt(kept) * (1 - a_next) / (1 - a)
    c_0 = np.sqrt(a_next) * (1 - kept) / (1 - a)
    sigma = np.sqrt((1 - a_next) / (1 - a) * (1 - kept))
    return SamplerTable(t.astype(np.float64), a, one_step(c_x, c_0, sigma), stochastic=True)


def euler(steps: int, scheduler: Mapping[str, Any], alphas: Floats, ancestral: bool = False) -> SamplerTable:
    """Euler's method on the noise level sigma, of which x / sqrt(1 + sigma^2) is our x.

    `ancestral` goes further down than it should and adds noise to make up for it.

    Source: Elucidating the design space (arXiv 2206.00364) algorithm 1 without noise, as k-diffusion and diffusers
    space it; for `ancestral` their split of a level into what is reached and what is added.
    """
    total, alphas = len(alphas), np.maximum(alphas, LEAST_ALPHA)
    t = spaced(steps, total, scheduler, "linspace").astype(np.float64)
    t = t.astype(np.float32).astype(np.float64)  # what the model is asked is in single precision
    levels = np.sqrt((1 - alphas) / alphas)
    sigma = np.interp(t, np.arange(total), levels)
    after = np.append(sigma[1:], 0.0)
    size, size_after = np.sqrt(1 + sigma**2), np.sqrt(1 + after**2)
    up = after * np.sqrt(1 - (after / sigma) ** 2) if ancestral else np.zeros(steps)
    down = np.sqrt(after**2 - up**2) if ancestral else after
    c_x, c_0 = down / sigma * size / size_after, (1 - down / sigma) / size_after
    leading = scheduler.get("timestep_spacing", "linspace") == "leading"
    start = 1.0 if leading else float(sigma[0] / size[0])
    return SamplerTable(t, 1 / size**2, one_step(c_x, c_0, up / size_after), ancestral, start)


def lcm(steps: int, alphas: Floats) -> SamplerTable:
    """Few steps of a latent consistency model, each to the end and back; for a base that was distilled into one.

    Source: LCM (arXiv 2310.04378) algorithm 3, with the boundary condition of its appendix.
    """
    total = len(alphas)
    if steps > LCM_STEPS:
        raise UserError(
            f"{steps} denoising steps cannot be had with lcm",
            f"a consistency model was distilled from {LCM_STEPS}",
            "ask for 1 to 8; more gain nothing",
        )
    known = np.arange(LCM_STEPS, 0, -1) * (total // LCM_STEPS) - 1
    t = known[np.floor(np.linspace(0, len(known), steps, endpoint=False)).astype(np.int64)]
    a, a_next = alphas[t], np.append(alphas[t[1:]], 1.0)
    scaled = t * LCM_SCALING
    skip = LCM_SIGMA**2 / (scaled**2 + LCM_SIGMA**2)
    out = scaled / np.sqrt(scaled**2 + LCM_SIGMA**2)
    signal = np.sqrt(a_next)
    table = one_step(signal * skip, signal * out, np.sqrt(1 - a_next))
    return SamplerTable(t.astype(np.float64), a, table, stochastic=True)
