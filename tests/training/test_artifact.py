"""An artifact is what training wrote, checked, and nothing of it is a pickle."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from cluster.errors import SystemFailure
from cluster.storage import Storage
from training.artifact import FORMAT, KIND, Identity, artifact_path, open_artifact, write_weights
from training.lora import attach
from training.pipeline import load_text_encoder, load_unet, load_vae, open_base
from training.recipe import Run

IDENTITY = Identity("zwx", "dog", "a {identifier} {class}", (135,))
META = {"kind": KIND, "format": FORMAT, "identity": IDENTITY.as_json()}


def publish(storage: Storage, folder: Path, meta: dict[str, object]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "weights.safetensors").write_bytes(b"weights")
    storage.publish(folder, artifact_path("rex", "v1"), meta)


def test_what_was_published_is_opened(storage: Storage, tmp_path: Path) -> None:
    publish(storage, tmp_path / "weights", META)
    with open_artifact(storage, "rex", "v1") as artifact:
        assert (artifact.folder / "weights.safetensors").read_bytes() == b"weights"
        assert artifact.identity == IDENTITY


def test_a_damaged_or_foreign_artifact_is_refused(storage: Storage, tmp_path: Path) -> None:
    publish(storage, tmp_path / "weights", {**META, "format": 2})
    with pytest.raises(SystemFailure, match="format 2"), open_artifact(storage, "rex", "v1"):
        pass
    publish(storage, tmp_path / "weights", META)
    storage.write("artifacts/rex/v1/weights.safetensors", b"weighty")
    with pytest.raises(SystemFailure, match="damaged"), open_artifact(storage, "rex", "v1"):
        pass


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_are_safetensors_and_the_frozen_vae_is_the_bases(
    tiny_base: Path, tmp_path: Path, method: str
) -> None:
    base = open_base(str(tiny_base))
    unet, text_encoder = load_unet(base), load_text_encoder(base)
    train = {"method": method, "text_encoder": {"train": True}}
    subject = {"name": "rex", "class": "dog", "images": ["photos"]}
    run = Run.model_validate({"subject": subject, "train": train})
    if method == "lora":
        attach(unet, text_encoder, run.train.lora, train_text=True, seed=0)
    nn.init.zeros_(next(unet.parameters()))
    write_weights(base, run, unet, text_encoder, tmp_path / "artifact")
    files = [p for p in (tmp_path / "artifact").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt"}
    if method == "full":
        ours, theirs = load_vae(open_base(str(tmp_path / "artifact"))), load_vae(base)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    else:
        with safe_open(files[0], "pt") as file:
            assert {key.split(".")[0] for key in file.keys()} == {"unet", "text_encoder"}  # noqa: SIM118
