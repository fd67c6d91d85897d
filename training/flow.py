"""This file is where the noise process of SD3 is: a straight line from the image to noise, and the way back.

x_s = (1 - s) x0 + s noise, and the model says how x changes with s: noise - x0. Timesteps are 0 to T - 1, of which each
has its s, rising to 1; the model is asked by s T.

B batch, C H W latent, T timesteps, n steps.

Source: rectified flow (arXiv 2209.03003) eq. 1; Stable Diffusion 3 (arXiv 2403.03206) eq. 13 and 23.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from cluster.errors import UserError
from training.denoising import SamplerTable, one_step

# What diffusers' scheduler can do besides, which no base of SD3 asks for
_OTHERWISE = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


@dataclass(frozen=True)
class FlowSchedule:
    """The rectified flow of one base."""

    sigmas: torch.Tensor
    """[T] float32: s of each timestep, rising to 1."""
    prediction_type: Literal["flow"] = "flow"
    density: Literal["logit_normal"] = "logit_normal"
    """How often timesteps are trained: those in the middle the most, as in the paper and diffusers' script."""

    @classmethod
    def from_config(cls, scheduler: Mapping[str, Any]) -> "FlowSchedule":
        """The flow that a base's scheduler config describes, bit for bit as diffusers computes it.

        Raises:
            UserError: It asks for timesteps that are spaced otherwise, or its shift is no number above 0.
        """
        if odd := [name for name in _OTHERWISE if scheduler.get(name)]:
            raise UserError(
                "the base's scheduler is of an unknown kind",
                f"{odd[0]}: {scheduler[odd[0]]!r}",
                "use a base of SD3, whose scheduler has a shift alone",
            )
        total = int(scheduler.get("num_train_timesteps", 1000))
        even = torch.linspace(1, total, total, dtype=torch.float32) / total
        return cls(shifted(even, _shift(scheduler)))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.sigmas)

    @property
    def noise_levels(self) -> torch.Tensor:
        """[T] float32: the noise's standard deviation over the signal's at each timestep."""
        return self.sigmas / (1.0 - self.sigmas).clamp(min=2.0**-24)

    def asked(self, t: torch.Tensor) -> torch.Tensor:
        """What the model is asked by at timesteps t [B] int64: float32 [B]."""
        return self.sigmas.to(t.device)[t] * self.num_timesteps

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_s [B, C, H, W] of clean latents and noise [B, C, H, W] at timesteps t [B] int64."""
        s = self.sigmas.to(x0)[t].reshape(-1, 1, 1, 1)
        return (1.0 - s) * x0 + s * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the model should put out [B, C, H, W], the same at all timesteps."""
        return noise - x0

    def clean(self, output: torch.Tensor, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The clean latents x0 [B, C, H, W] that the model's output implies.

        Args:
            output: [B, C, H, W], the model's.
            x: [B, C, H, W], x_s.
            level: [B] float32, s of each row.
        """
        return x - level.reshape(-1, 1, 1, 1) * output


def _shift(scheduler: Mapping[str, Any]) -> float:
    shift = scheduler.get("shift", 1.0)
    if not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise UserError(
            "the shift of the base's scheduler is no number above 0",
            f"it is {shift!r}",
            "set it in scheduler_config.json, or leave it out; 3.0 is what SD3 was published with",
        )
    return float(shift)


def shifted(sigmas: Any, shift: float) -> Any:
    """Even s moved towards noise, of which large images need more before nothing is seen of them.

    Source: arXiv 2403.03206 eq. 23.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_euler(steps: int, scheduler: Mapping[str, Any]) -> SamplerTable:
    """Euler's method along the flow, s spaced as diffusers spaces it: evenly between its ends, and shifted then."""
    schedule, shift = FlowSchedule.from_config(scheduler), _shift(scheduler)
    total = schedule.num_timesteps
    first, last = float(schedule.sigmas[-1]) * total, float(schedule.sigmas[0]) * total
    sigmas = shifted(np.linspace(first, last, steps) / total, shift).astype(np.float32)
    asked = (sigmas * np.float32(total)).astype(np.float64)  # what the model is asked is in single precision
    now = sigmas.astype(np.float64)
    left = np.append(now[1:], 0.0) / now
    return SamplerTable(asked, now, one_step(left, 1.0 - left), stochastic=False)
