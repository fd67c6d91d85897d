"""This file is where low-rank adapters are: attached, written and read in the format of stock diffusers.

It is the door to PEFT. An adapter adds alpha / rank * B A to a linear layer; A is random, B starts at zero.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cluster.errors import SystemFailure, UserError
from training.recipe import Lora

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"  # what diffusers' load_lora_weights looks for
_METADATA = "lora_adapter_metadata"  # the key under which diffusers keeps rank, alpha and targets


def attach(unet: nn.Module, text_encoder: nn.Module, lora: Lora, train_text: bool, seed: int) -> None:
    """Put fresh adapters into the models, in place; nothing else of them requires a gradient afterwards.

    Args:
        unet: Of the base, without adapters.
        text_encoder: Of the base; gets adapters when `train_text`.
        lora: Rank, alpha and targets.
        train_text: Whether the text encoder is trained too.
        seed: Of A; each module's values depend on the seed and the module's name alone.

    Raises:
        UserError: A target names no module, or one that takes no adapter.
    """
    unet.requires_grad_(False)
    text_encoder.requires_grad_(False)
    _attach(unet, "unet", lora.targets, "train.lora.targets", lora, seed)
    if train_text:
        _attach(text_encoder, "text_encoder", lora.text_targets, "train.lora.text_targets", lora, seed)


def save_lora(unet: nn.Module, text_encoder: nn.Module | None, folder: Path, lora: Lora) -> None:
    """Write the adapters of both models as one file that stock `load_lora_weights(folder)` reads.

    Args:
        unet: With adapters of `attach`.
        text_encoder: With or without adapters.
        folder: Where to; made if it is not there.
        lora: The rank and alpha they were attached with.
    """
    parts = {"unet": unet} | ({} if text_encoder is None else {"text_encoder": text_encoder})
    adapters = {
        prefix: {
            name: {factor: getattr(layer, f"lora_{factor}")[ADAPTER].weight for factor in "AB"}
            for name, layer in _layers(model)
        }
        for prefix, model in parts.items()
    }
    write_adapters(adapters, folder, lora)


def write_adapters(
    adapters: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]], folder: Path, lora: Lora
) -> None:
    """Write adapters as `save_lora` does: by model (`unet`, `text_encoder`), layer and factor (`A`, `B`)."""
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for prefix, layers in adapters.items():
        for name, factors in layers.items():
            for factor, weight in factors.items():
                key = f"{prefix}.{name}.lora_{factor}.weight"
                tensors[key] = weight.detach().float().cpu().contiguous()
        if layers:
            config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted(layers)}
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
        layer: Its name, with `unet.` or `text_encoder.` before it.
        shape: [rank, ...].
    """
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    # PEFT's own start: uniform with the bound of kaiming_uniform_(a=sqrt(5))
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return (torch.rand(*shape, generator=generator) * 2 - 1) * bound


def load_lora(unet: nn.Module, text_encoder: nn.Module, folder: Path) -> None:
    """Put the adapters that `save_lora` wrote into the pristine models, in place, frozen.

    Raises:
        SystemFailure: The file does not fit the models.
    """
    with safe_open(folder / FILE, "pt") as file:
        metadata = json.loads(file.metadata()[_METADATA])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    for prefix, model in (("unet", unet), ("text_encoder", text_encoder)):
        if f"{prefix}.r" not in metadata:
            continue
        _inject(
            model,
            metadata[f"{prefix}.r"],
            metadata[f"{prefix}.lora_alpha"],
            metadata[f"{prefix}.target_modules"],
        )
        for name, layer in _layers(model):
            for factor in ("lora_A", "lora_B"):
                weight = getattr(layer, factor)[ADAPTER].weight
                found = tensors.pop(f"{prefix}.{name}.{factor}.weight", None)
                if found is None or found.shape != weight.shape:
                    seen = "nothing" if found is None else f"shape {tuple(found.shape)}"
                    raise SystemFailure(
                        f"{folder / FILE} does not fit the base", f"{prefix}.{name}.{factor}: {seen}"
                    )
                weight.data.copy_(found)
        model.requires_grad_(False).eval()
    if tensors:
        raise SystemFailure(f"{folder / FILE} does not fit the base", f"nowhere to put {min(tensors)}")


def detach(model: nn.Module) -> None:
    """Take adapters off again, in place: the layers below them are as they were; without adapters nothing happens."""
    for name, layer in list(_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):  # what PEFT would take for another adapter that stays
        del model.peft_config


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
        _inject(model, lora.rank, lora.alpha, list(targets))
    except ValueError as error:
        raise UserError(
            f"{setting} cannot be adapted", str(error).splitlines()[0], "name linear layers"
        ) from error
    for name, layer in _layers(model):
        weight = layer.lora_A[ADAPTER].weight
        if not weight.is_meta:
            weight.data.copy_(fresh_a(seed, f"{prefix}.{name}", weight.shape))


def _inject(model: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Adapters named `ADAPTER`, of which only B (zero) has its value yet; torch's own random state is kept."""
    from peft import (
        LoraConfig,
        inject_adapter_in_model,
    )  # a bank has layers of its own and pays for none of it

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _layers(model: nn.Module) -> "Iterator[tuple[str, LoraLayer]]":
    """Names and modules of a model's adapted layers."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
