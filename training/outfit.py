"""This file is where an artifact becomes what a row wears while it is drawn: adapters, or weights of its own.

Adapters of linear layers are worn row by row, many subjects in one forward pass. Everything else (a `full` artifact,
an adapted convolution, DoRA) is weights that a forward pass has for all of its rows, kept as what differs from the
base.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from cluster.errors import SystemFailure, UserError
from training.lora import CHANGED, LayerFactors, read_lora
from training.lora import FILE as LORA_FILE
from training.lora_algebra import merged
from training.new_tokens import NewTokens, embedding_names, read_tokens
from training.noise import trained_scheduler
from training.objective_settings import Objective
from training.pipeline import BaseInfo
from training.pipeline_files import read_weights
from training.row_linear import Adapter, Factors

Models = Mapping[str, nn.Module]
"""By part, the denoiser first, then text encoders, for the kinds and shapes of their layers."""
Weights = Mapping[str, torch.Tensor]
"""Parameters by `PART.NAME`."""


@dataclass(frozen=True, eq=False)
class Outfit:
    """What rows of one artifact wear. Two of them are the same only if they are one object."""

    unet: Adapter = field(default_factory=dict)
    text: Mapping[str, Adapter] = field(default_factory=dict)
    """Of each text encoder, by its part."""
    weights: Weights = field(default_factory=dict)
    """Whole parameters in place of the base's; only rows that have the same ones share a forward pass."""
    tokens: NewTokens | None = None
    """What its text encoders know beyond the base's tokens."""
    scheduler: Mapping[str, Any] | None = None
    """The scheduler config that it was trained with; `None` is the base's."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        factors = (f.nbytes for adapter in (self.unet, *self.text.values()) for f in adapter.values())
        tokens = self.tokens.embeddings if self.tokens else {}
        return sum(factors) + sum(t.nbytes for held in (self.weights, tokens) for t in held.values())


PLAIN = Outfit()
"""What rows of the pristine base wear."""


def read_outfit(
    base: BaseInfo, models: Models, pristine: Weights, folder: Path, manifest: Mapping[str, Any] | None
) -> Outfit:
    """Read an artifact into memory; the models are left as they are.

    Args:
        base: What it must have been trained from.
        models: That will wear it.
        pristine: The base's parameters.
        folder: Of the artifact, local, its files checked.
        manifest: The artifact's; `None` trusts that it fits.

    Raises:
        UserError: It was trained from another base.
        SystemFailure: It does not fit the base.
    """
    trained_from = manifest["base"]["revision"] if manifest else base.revision
    if trained_from != base.revision:
        raise UserError(
            "the artifact was trained from another base",
            f"from revision {trained_from}, and {base.model} is {base.revision}",
            "draw it with the base it was trained from",
        )
    scheduler, tokens = _scheduler(base, manifest or {}), read_tokens(folder)
    if tokens:
        widths = {part: pristine[name].shape[1] for part, name in embedding_names(pristine).items()}
        own = {part: rows.shape[1] for part, rows in tokens.embeddings.items()}
        if own != widths:
            seen = f"new tokens of widths {own} for embeddings of {widths}"
            raise SystemFailure(f"{folder} does not fit the base", seen)
    if (folder / LORA_FILE).is_file():
        return replace(_of_lora(models, pristine, folder), scheduler=scheduler, tokens=tokens)
    if (folder / CHANGED).is_file():
        whole = {**{name: value.cpu() for name, value in pristine.items()}, **load_file(folder / CHANGED)}
    else:
        whole = read_weights(folder, models)
    misfits = [
        name
        for name in sorted(whole.keys() | pristine.keys())
        if name not in whole or name not in pristine or whole[name].shape != pristine[name].shape
    ]
    if misfits:
        raise SystemFailure(f"{folder} does not fit the base", f"{misfits[0]} and {len(misfits) - 1} more")
    return Outfit(
        weights={
            name: value for name, value in whole.items() if not torch.equal(value, pristine[name].cpu())
        },
        tokens=tokens,
        scheduler=scheduler,
    )


def _scheduler(base: BaseInfo, manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    objective = manifest.get("recipe", {}).get("train", {}).get("objective")
    return trained_scheduler(base.scheduler, Objective.model_validate(objective)) if objective else None


def _of_lora(models: Models, pristine: Weights, folder: Path) -> Outfit:
    adapters: dict[str, dict[str, Factors]] = {part: {} for part in models}
    weights: dict[str, torch.Tensor] = {}
    for part, layers in read_lora(folder).items():
        if part not in models:
            raise SystemFailure(f"{folder / LORA_FILE} does not fit the base", f"which has no {part}")
        modules = dict(models[part].named_modules())
        for name, factors in layers.items():
            module = modules.get(name)
            _check(module, factors, f"{part}.{name}", folder)
            if len(factors.a.shape) == 2 and factors.magnitude is None:
                adapters[part][name] = Factors.of(factors.a, factors.b, factors.scale)
            else:
                weight = f"{part}.{name}.weight"
                weights[weight] = merged(pristine[weight].cpu(), factors)
    unet = adapters.pop(next(iter(models)))
    return Outfit(unet, {part: adapter for part, adapter in adapters.items() if adapter}, weights)


def _check(module: nn.Module | None, factors: LayerFactors, name: str, folder: Path) -> None:
    weight = getattr(module, "weight", None)
    fits = (
        isinstance(weight, torch.Tensor)
        and len(factors.a.shape) == len(weight.shape)
        and factors.a.shape[1:] == weight.shape[1:]
        and factors.b.shape[0] == weight.shape[0]
    )
    if not fits:
        there = tuple(weight.shape) if isinstance(weight, torch.Tensor) else "nothing"
        raise SystemFailure(
            f"{folder / LORA_FILE} does not fit the base",
            f"{name}: A {tuple(factors.a.shape)} and B {tuple(factors.b.shape)} for {there}",
        )
