"""This file is where the samplers are that remember earlier steps: PLMS, DPM-Solver++ 2M, UniPC.

n steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.denoising import (
    KEPT,
    LEAST_ALPHA,
    X0,
    Floats,
    Ints,
    SamplerTable,
    X,
    clipped,
    fill,
    matrices,
    spaced,
    trailing,
)

# Weights of the newest and the earlier outputs, by how many earlier ones are known (Adams and Bashforth)
_ADAMS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(steps: int, scheduler: Mapping[str, Any], alphas: Floats) -> SamplerTable:
    """The linear multistep method on the model's outputs; asks the model once more than there are steps.

    The second step is taken again with the mean of both outputs, from where the first began.

    Source: PNDM (arXiv 2202.09778) eq. 9 and 12, started as in the latent diffusion paper's code.
    """
    total, alphas = len(alphas), np.maximum(alphas, LEAST_ALPHA)
    once = clipped(spaced(steps, total, scheduler), total)
    t = np.concatenate([once[:1], once[1:2], once[1:]])
    stride = total // steps
    last = 1.0 if scheduler.get("set_alpha_to_one", True) else alphas[0]
    predicts_v = scheduler.get("prediction_type") == "v_prediction"
    newest, older, oldest = KEPT
    table = matrices(len(t))
    for i, step in enumerate(table):
        begin, end = (t[i] + stride, t[i]) if i == 1 else (t[i], t[i] - stride)
        a, a_end = alphas[min(begin, total - 1)], alphas[end] if end >= 0 else last
        output = _output(alphas[t[i]], predicts_v)
        # what is known of the outputs, newest first
        known = [output, {newest: 1.0}, {older: 1.0}, {oldest: 1.0}]
        weights = (1 / 2, 1 / 2) if i == 1 else _ADAMS[min(max(i - 1, 0), 3)]
        c_sample = np.sqrt(a_end / a)
        c_output = -(a_end - a) / (a * np.sqrt(1 - a_end) + np.sqrt(a * (1 - a) * a_end))
        if predicts_v:
            c_sample += c_output * np.sqrt(1 - a)
            c_output *= np.sqrt(a)
        step[0, oldest if i == 1 else X] += c_sample
        for weight, parts in zip(weights, known, strict=False):
            fill(step[0], {column: c_output * weight * value for column, value in parts.items()})
        if i == 0:
            fill(step[1], output)
            fill(step[3], {X: 1.0})  # until the second step
        elif i == 1:
            fill(step[1], {newest: 1.0})
        else:
            fill(step[1], output)
            fill(step[2], {newest: 1.0})
            fill(step[3], {older: 1.0})
    return SamplerTable(t.astype(np.float64), alphas[t], table, stochastic=False)


def _output(a: float, predicts_v: bool) -> dict[int, float]:
    """The model's output in terms of x and the x0 that was made of it, at a signal of variance `a`."""
    signal, spread = float(np.sqrt(a)), float(np.sqrt(1 - a))
    if predicts_v:
        return {X: signal / spread, X0: -1 / spread}
    return {X: 1 / spread, X0: -signal / spread}


def dpmpp_2m(steps: int, scheduler: Mapping[str, Any], alphas: Floats) -> SamplerTable:
    """Source: DPM-Solver++ (arXiv 2211.01095) algorithm 2; first and last step are of order 1."""
    t, a, signal, spread, log_snr = _levels(steps, scheduler, alphas)
    table = matrices(steps)
    before = KEPT[0]
    for i, step in enumerate(table):
        h = log_snr[i + 1] - log_snr[i]
        gain = -signal[i + 1] * np.expm1(-h)  # weight of the model's estimate
        slope = 0.5 * gain * h / (log_snr[i] - log_snr[i - 1]) if _order(i, steps, log_snr) == 2 else 0.0
        fill(step[0], {X: spread[i + 1] / spread[i], X0: gain + slope, before: -slope})
        fill(step[1], {X0: 1.0})
    return SamplerTable(t.astype(np.float64), a, table, stochastic=False)


def unipc(steps: int, scheduler: Mapping[str, Any], alphas: Floats) -> SamplerTable:
    """Each step first corrects where the last one led, with what the model says there, then predicts; order 2.

    Source: UniPC (arXiv 2302.04867) algorithms 5 to 8 for data prediction with B(h) = e^h - 1; the last step is of
    order 1.
    """
    t, a, signal, spread, log_snr = _levels(steps, scheduler, alphas)
    table = matrices(steps)
    origin, before, earlier = (
        KEPT  # where the last step began, and the clean latents of the two before this one
    )
    for i, step in enumerate(table):
        here = np.zeros(table.shape[2])  # the corrected sample
        if i == 0:
            fill(here, {X: 1.0})
        else:
            h, gain = log_snr[i] - log_snr[i - 1], -np.expm1(-(log_snr[i] - log_snr[i - 1]))
            fill(here, {origin: spread[i] / spread[i - 1], before: signal[i] * gain})
            rho_earlier, rho = 0.0, 0.5
            if _order(i - 1, steps, log_snr) == 2 and h > 0:
                ratio = (log_snr[i - 2] - log_snr[i - 1]) / h
                rho_earlier, rho = _corrector(h, ratio)
                rho_earlier /= ratio
            fill(here, [(X0, signal[i] * gain * rho), (before, -signal[i] * gain * (rho + rho_earlier))])
            fill(here, {earlier: signal[i] * gain * rho_earlier})
        h = log_snr[i + 1] - log_snr[i]
        gain = -signal[i + 1] * np.expm1(-h)
        slope = 0.5 * gain * h / (log_snr[i] - log_snr[i - 1]) if _order(i, steps, log_snr) == 2 else 0.0
        step[0] = spread[i + 1] / spread[i] * here
        fill(step[0], [(X0, gain + slope), (before, -slope)])
        step[1] = here
        fill(step[2], {X0: 1.0})
        fill(step[3], {before: 1.0})
    return SamplerTable(t.astype(np.float64), a, table, stochastic=False)


def _order(step: int, steps: int, log_snr: Floats) -> int:
    """The order of a step: it has nothing to look back on at first or where it stood still, and ends with care."""
    return 2 if 0 < step < steps - 1 and log_snr[step] > log_snr[step - 1] else 1


def _corrector(h: float, ratio: float) -> tuple[float, float]:
    """Weights of the earlier and of the new difference; `ratio` is how far back the earlier one is, in units of h."""
    hh = -h
    phi_1 = np.expm1(hh)
    phi_2 = phi_1 / hh - 1
    phi_3 = phi_2 / hh - 1 / 2
    solved = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [phi_2 / phi_1, 2 * phi_3 / phi_1])
    return float(solved[0]), float(solved[1])


def _levels(
    steps: int, scheduler: Mapping[str, Any], alphas: Floats
) -> tuple[Ints, Floats, Floats, Floats, Floats]:
    """What the solvers of the probability flow share.

    Returns:
        Timesteps [n] and `alphas_cumprod` there [n]; with the end after them, factors of signal and noise and half
        the logarithm of their ratio's square [n + 1].
    """
    total = len(alphas)
    spacing = scheduler.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        timesteps: NDArray[Any] = np.linspace(0, total - 1, steps + 1).round()[:0:-1]
    elif spacing == "leading":
        timesteps = np.arange(1, steps + 1)[::-1] * (total // (steps + 1))
        timesteps = timesteps + int(scheduler.get("steps_offset", 0))
    else:
        timesteps = trailing(steps, total, spacing)
    t = timesteps.astype(np.int64)
    a = np.maximum(alphas[t], LEAST_ALPHA)
    signal, spread = np.sqrt(np.append(a, 1.0)), np.sqrt(np.append(1 - a, 0.0))
    with np.errstate(divide="ignore"):
        log_snr = np.log(signal) - np.log(spread)
    return t, a, signal, spread, log_snr
