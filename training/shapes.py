"""This file is where a run's models are built without weights: to check what it asks for, and to count."""

import functools

from torch import nn

from training.lora import attach
from training.pipeline import BaseInfo, empty_text_encoder, empty_unet
from training.recipe import TextEncoder, Train


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
    return _sizes(base, Train(method=train.method, lora=train.lora, text_encoder=text_encoder))


@functools.lru_cache(maxsize=64)  # of a campaign's thousands of runs most train the same
def _sizes(base: BaseInfo, train: Train) -> tuple[int, int]:
    models = trained_shapes(base, train)
    return sum(count(model) for model in models), sum(count(model, trained=False) for model in models)
