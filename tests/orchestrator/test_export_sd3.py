"""What is exported of an SD3 draws the same picture in stock diffusers, and comes back as the same version."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import nn

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage
from orchestrator.export import Format, export
from orchestrator.importing import import_lora
from training.artifact import Identity, artifact_meta, artifact_path, open_artifact, write_weights
from training.conditioning import trained_parts
from training.defaults import with_defaults
from training.draw import Drawer
from training.lora import attach
from training.pipeline import BaseInfo, load_text_encoder, load_unet, open_base
from training.recipe import Run
from training.request import DrawRequest

PROMPT = "a photo of a zwx dog"


@pytest.fixture(scope="module")
def booth(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A LoRA of the transformer and both CLIPs, as if trained, registered as rex."""
    storage, info = Storage(str(tmp_path_factory.mktemp("booth"))), open_base(str(tiny_sd3))
    sections: dict[str, Any] = {
        "base": {"model": str(tiny_sd3)},
        "subject": {"name": "rex", "class": "dog", "images": ["x"]},
        "train": {"method": "lora", "lora": {"rank": 4, "alpha": 2.0}, "text_encoder": {"train": True}},
    }
    run = Run.model_validate(with_defaults(sections))
    unet, text_encoder = load_unet(info), load_text_encoder(info)
    attach(unet, text_encoder, run.train.lora, train_text=True, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for p in (p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad):
            nn.init.normal_(p, std=0.3)
    register(storage, info, run, "rex", unet, text_encoder, tmp_path_factory.mktemp("rex"))
    return storage


def register(
    storage: Storage, info: BaseInfo, run: Run, name: str, unet: nn.Module, text: nn.Module, folder: Path
) -> None:
    write_weights(info, run, unet, text, folder)
    identity = Identity("zwx", "dog", "a {identifier} {class}", (1,))
    storage.publish(folder, artifact_path(name, "v1"), artifact_meta(info, run, identity, name, None, {}))
    entry = {"artifact": artifact_path(name, "v1"), "fingerprint": name, "method": run.train.method}
    Registry(storage).add(name, "v1", entry)


def ours(storage: Storage, name: str) -> np.ndarray:
    with open_artifact(storage, name, "v1") as artifact:
        base = open_base(artifact.manifest["base"]["model"])
        drawer = Drawer(base, artifact.folder, artifact.manifest, "cpu")
        return drawer.draw([DrawRequest(PROMPT, 7, steps=4, guidance=5.0)])[0].astype(int)


def theirs(folder: Path, lora: Path | None = None) -> np.ndarray:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    if lora:
        pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
    image = pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(7), **call).images[0]
    return (image * 255).round().astype(int)


@pytest.mark.parametrize("merged", [True, False])
def test_stock_diffusers_draws_what_was_exported(
    booth: Storage, tiny_sd3: Path, tmp_path: Path, merged: bool
) -> None:
    done = export(booth, "rex", None, "diffusers", tmp_path / "out", merged=merged)
    path = Path(done.path)
    apart = np.abs(ours(booth, "rex") - (theirs(path) if merged else theirs(tiny_sd3, path)))
    assert done.holds == ("pipeline" if merged else "lora")
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.05
    assert np.abs(theirs(tiny_sd3) - ours(booth, "rex")).mean() > 3  # it is at work


def test_a_lora_is_extracted_from_whole_weights(booth: Storage, tiny_sd3: Path, tmp_path: Path) -> None:
    info = open_base(str(tiny_sd3))
    sections: dict[str, Any] = {
        "base": {"model": str(tiny_sd3)},
        "subject": {"name": "ada", "class": "dog", "images": ["x"]},
        "train": {"method": "full", "text_encoder": {"train": True}},
    }
    unet, text_encoder = load_unet(info), load_text_encoder(info)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for model in trained_parts(unet, text_encoder).values():
            for name, p in model.named_parameters():
                if name.endswith(("to_q.weight", "q_proj.weight")):
                    p.data += 0.3 * torch.randn(len(p), 1) @ torch.randn(1, p.shape[1])
    run = Run.model_validate(with_defaults(sections))
    register(booth, info, run, "ada", unet, text_encoder, tmp_path / "ada")
    done = export(booth, "ada", None, "diffusers", tmp_path / "out", rank=1)
    assert (done.holds, done.rank, done.uncovered) == ("lora", 1, 0.0)
    assert done.error is not None and done.error < 1e-3  # the change is of rank 1
    apart = np.abs(ours(booth, "ada") - theirs(tiny_sd3, Path(done.path)))
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.05
    assert np.abs(theirs(tiny_sd3) - ours(booth, "ada")).mean() > 3


def test_a_lora_comes_back_as_a_version_that_draws_the_same(
    booth: Storage, tiny_sd3: Path, tmp_path: Path
) -> None:
    done = export(booth, "rex", None, "diffusers", tmp_path / "out")
    told = import_lora(booth, Path(done.path), "tom", "dog", "zwx", str(tiny_sd3))
    assert (done.holds, told["rank"]) == ("lora", 4)
    assert np.abs(ours(booth, "rex") - ours(booth, "tom")).max() <= 1


@pytest.mark.parametrize("wanted", ["kohya", "comfy", "single-file"])
def test_what_other_programs_name_otherwise_is_refused(
    booth: Storage, tmp_path: Path, wanted: Format
) -> None:
    with pytest.raises(UserError, match="family sd3") as caught:
        export(booth, "rex", None, wanted, tmp_path / "out")
    assert "--format diffusers" in caught.value.do and not (tmp_path / "out").exists()
