"""This file is where the moving average of the trained weights is kept (EMA).

It averages what rests of a parameter on this rank between steps: all of it, or with ZeRO-3 this rank's shard.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.checkpoint import Tensors


def average_decay(decay: float, step: int) -> float:
    """How much of the average stays at step `step` (from 0): little at first, as the first weights are the base's."""
    return min(decay, (1 + step) / (10 + step))


class Average:
    """The moving average of `parameters`, to be put in their place for a while.

    Args:
        parameters: The trained ones by name, after DeepSpeed has taken them over.
        decay: In (0, 1).
        saved: Whole averages to go on from; `None` starts with the parameters as they are.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, saved: Tensors | None) -> None:
        self._parameters = list(parameters.values())
        self._decay = decay
        self._averages = [live.clone() for live in self._live()]
        if saved is not None:
            for name, average in zip(parameters, self._averages, strict=True):
                average.copy_(_resting_part(saved[name], average))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (from 0)."""
        torch._foreach_lerp_(self._averages, self._live(), 1.0 - average_decay(self._decay, step))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the parameters hold the average; their own bits come back after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        _release(self._parameters)
        for live, average in zip(self._live(), self._averages, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)

    def _live(self) -> list[torch.Tensor]:
        return [_resting(parameter) for parameter in self._parameters]


def _release(parameters: list[nn.Parameter]) -> None:
    """With ZeRO-3 drop the whole copies of small parameters that it keeps between steps; what needs them gathers."""
    sharded: list[Any] = [p for p in parameters if hasattr(p, "ds_tensor")]
    if sharded:
        sharded[0].partition(sharded)


def _resting(parameter: Any) -> torch.Tensor:
    tensor: torch.Tensor = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data
    return tensor


def _resting_part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What rests on this rank of a whole tensor: all of it, or its shard, filled up with zeros at the end."""
    if whole.shape == like.shape:
        return whole
    start = dist.get_rank() * like.numel()
    part = whole.flatten()[start : start + like.numel()]
    return nn.functional.pad(part, (0, like.numel() - part.numel()))
