"""This file is where the libraries of models are imported: late, and without what costs seconds and is not used.

A driver needs no model, and a process that draws or trains spends more on importing them than on a small base's work.
"""

import gc
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any, cast
from unittest.mock import patch

from training.basekind import T5

making = RLock()
"""Held by who makes modules where other threads may load models; see `loading`."""
_forgone: set[str] = set()
# Of transformers' models those that we load, and those that diffusers and peft name. It reads the source of all 500,
# twice, when it is imported, to find what is in them: 0.6 CPU s. Another can still be imported by its path.
_MODELS = {"auto", "clip", "t5", "dinov2_with_registers", "siglip", "vit_mae", "bloom"}
_FOLDER = ("transformers", "models")
_COMPILER = "torch._dynamo"
# Whose package a module is of: transformers and diffusers both read all that is installed for it, 0.3 CPU s each.
_distributions = cache(importlib.metadata.packages_distributions)
# Which diffusers imports where it is installed: it tells of kernels that it has not, for layers that we have not.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def forgo(only_vae: bool = False) -> None:
    """Have this process import models without the packages that serve parts of their libraries which nobody calls.

    For processes that are ours alone, before they import models: nobody else could use those parts either.

    Args:
        only_vae: Of models it will load a VAE and no other.
    """
    # scipy is for schedulers that are not ours and for losses of detectors, peft for loaders that are not ours (our
    # adapters import it themselves), boto3 for a cloud's training jobs: 1 CPU s together. A VAE reads no text: 1 more.
    _forgone.update({"scipy", "peft", "boto3"}, {"transformers"} if only_vae else ())


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """What is imported within finds these packages not installed, unless they were imported before.

    Other threads do not find them either while this lasts. No garbage is looked for meanwhile: what is imported stays,
    and going through all of it again and again takes 1 CPU s.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden, cast(Any, None)))
    collected = gc.isenabled()
    gc.disable()
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(importlib.metadata, "packages_distributions", _distributions))
            stack.enter_context(_no_compiler())
            if _forgone:
                stack.enter_context(patch.object(os, "scandir", _scan_of(os.scandir)))
            yield
    finally:
        if collected:
            gc.enable()
        for name in hidden:
            sys.modules.pop(name, None)


def _scan_of(scandir: Callable[..., Any]) -> Callable[..., Any]:
    """`os.scandir` that finds `_MODELS` and no others among those of transformers."""

    @contextmanager
    def few(path: Any) -> Iterator[Any]:
        with scandir(path) as entries:
            yield (entry for entry in entries if entry.name in _MODELS)

    def scan(path: Any = ".") -> Any:  # other threads scan too, and what `os.scandir` takes may be a number
        models = isinstance(path, str | Path) and Path(path).parts[-2:] == _FOLDER
        return few(path) if models else scandir(path)

    return scan


class _NoCompiler(ModuleType):
    """In place of torch's compiler, while modules are imported that mark functions for it: marks nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda function=None, *options, **named: function or (lambda marked: marked)


@contextmanager
def _no_compiler() -> Iterator[None]:
    """Nothing is compiled while models are imported and made, and torch's compiler takes 0.5 to 0.8 CPU s to import.

    Who needs it later imports it.
    """
    torch: Any = sys.modules.get("torch")
    if not _forgone or torch is None or _COMPILER in sys.modules:
        yield
        return
    standing: Any = _NoCompiler(_COMPILER)
    standing.__path__ = [
        str(Path(path) / "_dynamo") for path in torch.__path__
    ]  # its parts are imported as ever
    sys.modules[_COMPILER] = torch._dynamo = standing
    try:
        yield
    finally:
        del sys.modules[_COMPILER], torch._dynamo


def vae_class() -> Any:
    """diffusers' `AutoencoderKL`."""
    with without(*_forgone):
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    return AutoencoderKL


def denoiser_class(part: str) -> Any:
    """diffusers' `UNet2DConditionModel`, or its `SD3Transformer2DModel` for a `transformer`."""
    with without(*_forgone):
        if part == "transformer":
            from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

            return SD3Transformer2DModel
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    return UNet2DConditionModel


def text_class(named: str) -> Any:
    """A class of transformers' CLIP, or its T5's."""
    with without(*_forgone):
        if named == T5:
            from transformers.models.t5.modeling_t5 import T5EncoderModel

            return T5EncoderModel
        from transformers.models.clip import modeling_clip
    return getattr(modeling_clip, named)


def auto_class() -> Any:
    """transformers' `AutoModel`."""
    with without(*_forgone):
        from transformers.models.auto.modeling_auto import AutoModel
    return AutoModel


def tokenizer_class(t5: bool = False) -> Any:
    """transformers' `CLIPTokenizer`, or its `T5Tokenizer`."""
    with without(*_forgone):
        if t5:
            from transformers.models.t5.tokenization_t5 import T5Tokenizer

            return T5Tokenizer
        from transformers.models.clip.tokenization_clip import CLIPTokenizer
    return CLIPTokenizer


@contextmanager
def loading() -> Iterator[None]:
    """One thread at a time makes models: diffusers has `nn.Module` make empty ones, in all threads, while it loads one.

    The bars of the libraries that are imported are not shown: a part is read in a moment, and the bars are ours.
    """
    with making, _quiet(), _no_compiler():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    logs = (sys.modules.get(f"{library}.utils.logging") for library in ("diffusers", "transformers"))
    shown: list[Any] = [log for log in logs if log and cast(Any, log).is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
