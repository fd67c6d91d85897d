"""This file is where the objective of a run is set: how rows are weighed, measured, masked and noised."""

from typing import Literal

from pydantic import Field, model_validator

from training.section import Section


class Objective(Section):
    """The loss of a row, and the noise in it. What is predicted, noise or velocity, is the base's."""

    weighting: Literal["none", "min_snr", "debiased", "p2"] = "none"
    """How rows are weighed by the signal-to-noise ratio of their timestep."""
    snr_gamma: float = Field(default=5.0, gt=0)
    """Of `min_snr`: ratios above count as this one."""
    p2_gamma: float = Field(default=1.0, gt=0, le=10)
    """Of `p2`: how much less a row counts the less noise it has."""
    loss: Literal["mse", "l1", "huber", "smooth_l1", "log_cosh"] = "mse"
    """Of a difference: its square, its absolute value, or what grows linearly where it is large."""
    huber_c: float = Field(default=0.1, gt=0, le=1)
    """Of `huber` and `smooth_l1`: from about where on they are linear, at the least."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How that point moves with the timestep: not, from 1 down to `huber_c`, or likewise by the noise level."""
    offset_noise: float = Field(default=0.0, ge=0, le=1)
    """Standard deviation of noise that is one number for a whole channel, so that brightness is learnt; 0 is off."""
    multires_noise_iterations: int = Field(default=0, ge=0, le=10)
    """Noise of this many coarser resolutions is added, so that large shapes are learnt; 0 is off."""
    multires_noise_discount: float = Field(default=0.3, gt=0, le=1)
    """How strong each of them is, as a share of the one before."""
    input_perturbation: float = Field(default=0.0, ge=0, le=1)
    """Standard deviation of noise that the model sees and is not asked for, relative to what it is; 0 is off."""
    zero_terminal_snr: bool = False
    """Stretch the base's noise process so that its last timestep leaves no signal; drawing does the same. For bases
    that predict velocity."""
    timesteps: Literal["auto", "uniform", "logit_normal"] = "auto"
    """How often each timestep is trained: all alike, or those in the middle the most. `auto` is `logit_normal` for a
    base of flow matching, else `uniform`."""
    logit_mean: float = Field(default=0.0, ge=-5, le=5)
    """Of `logit_normal`: where the middle is; above 0 there is more noise than image in it."""
    logit_std: float = Field(default=1.0, gt=0, le=5)
    """Of `logit_normal`: how wide it is."""
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of rows that are trained with the empty prompt, which keeps guidance sharp; 0 is off."""
    mask: Literal["none", "alpha", "files"] = "none"
    """Where a photo counts: everywhere, where it is opaque, or where `NAME-masklabel.png` beside `NAME` is white."""
    mask_outside: float = Field(default=0.0, ge=0, le=1)
    """How much the rest of the photo counts."""
    mask_prior: float = Field(default=0.0, ge=0, le=100)
    """Weight of staying what the base predicts there; 0 is off."""

    @model_validator(mode="after")
    def _takes_effect(self) -> "Objective":
        owners = {
            "mask_outside": ("mask", self.mask != "none"),
            "mask_prior": ("mask", self.mask != "none"),
            "snr_gamma": ("weighting", self.weighting == "min_snr"),
            "p2_gamma": ("weighting", self.weighting == "p2"),
            "huber_c": ("loss", self.loss in ("huber", "smooth_l1")),
            "huber_schedule": ("loss", self.loss in ("huber", "smooth_l1")),
            "logit_mean": ("timesteps", self.timesteps == "logit_normal"),
            "logit_std": ("timesteps", self.timesteps == "logit_normal"),
            "multires_noise_discount": ("multires_noise_iterations", self.multires_noise_iterations > 0),
        }
        for name, (owner, used) in owners.items():
            if not used and getattr(self, name) != type(self).model_fields[name].default:
                remedy = (
                    "set timesteps: logit_normal, or leave it out" if owner == "timesteps" else "leave it out"
                )
                raise ValueError(f"`{name}` takes no effect with {owner}: {getattr(self, owner)}; {remedy}")
        return self
