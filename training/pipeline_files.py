"""This file is where a trained pipeline is written as stock diffusers loads it, and its weights are read again."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from training.basefolder import read_json, used_files
from training.basekind import CLIP, BaseKind, kind_of
from training.conditioning import text_parts, trained_parts
from training.new_tokens import embedding_names, learned, read_tokens, whole_state
from training.pipeline import BaseInfo, end_id, load_tokenizer, part_settings, tokenizers

_TEXT_PREFIX = (
    "text_model."  # before a `CLIPTextModel`'s names: transformers before 5 need it, later ones drop it
)


def read_weights(folder: Path, models: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """What `save_pipeline` wrote of the trained models: their parameters by `PART.NAME`.

    New tokens are left out of embeddings, whose rows are then those of the base.
    The libraries' own loaders patch torch for all threads while they load; this may run beside a model at work.

    Args:
        folder: Of the pipeline.
        models: By part, for the names of their buffers, such as the places that a transformer knows: no parameters.
    """
    found: dict[str, torch.Tensor] = {}
    kind = kind_of(read_json(folder / "model_index.json", str(folder)), str(folder))
    prefixes = {part: _prefix(named) for part, named in kind.encoders}
    for part in kind.trainable:
        for name, value in load_file(folder / _weights_file(kind, part)).items():
            found[f"{part}.{name.removeprefix(prefixes.get(part, ''))}"] = value
    if tokens := read_tokens(folder):
        for name in embedding_names(found).values():
            found[name] = found[name][: -tokens.count]
    fixed = {f"{part}.{name}" for part, model in models.items() for name, _ in model.named_buffers()}
    return {name: value for name, value in found.items() if name not in fixed}


def save_pipeline(base: BaseInfo, unet: nn.Module, text_encoder: nn.Module, folder: Path) -> None:
    """Write a complete pipeline that stock diffusers loads.

    Args:
        base: Gives everything that is not trained.
        unet: Trained, with whole fp32 parameters.
        text_encoder: Trained or as it was; new tokens that it knows are its tokenizers' too.
        folder: Where to; made if it is not there.
    """
    # The libraries' `save_pretrained` imports DeepSpeed to ask whether the model is an engine.
    kind = base.kind
    prefixes = {part: _prefix(named) for part, named in kind.encoders}
    weights = {
        _weights_file(kind, part): {
            f"{prefixes.get(part, '')}{name}": value for name, value in whole_state(model).items()
        }
        for part, model in trained_parts(unet, text_encoder).items()
    }
    frozen = (part for part in kind.texts if part not in kind.trainable)
    whole_folders = ("vae", *kind.tokenizers, *frozen)
    for file in used_files(base.path, kind):
        name = file.relative_to(base.path)
        if (file.suffix == ".json" and ".index." not in file.name) or name.parts[0] in whole_folders:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    tokens = learned(text_encoder)
    tokenizer = load_tokenizer(base) if tokens else None
    for part in text_parts(text_encoder):
        config = _fp32(part_settings(base, part))
        if tokens:
            config["vocab_size"] += tokens.count
            config["eos_token_id"] = end_id(tokenizer)  # or stock transformers pools elsewhere
        (folder / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokens:
        _add_to_tokenizers(base, tokenizer, tokens.names, folder)
    for path, tensors in weights.items():
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(whole, folder / path, metadata={"format": "pt"})
    index = read_json(base.path / "model_index.json", base.model)
    index |= kind.index
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _add_to_tokenizers(base: BaseInfo, tokenizer: Any, names: Sequence[str], folder: Path) -> None:
    """Have tokenizers, and copies of their files, know further tokens: in either form in which they are read."""
    for part, each in zip(base.kind.tokenizers, tokenizers(tokenizer), strict=True):
        added = {name: len(each) + number for number, name in enumerate(names)}
        each.add_tokens(list(names))
        (folder / part / "tokenizer.json").write_text(each.backend_tokenizer.to_str(pretty=True) + "\n")
        (folder / part / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n")


def write_scheduler(folder: Path, scheduler: Mapping[str, Any]) -> None:
    """Give a written pipeline another scheduler config; the class is one that knows all of its keys."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = {**read_json(path, str(folder)), **scheduler, "_class_name": "DDIMScheduler"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    index = read_json(folder / "model_index.json", str(folder))
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def module_name(base: BaseInfo, part: str, weight: str) -> str:
    """The module that a weight in the files of a part of a base belongs to."""
    prefix = _prefix(dict(base.kind.encoders).get(part, ""))
    return weight.removesuffix(".weight").removeprefix(prefix)


def _weights_file(kind: BaseKind, part: str) -> str:
    return f"{part}/{kind.parts[part][1]}.safetensors"


def _prefix(text_class: str) -> str:
    """What is written before the names of a text encoder's parameters."""
    return _TEXT_PREFIX if text_class == CLIP else ""


def _fp32(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a transformers model, which is loaded in the type it names, of fp32 weights."""
    return {**{key: value for key, value in config.items() if key != "torch_dtype"}, "dtype": "float32"}
