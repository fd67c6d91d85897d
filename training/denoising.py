"""This file is where a denoising step is a table of numbers, so that rows of one batch may differ in all of them.

Every sampler here is linear in what it knows, so a step of any of them is one product with a small matrix:

    (x, kept...) after = matrix (x, x0, kept..., noise) before

with x0 the clean latents that the model implies now and `kept` what a sampler remembers of earlier steps: a clean
latent, the model's output, or where it came from. Rows at different steps, with different samplers and different
numbers of steps, share one update.

n steps, B batch, C H W latent, K = `MEMORY`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MEMORY = (
    3  # latents that a sampler may remember: PLMS has three outputs, UniPC a sample and two clean latents
)
X, X0, NOISE = 0, 1, 2 + MEMORY  # columns of a step's matrix
KEPT = range(2, 2 + MEMORY)
LEAST_ALPHA = (
    2.0**-24
)  # what diffusers takes a terminal SNR of zero for, where a step would be infinitely long


@dataclass(frozen=True)
class SamplerTable:
    """One sampler with one number of steps. The first x is noise of unit variance times `start`, `kept` is zeros."""

    timesteps: Floats
    """[n], where the model is asked; those of `euler` may lie between two of the base's."""
    levels: Floats
    """[n]: what the noise process wants of them to make x0 of the model's output: `alphas_cumprod`, or s of a flow."""
    coefficients: Floats
    """[n, 1 + K, 3 + K]: the matrix of each step; rows x and kept, columns x, x0, kept and noise."""
    stochastic: bool
    """Whether each step draws noise."""
    start: float = 1.0
    """Of `euler` a little less than 1 where its first step is not the base's last."""

    def __len__(self) -> int:
        return len(self.timesteps)


def advance(
    x: torch.Tensor, x0: torch.Tensor, kept: torch.Tensor, noise: torch.Tensor, coefficients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, C, H, W] and kept [B, K, C, H, W] after a step.

    Args:
        x: [B, C, H, W].
        x0: [B, C, H, W].
        kept: [B, K, C, H, W].
        noise: [B, C, H, W].
        coefficients: [B, 1 + K, 3 + K].
    """
    columns = coefficients.to(x).reshape(len(x), 1 + MEMORY, 3 + MEMORY, 1, 1, 1).unbind(2)
    known = (x, x0, *kept.unbind(1), noise)
    after = columns[0] * known[0][:, None]
    for column, part in zip(
        columns[1:], known[1:], strict=True
    ):  # row by row: a matrix product's bits are the batch's
        after = after + column * part[:, None]
    return after[:, 0], after[:, 1:]


def matrices(steps: int) -> Floats:
    """Matrices [n, 1 + K, 3 + K] of zeros, to be filled in."""
    return np.zeros((steps, 1 + MEMORY, 3 + MEMORY))


def one_step(c_x: Floats, c_0: Floats, c_noise: Floats | float = 0.0) -> Floats:
    """Matrices [n, 1 + K, 3 + K] of a sampler that remembers nothing, from its coefficients [n]."""
    out = matrices(len(c_x))
    out[:, 0, X], out[:, 0, X0], out[:, 0, NOISE] = c_x, c_0, c_noise
    return out


def spaced(steps: int, total: int, scheduler: Mapping[str, Any], default: str = "leading") -> NDArray[Any]:
    """Timesteps [n], falling from the noisiest, spaced as a base's scheduler config says.

    Args:
        steps: n.
        total: Timesteps of the base.
        scheduler: Its config.
        default: The spacing where the config names none.

    Raises:
        UserError: The spacing is unknown.

    Source:
        arXiv 2305.08891 table 2.
    """
    spacing = scheduler.get("timestep_spacing", default)
    if spacing == "linspace":
        linear: NDArray[Any] = np.linspace(0, total - 1, steps)[::-1]
        return linear
    if spacing == "leading":
        leading: NDArray[Any] = np.arange(steps)[::-1] * (total // steps) + int(
            scheduler.get("steps_offset", 0)
        )
        return leading
    return trailing(steps, total, spacing)


def trailing(steps: int, total: int, spacing: str) -> NDArray[Any]:
    """Timesteps of `trailing` spacing; the last of the known ones."""
    if spacing != "trailing":
        raise UserError(
            "the base's scheduler is of an unknown kind",
            f"timestep_spacing: {spacing!r}",
            "use a base with linspace, leading or trailing",
        )
    timesteps: NDArray[Any] = np.round(np.arange(total, 0, -total / steps)) - 1
    return timesteps


def clipped(timesteps: NDArray[Any], total: int) -> Ints:
    """Whole timesteps within the base's."""
    return np.minimum(timesteps.round().astype(np.int64), total - 1)


def fill(row: Floats, parts: Mapping[int, float] | Sequence[tuple[int, float]]) -> None:
    """Add coefficients to a row [3 + K] by column; a column may be named twice."""
    for column, value in parts.items() if isinstance(parts, Mapping) else parts:
        row[column] += value
