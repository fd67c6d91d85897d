"""This file is where the optimizer of a run is set, and where it is told what of it takes effect. It imports no torch.

The learning rates, the decay and the clipping are the run's, whatever the optimizer (`training/recipe.py`).
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.errors import UserError
from training.section import Section

Name = Literal["adamw", "adamw-8bit", "adafactor", "lion", "prodigy", "adamw-schedulefree"]
# Their state is a tensor of the shape of each parameter and nothing else, so it can be cut anywhere
SHARDED: tuple[Name, ...] = ("adamw", "lion")
MODULES: Mapping[Name, str] = {
    "adamw-8bit": "bitsandbytes",
    "lion": "lion_pytorch",
    "prodigy": "prodigyopt",
    "adamw-schedulefree": "schedulefree",
}
"""What of the extra `optimizers` each one needs, or the extra of its name; the others come with what is there."""
EIGHT_BIT_FROM = 4096  # elements of a parameter whose moments bitsandbytes keeps in a byte
_BLOCK = 256  # of them share a scale

_ADAMS: tuple[Name, ...] = ("adamw", "adamw-8bit", "prodigy", "adamw-schedulefree")
_READERS: Mapping[str, tuple[Name, ...]] = {
    "betas": (*_ADAMS, "lion"),
    "eps": _ADAMS,
    "scale_parameter": ("adafactor",),
    "d0": ("prodigy",),
    "d_coef": ("prodigy",),
    "use_bias_correction": ("prodigy",),
    "safeguard_warmup": ("prodigy",),
}

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """What makes an update of a gradient. All decay weights apart from the gradient, as AdamW does."""

    name: Name = "adamw"
    """`adamw`; `adamw-8bit` with moments of a byte (bitsandbytes); `adafactor` with one moment, factored; `lion` with
    one moment, by sign; `prodigy`, which finds the rate; `adamw-schedulefree`, which averages and needs no schedule."""
    betas: tuple[Beta, Beta] | None = None
    """Decay of the moments; `null` is the optimizer's own: 0.9 and 0.999, of `lion` 0.9 and 0.99."""
    eps: float | None = Field(default=None, gt=0, le=1)
    """Added to the divisor; `null` is the optimizer's own, 1e-8."""
    scale_parameter: bool = False
    """Of `adafactor`: a tensor's rate grows with what is in it."""
    d0: float = Field(default=1e-6, gt=0, le=1)
    """Of `prodigy`: the rate it starts from."""
    d_coef: float = Field(default=1.0, gt=0, le=100)
    """Of `prodigy`: what the rate that it finds is multiplied with, the way to tune it."""
    use_bias_correction: bool = False
    """Of `prodigy`: Adam's bias correction."""
    safeguard_warmup: bool = False
    """Of `prodigy`: leave the warm-up out of what it finds the rate by."""

    @model_validator(mode="after")
    def _takes_effect(self) -> "Optimizer":
        for option, names in _READERS.items():
            if self.name not in names and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"`{option}` takes no effect with name: {self.name}; leave it out")
        if self.name == "adamw-schedulefree" and self.betas and not self.betas[0]:
            raise ValueError("`betas` must begin above 0 with name: adamw-schedulefree, which divides by it")
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether its state can lie in parts on many workers, or in the memory of the CPU: ZeRO 1 to 3."""
        return self.name in SHARDED


def refuse_sharding(optimizer: Optimizer, zero_stage: object, offload: bool) -> None:
    """Refuse to cut the state of an optimizer that cannot be cut.

    Args:
        optimizer: The run's.
        zero_stage: `auto`, which takes what can be had, or a number.
        offload: Whether its state is to lie in the memory of the CPU, which stages 1 to 3 do.

    Raises:
        UserError: It is one that has a state of whole parameters, or figures over all of them.
    """
    if optimizer.is_sharded or not (offload or zero_stage in (1, 2, 3)):
        return
    setting = "engine.offload" if offload else "engine.zero_stage"
    raise UserError(
        f"{setting} cannot be had with train.optimizer.name: {optimizer.name}",
        "ZeRO keeps flat parts of parameters, and this optimizer needs them whole",
        f"set {'engine.offload: false' if offload else 'engine.zero_stage: auto'}, or an optimizer of "
        f"{', '.join(SHARDED)}",
    )


def refuse_missing(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose package is not installed; nothing is imported.

    Raises:
        UserError: It is not.
    """
    module = MODULES.get(optimizer.name)
    if module and importlib.util.find_spec(module) is None:
        raise UserError(
            f"train.optimizer.name is {optimizer.name}, but {module} is not installed",
            f"No module named {module!r}",
            f"pip install 'raybooth[{'bitsandbytes' if module == 'bitsandbytes' else 'optimizers'}]'",
        )


def state_bytes(optimizer: Optimizer, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes of the state of parameters of these shapes, beyond the parameters; numbers are not counted."""
    return sum(_state_bytes(optimizer, tuple(shape)) for shape in shapes)


def _state_bytes(optimizer: Optimizer, shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    match optimizer.name:
        case "adamw" | "adamw-schedulefree":
            return 8 * size
        case "adamw-8bit":
            return 8 * size if size < EIGHT_BIT_FROM else 2 * size + 2 * 4 * -(-size // _BLOCK)
        case "adafactor":
            factored = size // shape[-1] + size // shape[-2] if len(shape) > 1 else size
            return 4 * factored
        case "lion":
            return 4 * size
        case "prodigy":  # two moments, where it began, and a sum of gradients
            return 16 * size
