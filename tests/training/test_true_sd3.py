"""SD3 medium has the published sizes in its true configuration, and two of its 24 layers take steps and draw."""

import io
import json
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
from training.defaults import with_defaults
from training.lease import Lease
from training.loop import ResidentBase, train_run
from training.lora import read_lora
from training.pipeline import BaseInfo, empty_text_encoder, empty_unet, load_tokenizer, open_base, unsaid_ids

# stabilityai/stable-diffusion-3-medium-diffusers
TRANSFORMER: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModelWithProjection"],
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
WIDE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
}
# million parameters
SIZES = {"transformer": 2028.3, "text_encoder": 123.7, "text_encoder_2": 694.7, "text_encoder_3": 4762.3}


def write_base(tokenizers: Path, folder: Path, t5: bool, **transformer: Any) -> BaseInfo:
    """The base's JSON, and the VAE, random; the weights of the other parts are files without any."""
    parts = {
        "transformer": TRANSFORMER | transformer,
        "text_encoder": CLIP,
        "text_encoder_2": CLIP | WIDE | {"hidden_act": "gelu", "projection_dim": 1280},
        **({"text_encoder_3": T5} if t5 else {}),
    }
    [kind] = [kind for kind in KINDS if kind.family == "sd3"]
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        (folder / part / f"{kind.parts[part][1]}.safetensors").touch()
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"):
        shutil.copytree(tokenizers / part, folder / part)
    for part in ("tokenizer", "tokenizer_2"):
        path = folder / part / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    index: dict[str, Any] = {"_class_name": kind.pipeline}
    index["text_encoder_3"] = ["transformers", "T5EncoderModel"] if t5 else [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
    return open_base(str(folder))


def filled(model: nn.Module, numbers: torch.Tensor) -> nn.Module:
    """The model of the meta device with parameters that are views of `numbers`, but for its norms."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            is_norm = isinstance(module, nn.LayerNorm) and name == "weight"
            value = torch.ones(p.shape) if is_norm else numbers[: p.numel()].view(p.shape)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.dtype == torch.int64:
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
            elif buffer is not None:
                module.register_buffer(name, numbers[: buffer.numel()].view(buffer.shape))
    return model.eval()


def test_its_parts_have_the_published_numbers_of_parameters(tiny_sd3: Path, tmp_path: Path) -> None:
    info = write_base(tiny_sd3, tmp_path / "sd3", t5=True)
    parts = {"transformer": empty_unet(info)} | dict(empty_text_encoder(info).named_children())
    counts = {part: round(sum(p.numel() for p in m.parameters()) / 1e6, 1) for part, m in parts.items()}
    assert counts == SIZES
    assert (info.image_size, info.longest_side, info.prompt_ids) == (1024, 3072, 77 + 77 + 256)


@pytest.mark.slow
def test_two_of_its_layers_take_two_lora_steps_and_draw(
    tiny_sd3: Path,
    tmp_path: Path,
    group: None,
    make_lease: Callable[..., Lease],
    monkeypatch: pytest.MonkeyPatch,
    storage: Storage,
) -> None:
    info = write_base(tiny_sd3, tmp_path / "sd3", t5=False, num_layers=2, sample_size=8)
    numbers = torch.randn(70_000_000, generator=torch.Generator().manual_seed(0)) * 0.02
    base = ResidentBase(info, filled(empty_unet(info), numbers), filled(empty_text_encoder(info), numbers))
    sections = with_defaults(
        {
            "base": {"model": str(info.path)},
            "train": {"steps": 2, "lr": 1e-3, "lora": {"rank": 4}},
            "prior": {"weight": 0.0},  # half the time
            "validate": {"every": 1, "samples": 1, "num_images": 1, "steps": 2, "unguided": False},
        }
    )
    del sections["base"]
    mean = np.random.default_rng(0).standard_normal((1, 16, 8, 8), dtype=np.float32)
    table = [{"mean": mean, "std": np.full_like(mean, 0.1)}]
    lease = make_lease(base, **sections)
    unsaid = unsaid_ids(info, load_tokenizer(info))[0].tolist()
    samples = [unsaid, list(lease.subject_ids)]
    lease = replace(lease, subject_latents=table, sample_ids=samples)
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
        layers = read_lora(artifact.folder)["transformer"]
    # eight layers a block, of which the last has no output for the text, and no use for the text's queries
    assert len(layers) == 2 * 8 - 1
    assert sum(bool(factors.b.any()) for factors in layers.values()) == len(layers) - 1
