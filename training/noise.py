"""This file is where the noise process of a base is found: one of diffusion, or a rectified flow.

B batch, C H W latent, T timesteps.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch

from cluster.errors import UserError
from training.basekind import FLOW_MATCH
from training.flow import FlowSchedule
from training.objective_settings import Objective
from training.schedule import NoiseSchedule

Density = Literal["uniform", "logit_normal"]


class NoiseProcess(Protocol):
    """What training and drawing ask of either; `NoiseSchedule` and `FlowSchedule` tell the arguments."""

    @property
    def prediction_type(self) -> str:
        """What the model's output means."""

    @property
    def density(self) -> Density:
        """How often each timestep is trained, if the objective does not say."""

    @property
    def num_timesteps(self) -> int:
        """T."""

    @property
    def noise_levels(self) -> torch.Tensor:
        """[T] float32: the noise's standard deviation over the signal's, rising."""

    def asked(self, t: torch.Tensor) -> torch.Tensor:
        """What the model is asked by at timesteps t [B] int64."""

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Noisy latents [B, C, H, W]."""

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the model should put out [B, C, H, W]."""

    def clean(self, output: torch.Tensor, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The clean latents [B, C, H, W] that an output implies at levels [B] of a sampler's table."""


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler config is that of a flow."""
    return scheduler.get("_class_name") == FLOW_MATCH


def noise_process(scheduler: Mapping[str, Any]) -> NoiseProcess:
    """The noise process that a base's scheduler config describes.

    Raises:
        UserError: It is of an unknown kind.
    """
    return FlowSchedule.from_config(scheduler) if is_flow(scheduler) else NoiseSchedule.from_config(scheduler)


def trained_scheduler(scheduler: Mapping[str, Any], objective: Objective) -> Mapping[str, Any]:
    """The scheduler config that a run trains with, and its artifact is drawn with: the base's, or a stretched one.

    Raises:
        UserError: The objective has no meaning for the base: a base that predicts the noise is to be shown nothing but
            noise, of which it learns nothing, or a flow is to be trained as diffusion is.
    """
    if is_flow(scheduler):
        _refuse_of_diffusion(objective)
        return scheduler
    if not objective.zero_terminal_snr:
        return scheduler
    if scheduler.get("prediction_type", "epsilon") != "v_prediction":
        raise UserError(
            "train.objective.zero_terminal_snr cannot be had with this base",
            "it predicts the noise, which says nothing of the image where nothing but noise is left",
            "leave it out, or use a base that predicts velocity",
        )
    # the last timestep has to be asked for, or nothing of this shows
    return {**scheduler, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def _refuse_of_diffusion(objective: Objective) -> None:
    if objective.weighting != "none":
        raise UserError(
            f"train.objective.weighting: {objective.weighting} cannot be had with this base",
            "it is of flow matching, and the weighting evens out the timesteps of diffusion",
            "leave it out; there train.objective.timesteps: logit_normal and its logit_mean say which count the most",
        )
    if objective.zero_terminal_snr:
        raise UserError(
            "train.objective.zero_terminal_snr cannot be had with this base",
            "it is of flow matching, whose last timestep leaves no signal as it is",
            "leave it out",
        )
