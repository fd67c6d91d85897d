"""This file is where a row's error is measured, and weighed by how much noise the row has.

A weighting is a weight of the error in the clean latents, w(snr). The error in the noise is snr times that, the error
in the velocity snr + 1 times, so the same weighting is w / snr for a base that predicts the one and w / (snr + 1) for
the other. Weights are those of each row's own timestep, whatever its role.

B rows, C latent channels, H W latent size, T timesteps.
"""

import math

import torch
from torch import nn

from training.noise import NoiseProcess
from training.objective_settings import Objective
from training.schedule import NoiseSchedule


class Criterion:
    """The loss of rows as an objective has it.

    Args:
        objective: Loss, its schedule, and weighting.
        schedule: Of the base, as it is trained.
    """

    def __init__(self, objective: Objective, schedule: NoiseProcess) -> None:
        self._loss = objective.loss
        self._outside, self.mask_prior = objective.mask_outside, objective.mask_prior
        self._weights = snr_weights(objective, schedule)
        self._widths = huber_widths(objective, schedule)

    def row_losses(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        mask: torch.Tensor | None = None,
        taught: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of each row, float32 [B].

        Args:
            prediction: The model's output [B, C, H, W], any float dtype.
            target: What it should have been [B, C, H, W], float32.
            timesteps: int64 [B].
            mask: float32 [B, 1, H, W], 0 to 1: the loss is a mean over what is in it, however little that is.
            taught: float32 [B, C, H, W], what the base predicts, where `mask_prior` asks for it outside of the mask.
        """
        errors = self._errors(prediction.float() - target, timesteps)
        if mask is None:
            losses = errors.mean(dim=(1, 2, 3))
        else:
            losses = _mean_where(errors, mask + self._outside * (1 - mask))
            if taught is not None:
                drift = self._errors(prediction.float() - taught, timesteps)
                losses = losses + self.mask_prior * _mean_where(drift, 1 - mask)
        return losses if self._weights is None else losses * self._weights.to(losses.device)[timesteps]

    def _errors(self, difference: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The loss of each value [B, C, H, W].

        Source:
            Pseudo-Huber loss (arXiv 2403.16728). `huber` is the square near 0; `smooth_l1` is twice the absolute value
            far from it.
        """
        if self._loss == "mse":
            return difference.square()
        if self._loss == "l1":
            return difference.abs()
        if self._loss == "log_cosh":  # without the overflow of the cosine
            size = difference.abs()
            return size + nn.functional.softplus(-2 * size) - math.log(2)
        assert self._widths is not None  # those of huber and smooth_l1
        width = self._widths.to(difference.device)[timesteps].reshape(-1, 1, 1, 1)
        square = difference.square()
        bent = square / (
            (square + width.square()).sqrt() + width
        )  # the root less the width, without cancelling
        return 2 * width * bent if self._loss == "huber" else 2 * bent


def _mean_where(errors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mean [B] of errors [B, C, H, W] with weights [B, 1, H, W]; 0 where there is none."""
    area = weight.sum(dim=(1, 2, 3)) * errors.shape[1]
    return (errors * weight).sum(dim=(1, 2, 3)) / area.clamp(min=1e-6)


def snr_weights(objective: Objective, schedule: NoiseProcess) -> torch.Tensor | None:
    """What the loss of a row at each timestep is multiplied with, float32 [T]; `None` is 1.

    Source:
        min-SNR-gamma (arXiv 2303.09556), min(snr, gamma); debiased estimation (arXiv 2310.08442), the root of the snr;
        P2 (arXiv 2204.00227) with k = 1, snr / (1 + snr)^gamma.
    """
    if objective.weighting == "none":
        return None
    assert isinstance(schedule, NoiseSchedule)  # a run of a flow is refused weights
    # without any signal left, the limit of what follows for a base that predicts velocity, and finite for the other
    snr = schedule.snr.double().clamp(min=1e-8)
    own = {
        "min_snr": snr.clamp(max=objective.snr_gamma),
        "debiased": snr.sqrt(),
        "p2": snr / (1 + snr) ** objective.p2_gamma,
    }[objective.weighting]
    return (own / (snr if schedule.prediction_type == "epsilon" else snr + 1)).float()


def huber_widths(objective: Objective, schedule: NoiseProcess) -> torch.Tensor | None:
    """Up to about which difference Huber's losses are quadratic at each timestep, float32 [T]; `None` for others.

    Source:
        arXiv 2403.16728: `exponential` falls from 1 to `huber_c` with the timestep, `snr` with the noise level sigma
        as (1 - c) / (1 + sigma)^2 + c.
    """
    if objective.loss not in ("huber", "smooth_l1"):
        return None
    least, count = objective.huber_c, schedule.num_timesteps
    if objective.huber_schedule == "constant":
        return torch.full((count,), least)
    if objective.huber_schedule == "exponential":
        return torch.exp(torch.arange(count) * (math.log(least) / count))
    return (1 - least) / (1 + schedule.noise_levels) ** 2 + least
