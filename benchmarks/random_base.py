"""This file is where bases of true sizes are made of random weights: what they draw is noise, what they cost is true.

The tokenizer is pocket's, as no vocabulary can be had without a download; only how many tokens a prompt has matters.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from training.pipeline import open_base

TOKENS = 77
LARGEST_FILE = "20GB"  # one file per part
_CROSS, _PLAIN = "CrossAttn", ""


@dataclass(frozen=True)
class Kind:
    """A family of bases, by the configs of its parts."""

    pipeline: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: tuple[Mapping[str, Any], ...]
    """Of `text_encoder`, and of `text_encoder_2` where there is one."""


def _unet(channels: tuple[int, ...], blocks: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in blocks),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(blocks)),
        "layers_per_block": 2,
        **more,
    }


def _vae(channels: tuple[int, ...], sample_size: int, scaling_factor: float, **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        **more,
    }


def _text(width: int, layers: int, heads: int, act: str = "quick_gelu", words: int = 49408) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
        "hidden_act": act,
        "vocab_size": words,
    }


_XL = {"addition_embed_type": "text_time", "use_linear_projection": True}
# Source: the configs of stable-diffusion-v1-5 and of stable-diffusion-xl-base-1.0
TRUE = {
    "sd15": Kind(
        "StableDiffusionPipeline",
        _unet(
            (320, 640, 1280, 1280),
            (_CROSS, _CROSS, _CROSS, _PLAIN),
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        _vae((128, 256, 512, 512), 512, 0.18215),
        (_text(768, 12, 12),),
    ),
    "sdxl": Kind(
        "StableDiffusionXLPipeline",
        _unet(
            (320, 640, 1280),
            (_PLAIN, _CROSS, _CROSS),
            sample_size=128,
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            **_XL,
        ),
        _vae((128, 256, 512, 512), 1024, 0.13025, force_upcast=True),
        (_text(768, 12, 12), _text(1280, 32, 20, "gelu")),
    ),
}
TINY = {
    "sd15": Kind(
        "StableDiffusionPipeline",
        _unet(
            (32, 64),
            (_CROSS, _PLAIN),
            sample_size=8,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        _vae((16, 32), 16, 0.18215, norm_num_groups=8),
        (_text(32, 2, 4, words=1000),),
    ),
    "sdxl": Kind(
        "StableDiffusionXLPipeline",
        _unet(
            (32, 64),
            (_PLAIN, _CROSS),
            sample_size=8,
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            norm_num_groups=8,
            **_XL,
        ),
        _vae((16, 32), 16, 0.13025, norm_num_groups=8, force_upcast=True),
        (_text(32, 2, 4, words=1000), _text(32, 2, 4, "gelu", words=1000)),
    ),
}


@dataclass
class _Index:
    """What `model_index.json` says."""

    pipeline: str
    parts: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        told = {"_class_name": self.pipeline, "_diffusers_version": "0.42.1", **self.parts}
        (folder / "model_index.json").write_text(json.dumps(told, indent=2))


def write_base(folder: Path, kind: Kind, device: str = "cpu") -> Path:
    """Write a base of random weights in diffusers layout; `device` makes the weights. Returns the folder."""
    tokenizer = open_base("pocket").path / "tokenizer"
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    index = _Index(kind.pipeline)
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **kind.unet)
        _save(unet, folder / "unet")
        del unet  # one part at a time: together they would be as large again as the largest
        _save(AutoencoderKL(**kind.vae), folder / "vae")
        for number, text in enumerate(kind.texts):
            made = CLIPTextModelWithProjection if number else CLIPTextModel
            marks = {"bos_token_id": 838, "eos_token_id": 839, "pad_token_id": 839}  # pocket's
            suffix = "_2" if number else ""
            limits = {"max_position_embeddings": TOKENS, **marks}
            _save(made(CLIPTextConfig(**text, **limits)), folder / f"text_encoder{suffix}")
            shutil.copytree(tokenizer, folder / f"tokenizer{suffix}")
            told = json.dumps({**config, "model_max_length": TOKENS})
            (folder / f"tokenizer{suffix}" / "tokenizer_config.json").write_text(told)
            index.parts |= {
                f"text_encoder{suffix}": ["transformers", made.__name__],
                f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"],
            }
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    index.parts |= {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if "XL" in kind.pipeline:
        index.parts["force_zeros_for_empty_prompt"] = True
    else:
        index.parts |= {"safety_checker": [None, None], "requires_safety_checker": False}
    index.write(folder)
    return folder


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=LARGEST_FILE)
