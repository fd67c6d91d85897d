"""This file is where the packages of optimizers enter, and where what an optimizer remembers is saved and brought back.

An optimizer that ZeRO may shard remembers moments of the shape of each parameter, by the names in `MOMENTS`; every
other one is asked for all that it has.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, cast

import torch
from torch import nn

from cluster.errors import UserError
from training.checkpoint import Tensors
from training.optimizer_settings import EIGHT_BIT_FROM, Optimizer, refuse_missing

MOMENTS: Mapping[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}
"""Keys of the state of those that can be sharded, in the order of a checkpoint."""
_TABLES = ("qmap1", "qmap2")  # of bitsandbytes: the same for every parameter, and made anew
_GROUP = "group"


def make_optimizer(
    optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Args:
        optimizer: Which one, and its options.
        groups: Parameters and learning rate of each part, `{"params", "lr"}`, on their device.
        weight_decay: Decoupled, for all of them.

    Raises:
        UserError: Its package is not installed, or does not run on that device.
    """
    refuse_missing(optimizer)
    given = {name: value for name in ("betas", "eps") if (value := getattr(optimizer, name)) is not None}
    given["weight_decay"] = weight_decay
    params: Any = [dict(group) for group in groups]
    made: Any
    match optimizer.name:
        case "adamw":
            return torch.optim.AdamW(params, fused=True, **given)
        case "adamw-8bit":
            made = _eight_bit(params, given)
        case "adafactor":
            from transformers.optimization import Adafactor

            # the rate is the run's, as of all others, and not one of its own
            made = Adafactor(params, relative_step=False, scale_parameter=optimizer.scale_parameter, **given)
        case "lion":
            from lion_pytorch import Lion

            made = Lion(params, **given)
        case "prodigy":
            from prodigyopt import Prodigy

            own = {
                name: getattr(optimizer, name)
                for name in ("d0", "d_coef", "use_bias_correction", "safeguard_warmup")
            }
            with redirect_stdout(io.StringIO()):  # it tells that it decays weights
                made = Prodigy(params, **given, **own)
        case "adamw-schedulefree":
            from schedulefree import AdamWScheduleFree

            made = AdamWScheduleFree(params, **given)
            made.train()
    return cast(torch.optim.Optimizer, made)


def _eight_bit(params: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> Any:
    """bitsandbytes' AdamW, once a step of it was seen to run on the device of the parameters.

    It has a library of its own for each version of CUDA, and tells that it lacks the one for this only when it is used.
    """
    device = params[0]["params"][0].device
    try:
        from bitsandbytes.optim import AdamW8bit

        scratch = nn.Parameter(torch.zeros(EIGHT_BIT_FROM, device=device))
        scratch.grad = torch.ones_like(scratch)
        AdamW8bit([scratch]).step()
        ran = bool(scratch.isfinite().all() and (scratch != 0).all())
    except Exception as error:
        raise _does_not_run(device, f"{type(error).__name__}: {str(error).strip()[:300]}") from error
    if not ran:
        raise _does_not_run(device, "a step of it changed nothing")
    return AdamW8bit(params, **given)


def _does_not_run(device: torch.device, seen: str) -> UserError:
    return UserError(
        f"train.optimizer.name: adamw-8bit does not run on {device.type} here",
        f"bitsandbytes: {seen}",
        "install the build of bitsandbytes for this machine, or set train.optimizer.name: adamw or adafactor",
    )


# -- what is remembered --------------------------------------------------------------------------------------


def remembered(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> Tensors:
    """All that an optimizer would go on from: `KEY/NAME` of parameters, `group/N/KEY` of groups.

    Tensors are its own and valid until its next step; numbers are float64 scalars.
    """
    kept: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            if key not in _TABLES:
                kept[f"{key}/{name}"] = value.detach() if isinstance(value, torch.Tensor) else _scalar(value)
    for number, group in enumerate(optimizer.param_groups):
        kept |= {f"{_GROUP}/{number}/{key}": _scalar(group[key]) for key in _numbers(group)}
    return kept


def bring_back(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], saved: Tensors) -> None:
    """Put back what `remembered` gave into an optimizer that has done a step, with any rate, so that it has a state."""
    for place, value in saved.items():
        key, _, name = place.partition("/")
        if key == _GROUP:
            number, _, key = name.partition("/")
            group = optimizer.param_groups[int(number)]
            group[key] = type(group.get(key, 0.0))(value.item())
            continue
        state = optimizer.state[named[name]]
        now = state[key]
        if isinstance(now, torch.Tensor):
            state[key] = value.to(now.device, now.dtype, copy=True)
        else:
            state[key] = type(now)(value.item())


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _numbers(group: Mapping[str, Any]) -> list[str]:
    return [
        key for key, value in group.items() if isinstance(value, int | float) and not isinstance(value, bool)
    ]


# -- what is published ---------------------------------------------------------------------------------------


class ScheduleFreeAverage:
    """The average that `adamw-schedulefree` is for: parameters are trained at one place and published at another.

    Args:
        optimizer: In its training mode, where it stays.
        parameters: The trained ones by name.
        saved: Averages to put in place until the optimizer has a state to make them of; `None` takes the parameters.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Tensors | None
    ) -> None:
        self._optimizer: Any = optimizer
        self._parameters, self._saved = parameters, saved

    def update(self, step: int) -> None:
        """The optimizer has taken a step, and with it the average."""
        self._saved = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the parameters hold the average; their own bits come back after it.

        The optimizer would compute them back, which is not to the bit.
        """
        kept = [parameter.detach().clone() for parameter in self._parameters.values()]
        with torch.no_grad():
            if self._saved is not None:
                for name, parameter in self._parameters.items():
                    parameter.copy_(self._saved[name])
            else:
                self._optimizer.eval()
        try:
            yield
        finally:
            self._optimizer.train()
            with torch.no_grad():
                for parameter, bits in zip(self._parameters.values(), kept, strict=True):
                    parameter.copy_(bits)
