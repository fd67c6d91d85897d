"""This file is where the tests of serving get registered subjects of the tiny base, of every kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.registry import Registry
from cluster.storage import Storage
from training.artifact import Identity, artifact_meta, artifact_path, write_weights
from training.lora import attach
from training.pipeline import load_text_encoder, load_unet, open_base
from training.recipe import Run

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": {"rank": 4}},
    "wide": {"method": "lora", "lora": {"rank": 20}},
    "text": {"method": "lora", "lora": {"rank": 4}, "text_encoder": {"train": True}},
    "full": {"method": "full"},
}
Publish = Callable[..., None]
"""Registers a subject: its name, its kind, its version (`v1`)."""


def publish(storage: Storage, base_folder: Path, scratch: Path, name: str, kind: str, version: str) -> None:
    """A version as if trained: its weights are moved far enough that the picture changes."""
    base = open_base(str(base_folder))
    run = Run.model_validate(
        {
            "base": {"model": str(base_folder)},
            "subject": {"name": name, "class": "dog", "images": ["photos"]},
            "train": KINDS[kind],
        }
    )
    unet, text_encoder = load_unet(base), load_text_encoder(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum((name + version).encode()))
        if kind == "full":
            for p in (*unet.parameters(), *text_encoder.parameters()):
                p.data.add_(torch.randn_like(p), alpha=0.02)
        else:
            attach(unet, text_encoder, run.train.lora, run.train.text_encoder.train, seed=0)
            for p in (p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad):
                nn.init.normal_(p, std=0.3)
    write_weights(base, run, unet, text_encoder, scratch)
    identity = Identity("zwx", "dog", "a {identifier} {class}", (97,))
    storage.publish(scratch, artifact_path(name, version), artifact_meta(base, run, identity, "f", None, {}))
    Registry(storage).add(name, version, {"artifact": artifact_path(name, version), "fingerprint": version})


@pytest.fixture
def published(storage: Storage, tiny_base: Path, tmp_path: Path) -> Publish:
    """Registers subjects in `storage`."""

    def register(name: str, kind: str = "lora", version: str = "v1") -> None:
        publish(storage, tiny_base, tmp_path / f"{name}-{version}", name, kind, version)

    return register


@pytest.fixture(scope="module")
def zoo(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage root with a subject of every kind, named as its kind, and `lora2` and `full2`; not to be changed."""
    folder = tmp_path_factory.mktemp("zoo")
    storage = Storage(str(folder / "storage"))
    for kind in KINDS:
        publish(storage, tiny_base, folder / kind, kind, kind, "v1")
    for kind in ("lora", "full"):
        publish(storage, tiny_base, folder / f"{kind}2", f"{kind}2", kind, "v1")
    return storage
