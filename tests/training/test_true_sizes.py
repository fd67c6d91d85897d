"""The true configurations of SD 1.5, SD 2.1 and SDXL take LoRA steps and draw, with random weights.

The frozen weights are views of one buffer of random numbers: nobody writes them, and 13 GB of SDXL in fp32 become 0.3.
Pictures have 64 pixels, which changes no weight's shape; everything else is as in the bases.
"""

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL.PngImagePlugin import PngImageFile
from torch import nn

from cluster.storage import Storage
from training.artifact import open_artifact
from training.basekind import KINDS
from training.conditioning import trained_parts, whole_frame
from training.lease import Lease
from training.loop import ResidentBase, train_run
from training.lora import read_lora
from training.pipeline import empty_text_encoder, empty_unet, load_tokenizer, open_base, unsaid_ids

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
WIDEST = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
XL = {
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
V2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "sd-1.5": {"unet": UNET, "text_encoder": CLIP, "scheduler": SCHEDULER, "vae": {}},
    "sd-2.1": {
        "unet": UNET | V2,
        "text_encoder": CLIP | WIDE | {"hidden_act": "gelu", "projection_dim": 512},
        "scheduler": SCHEDULER | {"prediction_type": "v_prediction"},
        "vae": {},
    },
    "sdxl": {
        "unet": UNET | XL,
        "text_encoder": CLIP,
        "text_encoder_2": CLIP
        | WIDEST
        | {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "projection_dim": 1280},
        "scheduler": SCHEDULER,
        "vae": {"scaling_factor": 0.13025},
    },
}
# million parameters
SIZES = {
    "sd-1.5": {"unet": 859.5, "text_encoder": 123.1},
    "sd-2.1": {"unet": 865.9, "text_encoder": 340.4},
    "sdxl": {"unet": 2567.5, "text_encoder": 123.1, "text_encoder_2": 694.7},
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The VAE that all three have, random."""
    folder = tmp_path_factory.mktemp("vae")
    blocks = (128, 256, 512, 512)
    model = AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    model.save_pretrained(folder)
    return folder


def write_base(name: str, tokenizers: Path, vae: Path, folder: Path) -> Path:
    """The base's JSON and VAE; the weights of the other parts are files without any."""
    [kind] = [kind for kind in KINDS if set(kind.texts) == {p for p in CONFIGS[name] if "text" in p}]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind.pipeline}))
    shutil.copytree(vae, folder / "vae", copy_function=os.link)
    for part in kind.tokenizers:
        shutil.copytree(tokenizers / part, folder / part)
        path = folder / part / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    for part, config in CONFIGS[name].items():
        (folder / part).mkdir(exist_ok=True)
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        before = json.loads(path.read_text()) if path.exists() else {}
        path.unlink(missing_ok=True)  # it may be the file of all
        path.write_text(json.dumps({**before, **config}))
        if part in kind.parts and part != "vae":
            (folder / part / f"{kind.parts[part][1]}.safetensors").touch()
    return folder


def filled(model: nn.Module, numbers: torch.Tensor) -> nn.Module:
    """The model of the meta device with parameters that are views of `numbers`, but for its norms."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            is_norm = isinstance(module, nn.GroupNorm | nn.LayerNorm) and name == "weight"
            value = torch.ones(p.shape) if is_norm else numbers[: p.numel()].view(p.shape)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONFIGS))
def test_two_lora_steps_and_an_image(
    name: str,
    vae: Path,
    tiny_sdxl: Path,
    tmp_path: Path,
    group: None,
    make_lease: Callable[..., Lease],
    monkeypatch: pytest.MonkeyPatch,
    storage: Storage,
) -> None:
    (tmp_path / name).mkdir()
    info = open_base(str(write_base(name, tiny_sdxl, vae, tmp_path / name)))
    numbers = torch.randn(70_000_000, generator=torch.Generator().manual_seed(0)) * 0.02
    unet, text_encoder = filled(empty_unet(info), numbers), filled(empty_text_encoder(info), numbers)
    counts = {
        part: round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
        for part, model in trained_parts(unet, text_encoder).items()
    }
    assert counts == SIZES[name]
    base = ResidentBase(info, unet, text_encoder)
    lease = make_lease(
        base,
        train={"steps": 2, "lr": 1e-3, "lora": {"rank": 4}},
        validate={"every": 1, "samples": 1, "num_images": 1, "steps": 2, "unguided": False},
    )
    generator = np.random.default_rng(0)
    mean = generator.standard_normal((1, 4, 8, 8), dtype=np.float32)
    table = [{"mean": mean, "std": np.full_like(mean, 0.1)}]
    unsaid = unsaid_ids(info, load_tokenizer(info))[0].tolist()
    lease = replace(
        lease,
        subject_latents=table,
        class_latents=table,
        sample_ids=[unsaid, list(lease.subject_ids)],
        sizes=np.asarray([whole_frame(900, 700)], np.float32),
    )
    monkeypatch.setattr("training.lease.fetch", list)
    events: list[tuple[str, Any]] = []
    metrics = train_run(lease, base, 0, 1, lambda *event: events.append(event))
    assert metrics is not None and all(np.isfinite(list(metrics.values())))
    rows = [row for kind, rows in events if kind == "steps" for row in rows]
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    [sample] = [payload["path"] for kind, payload in events if kind == "sample"]
    with PngImageFile(io.BytesIO(storage.read(sample))) as image:
        assert image.size == (64, 64)
    with open_artifact(storage, "rex", "v1") as artifact:
        layers = read_lora(artifact.folder)["unet"]
        assert all(bool(factors.b.any()) for factors in layers.values())
        assert len(layers) == (560 if name == "sdxl" else 128)
