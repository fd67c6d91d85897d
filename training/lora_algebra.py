"""This file is where LoRAs become weights, and weights LoRAs: merging, and extraction by singular values."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cluster.errors import UserError
from training.lora import LayerFactors


def merged(weight: torch.Tensor, factors: LayerFactors) -> torch.Tensor:
    """A weight of a linear layer or a convolution with its adapter in it, in the weight's type and shape."""
    change = torch.einsum("or,r...->o...", factors.b.flatten(1), factors.a)
    whole: torch.Tensor = weight + factors.scale * change
    if factors.magnitude is None:
        return whole
    # DoRA (arXiv 2402.09353) eq. 5: the direction of each row, at a length of its own
    length: torch.Tensor = torch.linalg.vector_norm(whole.flatten(1), dim=1)
    return whole * (factors.magnitude.flatten() / length).reshape(-1, *[1] * (whole.dim() - 1))


def merge(
    pristine: Mapping[str, torch.Tensor], adapters: Mapping[str, Mapping[str, LayerFactors]]
) -> dict[str, torch.Tensor]:
    """Parameters by `PART.NAME` with a LoRA in them; those that it does not touch are the same tensors.

    Args:
        pristine: Of the base.
        adapters: By part and layer, which fit.
    """
    out = dict(pristine)
    for part, layers in adapters.items():
        for layer, factors in layers.items():
            out[f"{part}.{layer}.weight"] = merged(pristine[f"{part}.{layer}.weight"], factors)
    return out


@dataclass(frozen=True)
class Extraction:
    """A LoRA of a whole artifact, and what it does not say of it."""

    adapters: dict[str, dict[str, LayerFactors]]
    error: float
    """What is lost of the change of the layers it covers: the norm of the rest over the norm of the change, 0 to 1."""
    uncovered: float
    """The norm of the change of all other parameters (biases, norms, embeddings) over that of the whole change."""


def extract(pristine: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], rank: int) -> Extraction:
    """The LoRA nearest to the change between two sets of parameters, of every changed matrix and convolution.

    Args:
        pristine: Parameters of the base by `PART.NAME`.
        tuned: Those of the artifact.
        rank: Of every layer; those that are smaller get zeros up to it.

    Raises:
        UserError: Nothing that a LoRA can hold has changed.

    Source:
        Eckart and Young: the largest singular values are the best approximation of a matrix in the Frobenius norm.
    """
    adapters: dict[str, dict[str, LayerFactors]] = {}
    lost = covered = other = 0.0
    for name, weight in tuned.items():
        change = weight.float() - pristine[name].float()
        size = float(change.double().square().sum())
        if size == 0:
            continue
        part, _, rest = name.partition(".")
        layer, _, kind = rest.rpartition(".")
        if kind != "weight" or change.dim() not in (2, 4) or ".embeddings." in name:
            other += size
            continue
        u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        b, a = u[:, :kept] * root, root[:, None] * v[:kept]
        a = torch.cat([a, a.new_zeros(rank - kept, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - kept)], dim=1)
        if change.dim() == 4:
            a, b = a.reshape(rank, *change.shape[1:]), b[..., None, None]
        adapters.setdefault(part, {})[layer] = LayerFactors(a.contiguous(), b.contiguous(), 1.0)
        covered += size
        lost += float(s[kept:].double().square().sum())
    if not covered:
        raise UserError(
            "there is no LoRA to extract", "the weights are those of the base", "export it as it is"
        )
    return Extraction(adapters, (lost / covered) ** 0.5, (other / (covered + other)) ** 0.5)
