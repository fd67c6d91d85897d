"""This file is where LoRAs of other programs come in: each becomes a version, served as if trained here."""

import json
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage, sha256, sha256_file
from orchestrator.prepare import destination
from orchestrator.spec import parse_run
from training.artifact import Identity, artifact_meta, artifact_path
from training.exchange import from_exchange
from training.identifier import choose_identifier
from training.lora import FILE, write_adapters
from training.pipeline import load_tokenizer, open_base, part_settings
from training.pipeline_files import module_name
from training.prompt import TEMPLATE
from training.shapes import weight_shapes
from training.singlefile import original_layers


def import_lora(
    storage: Storage,
    file: Path,
    name: str,
    class_noun: str,
    identifier: str,
    base: str,
    revision: str | None = None,
) -> dict[str, Any]:
    """Register a LoRA file as a version of a subject.

    Args:
        storage: Root that takes it.
        file: Safetensors of kohya's or diffusers' names, or a folder that holds diffusers' file.
        name: The subject.
        class_noun: Its class.
        identifier: The word that it was trained with.
        base: What it was trained from.
        revision: Of the base.

    Returns:
        `subject, version, artifact, rank, layers`, and whether it was there `already`.

    Raises:
        UserError: It is no LoRA of the base, or a name cannot be used.
    """
    path = file / FILE if file.is_dir() else file
    tensors, metadata = _read(path)
    info = open_base(base, revision)
    shapes = {
        part: {module_name(info, part, key): s for key, s in weight_shapes(info, part).items()}
        for part in info.kind.trainable
    }
    originals: Mapping[str, str] = {}
    if (
        info.kind.family == "sdxl"
    ):  # kohya's scripts name the layers of its UNet as the original checkpoint does
        matrices = (layer for layer, shape in shapes["unet"].items() if len(shape) > 1)
        originals = original_layers(matrices, part_settings(info, "unet"))
    adapters = from_exchange(tensors, metadata, shapes, str(path), originals)
    rank = max(f.a.shape[0] for layers in adapters.values() for f in layers.values())
    run = parse_run(
        {
            "base": {"model": base, "revision": revision},
            "subject": {"name": name, "class": class_noun, "images": [str(path)], "identifier": identifier},
            "train": {
                "method": "lora",
                "lora": {
                    "rank": rank,
                    "alpha": float(rank),
                    "targets": sorted(adapters.get(info.kind.denoiser, {})),
                },
                "text_encoder": {"train": any(part in adapters for part in info.kind.texts)},
            },
        }
    )
    choice = choose_identifier(load_tokenizer(info), identifier, class_noun)
    digest = sha256_file(path)
    decides = [digest, info.revision, class_noun, choice.identifier]
    fingerprint = sha256(json.dumps(decides).encode())[:16]
    goal = destination(storage, name, fingerprint, new_version=False)
    artifact = artifact_path(name, goal.version)
    layers = sum(map(len, adapters.values()))
    told = {
        "subject": name,
        "version": goal.version,
        "artifact": storage.full(artifact),
        "rank": rank,
        "layers": layers,
    }
    if goal.state == "succeeded":
        return {**told, "already": True}
    identity = Identity(choice.identifier, class_noun, TEMPLATE, tuple(choice.token_ids))
    meta = artifact_meta(info, run, identity, fingerprint, None, {})
    with tempfile.TemporaryDirectory(prefix="raybooth-") as folder:
        named = {
            part: {layer: {"A": f.a, "B": f.b} for layer, f in found.items()}
            for part, found in adapters.items()
        }
        write_adapters(named, Path(folder), run.train.lora)
        storage.publish(Path(folder), artifact, {**meta, "steps": 0, "imported": {"sha256": digest}})
    entry = {
        "artifact": artifact,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": fingerprint,
        "method": "lora",
        "base": info.model,
        "class": class_noun,
        "identifier": choice.identifier,
        "metrics": {},
        "prior_key": None,
        "mlflow": {"uri": None, "run_id": None, "version": None},
    }
    Registry(storage).add(name, goal.version, entry)
    return {**told, "already": False}


def _read(path: Path) -> tuple[Mapping[str, torch.Tensor], Mapping[str, str]]:
    if not path.is_file():
        raise UserError(
            f"{path} is not there", "", "give a LoRA in safetensors, or a folder that holds one of diffusers'"
        )
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise UserError(
            f"{path} is no safetensors file", str(error), "pickles are not read; save it as safetensors"
        ) from error
