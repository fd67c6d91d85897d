"""This file is where a run's models are built without weights: to check what it asks for, and to count."""

import functools
from collections.abc import Sequence
from typing import Any

from safetensors import safe_open
from torch import nn

from cluster.errors import UserError
from training.basefolder import used_files
from training.conditioning import leave_unread
from training.lora import attach
from training.new_tokens import grow, started
from training.part_settings import NewTokens, TextEncoder
from training.pipeline import BaseInfo, empty_text_encoder, empty_unet, part_settings, tokenizers
from training.recipe import Train


def trained_shapes(base: BaseInfo, train: Train) -> tuple[nn.Module, nn.Module]:
    """UNet and text encoder on the meta device, as a run would train them: what it trains requires a gradient.

    Raises:
        UserError: A LoRA target names no module, or one that takes no adapter.
    """
    unet, text_encoder = empty_unet(base), empty_text_encoder(base)
    if train.method == "lora":
        attach(unet, text_encoder, train.lora, train.text_encoder.train, train.seed)
    else:
        text_encoder.requires_grad_(train.text_encoder.train)
    leave_unread(text_encoder)
    if train.new_tokens.count:
        grow(text_encoder, started(text_encoder, "", (0,), train.new_tokens.count), end=0)
    return unet, text_encoder


def count(model: nn.Module, trained: bool = True) -> int:
    """Parameters of a model: those that are trained, or all."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def sizes(base: BaseInfo, train: Train) -> tuple[int, int]:
    """Parameters that a run trains, and all of them; counted once for all runs that train the same.

    Raises:
        UserError: As `trained_shapes`.
    """
    text_encoder = TextEncoder(train=train.text_encoder.train)
    tokens = NewTokens(count=train.new_tokens.count)
    wanted = Train(method=train.method, lora=train.lora, text_encoder=text_encoder, new_tokens=tokens)
    return _sizes(base, wanted)


def refuse_untrainable(base: BaseInfo, train: Train) -> None:
    """Refuse a run that names what cannot be trained; imports no models where the weights' names show that it can.

    Raises:
        UserError: As `trained_shapes`.
    """
    if train.method == "full":  # takes all there is
        return
    denoiser, *texts = base.kind.trainable
    wanted = [(denoiser, train.lora.targets)]
    if train.text_encoder.train:
        wanted += [(part, train.lora.text_targets) for part in texts]
    if not all(_are_linear(base, part, targets) for part, targets in wanted):
        sizes(base, train)


def refuse_new_tokens(base: BaseInfo, tokenizer: Any) -> None:
    """Refuse new tokens for a base that cannot have them; `tokenizer` is the base's, of `load_tokenizer`.

    Raises:
        UserError: It is neither a Stable Diffusion 1.x/2.x nor an SDXL, its tokenizers have not the same words, or a
            tokenizer and an embedding do not agree on where new tokens begin.
    """
    if base.kind.family not in ("sd", "sdxl"):
        raise UserError(
            "train.new_tokens is for bases of Stable Diffusion 1.x/2.x and SDXL",
            f"{base.model} is of the family {base.kind.family}",
            "leave it out, or take a Stable Diffusion 1.x/2.x or SDXL base",
        )
    found = tokenizers(tokenizer)
    seen = [
        f"its {name} has {len(one)}, and the embedding of its {part} {rows} rows"
        for name, one, part in zip(base.kind.tokenizers, found, base.kind.texts, strict=True)
        if (rows := int(part_settings(base, part)["vocab_size"])) != len(one)
    ]
    if any(one.get_vocab() != found[0].get_vocab() for one in found):
        seen.append("its tokenizers have different words")
    if seen:
        raise UserError(
            f"{base.model} can have no new tokens",
            "; ".join(seen),
            "leave train.new_tokens out, or take another base",
        )


def _are_linear(base: BaseInfo, part: str, targets: Sequence[str]) -> bool:
    """Whether every target is there and names linear layers alone, for all that the shapes of weights say."""
    layers = {
        f".{name.removesuffix('.weight')}.": len(shape) for name, shape in weight_shapes(base, part).items()
    }
    for target in targets:
        found = [(name, rank) for name, rank in layers.items() if f".{target}." in name]
        if not found or not all(name.endswith(f".{target}.") and rank == 2 for name, rank in found):
            return False
    return True


@functools.lru_cache(maxsize=16)
def weight_shapes(base: BaseInfo, part: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights (of no biases) of a part of a base, from the heads of its files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in used_files(base.path, base.kind):
        if file.parent.name == part and file.suffix == ".safetensors":
            with safe_open(file, "np") as weights:
                names = [name for name in weights.keys() if name.endswith(".weight")]  # noqa: SIM118
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in names}
    return shapes


@functools.lru_cache(maxsize=64)  # of a campaign's thousands of runs most train the same
def _sizes(base: BaseInfo, train: Train) -> tuple[int, int]:
    models = trained_shapes(base, train)
    return sum(count(model) for model in models), sum(count(model, trained=False) for model in models)
