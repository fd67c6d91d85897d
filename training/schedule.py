"""This file is where the noise process of diffusion is: how much signal each timestep leaves, and what is predicted.

x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, with a_t the cumulative product `alphas_cumprod`.
B batch, C H W latent, T timesteps.

Source: DDPM (arXiv 2006.11239) eq. 4; v-prediction: progressive distillation (arXiv 2202.00512) appendix D;
zero terminal SNR: arXiv 2305.08891 algorithm 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cluster.errors import UserError

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise process of one base."""

    alphas_cumprod: torch.Tensor
    """[T] float32: the share of the signal's variance left at each timestep, falling from 1."""
    prediction_type: PredictionType
    """What the UNet's output means: the noise, or the velocity."""
    density: Literal["uniform"] = "uniform"
    """How often timesteps are trained: all alike."""

    @classmethod
    def from_config(cls, scheduler: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule that a base's scheduler config describes.

        Raises:
            UserError: Its `beta_schedule` or `prediction_type` is unknown.
        """
        prediction_type = scheduler.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"the base predicts {prediction_type!r}",
                f"its scheduler's prediction_type is {prediction_type!r}",
                "use a base that predicts epsilon or v_prediction",
            )
        betas = _betas(scheduler)
        if scheduler.get("rescale_betas_zero_snr", False):
            betas = _zero_terminal_snr(betas)
        return cls(torch.cumprod(1.0 - betas, dim=0), prediction_type)

    @property
    def snr(self) -> torch.Tensor:
        """[T] float32: the signal's variance over the noise's at each timestep."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    @property
    def noise_levels(self) -> torch.Tensor:
        """[T] float32: the noise's standard deviation over the signal's at each timestep."""
        alphas = self.alphas_cumprod
        return ((1 - alphas) / alphas.clamp(min=2.0**-24)).sqrt()

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def asked(self, t: torch.Tensor) -> torch.Tensor:
        """What the UNet is asked by at timesteps t [B] int64: themselves."""
        return t

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t [B, C, H, W] of clean latents and noise [B, C, H, W] at timesteps t [B] int64."""
        signal, spread = _factors(self._alpha(t, x0))
        return signal * x0 + spread * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the UNet should put out [B, C, H, W] for x_t at timesteps t [B] int64."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = _factors(self._alpha(t, x0))
        return signal * noise - spread * x0

    def clean(self, output: torch.Tensor, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The clean latents x0 [B, C, H, W] that the UNet's output implies.

        Args:
            output: [B, C, H, W], the UNet's.
            x: [B, C, H, W], x_t.
            level: [B] float32, a_t of each row.
        """
        signal, spread = _factors(level.reshape(-1, 1, 1, 1))
        if self.prediction_type == "epsilon":
            return (x - spread * output) / signal
        return signal * x - spread * output

    def _alpha(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """a_t [B, 1, 1, 1] with the type and device of `like`."""
        return self.alphas_cumprod.to(like)[t].reshape(-1, 1, 1, 1)


def _factors(alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What signal and noise are multiplied with."""
    return alpha**0.5, (1.0 - alpha) ** 0.5


def _betas(scheduler: Mapping[str, Any]) -> torch.Tensor:
    """The variance [T] float32 that each timestep adds, bit for bit as diffusers computes it."""
    count = int(scheduler.get("num_train_timesteps", 1000))
    first, last = float(scheduler.get("beta_start", 0.0001)), float(scheduler.get("beta_end", 0.02))
    kind = scheduler.get("beta_schedule", "linear")
    if scheduler.get("trained_betas") is not None:
        return torch.tensor(scheduler["trained_betas"], dtype=torch.float32)
    if kind == "linear":
        return torch.linspace(first, last, count, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, count, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":
        bars = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        pairs = zip(bars[1:], bars[:-1], strict=True)
        return torch.tensor([min(1 - after / before, 0.999) for after, before in pairs], dtype=torch.float32)
    raise UserError(
        "the base's scheduler is of an unknown kind",
        f"beta_schedule: {kind!r}",
        "use a base with linear, scaled_linear or squaredcos_cap_v2",
    )


def _zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas [T] stretched so that the last timestep leaves no signal, the first as much as before."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    bars = root**2
    return 1.0 - torch.cat([bars[0:1], bars[1:] / bars[:-1]])
