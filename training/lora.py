"""This file is where low-rank adapters are: attached, written and read in the format of stock diffusers.

It is the door to PEFT. An adapter adds alpha / rank * B A to a linear layer; A is random, B starts at zero.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cluster.errors import SystemFailure, UserError
from training.basekind import DENOISERS
from training.conditioning import denoiser_part, text_parts, trained_parts
from training.part_settings import Lora

ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"  # what diffusers' load_lora_weights looks for
CHANGED = "changed_weights.safetensors"
_FACTORS = {
    "A": "lora_A",
    "B": "lora_B",
    "M": "lora_magnitude_vector",
}  # as they are called in files and by PEFT
_METADATA = "lora_adapter_metadata"  # the key under which diffusers keeps rank, alpha and targets


def attach(unet: nn.Module, text_encoder: nn.Module, lora: Lora, train_text: bool, seed: int) -> None:
    """Put fresh adapters into the models, in place; nothing else of them requires a gradient afterwards.

    Args:
        unet: Of the base, without adapters.
        text_encoder: Of the base; gets adapters when `train_text`, in each of its models.
        lora: Rank, alpha and targets.
        train_text: Whether the text encoder is trained too.
        seed: Of A; each module's values depend on the seed and the module's name alone.

    Raises:
        UserError: A target names no module, or one that takes no adapter.
    """
    unet.requires_grad_(False)
    text_encoder.requires_grad_(False)
    _attach(unet, denoiser_part(unet), lora.targets, "train.lora.targets", lora, seed)
    if train_text:
        for part, model in text_parts(text_encoder).items():
            _attach(model, part, lora.text_targets, "train.lora.text_targets", lora, seed)


def save_lora(unet: nn.Module, text_encoder: nn.Module | None, folder: Path, lora: Lora) -> None:
    """Write the adapters of both models as one file that stock `load_lora_weights(folder)` reads.

    Args:
        unet: With adapters of `attach`.
        text_encoder: With or without adapters.
        folder: Where to; made if it is not there.
        lora: The rank and alpha they were attached with.
    """
    adapters = {
        prefix: {
            name: {
                factor: modules[ADAPTER].weight
                for factor, module in _FACTORS.items()
                if ADAPTER in (modules := getattr(layer, module))
            }
            for name, layer in _layers(model)
        }
        for prefix, model in _parts(unet, text_encoder).items()
    }
    write_adapters(adapters, folder, lora)


def save_changed(unet: nn.Module, text_encoder: nn.Module | None, folder: Path) -> None:
    """Write the weights of the adapted layers as their adapters make them, for kinds that no other format has."""
    tensors = {}
    for part, model in _parts(unet, text_encoder).items():
        for name, layer in _layers(model):
            whole = copy.deepcopy(layer)  # the frozen weights are the base's
            whole.merge()
            tensors[f"{part}.{name}.weight"] = (
                whole.get_base_layer().weight.detach().float().cpu().contiguous()
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / CHANGED, metadata={"format": "pt"})


def write_adapters(
    adapters: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]], folder: Path, lora: Lora
) -> None:
    """Write adapters as `save_lora`: by part (such as `unet`), layer and factor (`A`, `B`, DoRA's `M`)."""
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for prefix, layers in adapters.items():
        for name, factors in layers.items():
            for factor, weight in factors.items():
                key = f"{prefix}.{name}.{_FACTORS[factor]}" + ("" if factor == "M" else ".weight")
                tensors[key] = weight.detach().float().cpu().contiguous()
        if layers:
            config: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha}
            config |= {"target_modules": sorted(layers)} | ({"use_dora": True} if lora.dora else {})
            metadata |= {f"{prefix}.{key}": value for key, value in config.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # one key: safetensors writes several in any order, and the same adapters should be the same bytes
    header = {_METADATA: json.dumps(metadata, sort_keys=True)}
    save_file(tensors, folder / FILE, metadata=header)


def parameter_name(layer: str, factor: str) -> str:
    """The parameter that is factor `A` or `B` of a layer's adapter."""
    return f"{layer}.lora_{factor}.{ADAPTER}.weight"


def fresh_a(seed: int, layer: str, shape: Sequence[int]) -> torch.Tensor:
    """What A starts as.

    Args:
        seed: Of the run.
        layer: Its name, with that of its part before it.
        shape: [rank, ...].
    """
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    # PEFT's own start: uniform with the bound of kaiming_uniform_(a=sqrt(5))
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return (torch.rand(*shape, generator=generator) * 2 - 1) * bound


@dataclass(frozen=True)
class LayerFactors:
    """The adapter of one layer as it is written."""

    a: torch.Tensor
    """[rank, d_in], of a convolution [rank, C_in, kernel, kernel]."""
    b: torch.Tensor
    """[d_out, rank], of a convolution [C_out, rank, 1, 1]."""
    scale: float
    """What B A is multiplied with: alpha / rank."""
    magnitude: torch.Tensor | None = None
    """Of DoRA: what the length of each row of the weight becomes, [d_out], of a convolution [1, C_out, 1, 1]."""


def read_lora(folder: Path) -> dict[str, dict[str, LayerFactors]]:
    """The adapters that `save_lora` wrote: by part (`unet`, `transformer`, `text_encoder`, `text_encoder_2`) and layer.

    Raises:
        SystemFailure: The file is not one of ours.
    """
    with safe_open(folder / FILE, "pt") as file:
        metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    found: dict[str, dict[str, LayerFactors]] = {}
    parts = (key.removesuffix(".r") for key in metadata if key.endswith(".r"))
    for prefix in sorted(parts, key=lambda part: (part not in DENOISERS.values(), part)):
        scale = metadata[f"{prefix}.lora_alpha"] / metadata[f"{prefix}.r"]
        names = sorted(n for n in tensors if n.startswith(f"{prefix}.") and n.endswith(".lora_A.weight"))
        layers = [name.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight") for name in names]
        try:
            found[prefix] = {
                layer: LayerFactors(
                    a=tensors.pop(f"{prefix}.{layer}.lora_A.weight"),
                    b=tensors.pop(f"{prefix}.{layer}.lora_B.weight"),
                    scale=scale,
                    magnitude=tensors.pop(f"{prefix}.{layer}.{_FACTORS['M']}", None),
                )
                for layer in layers
            }
        except KeyError as error:
            raise SystemFailure(f"{folder / FILE} is no adapter of ours", f"{error} is missing") from error
    if tensors or not found:
        seen = f"nowhere to put {min(tensors)}" if tensors else "it says nothing of rank and alpha"
        raise SystemFailure(f"{folder / FILE} is no adapter of ours", seen)
    return found


def _parts(unet: nn.Module, text_encoder: nn.Module | None) -> dict[str, nn.Module]:
    return {denoiser_part(unet): unet} if text_encoder is None else trained_parts(unet, text_encoder)


def _attach(
    model: nn.Module, prefix: str, targets: tuple[str, ...], setting: str, lora: Lora, seed: int
) -> None:
    modules = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise UserError(
                f"{setting} names {target!r}", f"no module of the {prefix} ends so", "leave it out"
            )
    try:
        _inject(model, lora, list(targets))
    except ValueError as error:
        raise UserError(
            f"{setting} cannot be adapted", str(error).splitlines()[0], "name linear layers"
        ) from error
    for name, layer in _layers(model):
        if lora.kind == "lora":
            drawn = {f"{prefix}.{name}": layer.lora_A[ADAPTER].weight}
        else:  # those that PEFT draws; the others start as zeros
            own = {n: p for n, p in layer.named_parameters() if p.requires_grad}
            drawn = {f"{prefix}.{name}.{n}": p for n, p in own.items() if p.is_meta or bool(p.any())}
        for key, weight in drawn.items():
            if not weight.is_meta:
                weight.data.copy_(fresh_a(seed, key, weight.shape))


def _inject(model: nn.Module, lora: Lora, targets: list[str]) -> None:
    """Adapters named `ADAPTER`, of which only B (zero) has its value yet; torch's own random state is kept."""
    # a bank has layers of its own and pays for none of it
    from peft import LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model

    config: Any
    if lora.kind == "lokr":
        config = LoKrConfig(r=lora.rank, alpha=lora.alpha, target_modules=targets)
    elif lora.kind == "oft":
        config = OFTConfig(oft_block_size=lora.rank, target_modules=targets)
    else:
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, use_dora=lora.dora)
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of a model's adapted layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
