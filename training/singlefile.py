"""This file is where a pipeline's parameters get the names of the original Stable Diffusion and SDXL checkpoints.

Those single files are what ComfyUI, AUTOMATIC1111 and kohya's scripts load.

Source:
    The module lists of CompVis/stable-diffusion's `openaimodel.py` and `model.py`; UNet blocks are counted through
    there, one index for each residual block or change of size. Stability-AI/generative-models for SDXL, and open_clip's
    `transformer.py` for its second text encoder.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from cluster.errors import UserError

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}
_VAE_PARTS = {"conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1"}
_OPEN_CLIP_ENDS = {
    "text_projection.weight": "text_projection",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
VELOCITY, ZERO_SNR = "v_pred", "ztsnr"  # what marks are called
_FUSED = ("q_proj", "k_proj", "v_proj")  # one after the other in open_clip's `in_proj`
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file(
    parameters: Mapping[str, torch.Tensor],
    vae: Mapping[str, torch.Tensor],
    unet_config: Mapping[str, Any],
    scheduler: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """The tensors of one checkpoint.

    Args:
        parameters: Those of UNet and text encoders by `unet.NAME`, `text_encoder.NAME` and, of an SDXL,
            `text_encoder_2.NAME`.
        vae: Those of the VAE.
        unet_config: The UNet's config.
        scheduler: The config that is drawn with. Of an SDXL that predicts velocity the file says so, as ComfyUI and
            AUTOMATIC1111 look for it: by empty tensors. There is no such mark of a Stable Diffusion 1.x.

    Raises:
        UserError: The base has parts that such files have no names for.
    """
    levels = 1 + max(int(n.split(".")[2]) for n in vae if n.startswith("decoder.up_blocks."))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in parameters.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    out = {f"model.diffusion_model.{_of_unet(n, unet_config)}": v for n, v in parts["unet"].items()}
    second = parts.get("text_encoder_2")
    first = "conditioner.embedders.0" if second else "cond_stage_model"
    for name, value in parts["text_encoder"].items():
        out[f"{first}.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    for name, value in _of_open_clip(second).items() if second else ():
        out[f"conditioner.embedders.1.model.{name}"] = value
    for name, value in vae.items():
        key = _of_vae(name, levels)
        # attention there is by 1 x 1 convolutions
        shaped = value[..., None, None] if ".attn_1." in key and value.dim() == 2 else value
        out[f"first_stage_model.{key}"] = shaped
    if second and scheduler.get("prediction_type") == "v_prediction":
        out[VELOCITY] = torch.empty(0)
        if scheduler.get("rescale_betas_zero_snr"):
            out[ZERO_SNR] = torch.empty(0)
    return {key: value.detach().float().cpu().contiguous() for key, value in out.items()}


def original_layers(layers: Iterable[str], unet_config: Mapping[str, Any]) -> dict[str, str]:
    """What layers of diffusers' UNet are called in the original.

    Args:
        layers: Names of modules that have weights.
        unet_config: The UNet's config.

    Raises:
        UserError: A layer has no name there.
    """
    return {n: _of_unet(f"{n}.weight", unet_config).removesuffix(".weight") for n in layers}


def _of_unet(name: str, config: Mapping[str, Any]) -> str:
    """A parameter of diffusers' UNet as it is called in the original."""
    per_level = int(config["layers_per_block"])
    end = next((end for end in _UNET_ENDS if name.startswith(f"{end}.")), None)
    if end:
        return _UNET_ENDS[end] + name.removeprefix(end)
    if found := re.fullmatch(r"mid_block\.resnets\.(\d)\.(\w+)\.(\w+)", name):
        return f"middle_block.{2 * int(found[1])}.{_RESNET[found[2]]}.{found[3]}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        side, level, kind, number, inner = found[1], int(found[2]), found[3], int(found[4]), found[5]
        down = side == "down"
        place = (1 if down else 0) + level * (per_level + 1) + number
        blocks = "input_blocks" if down else "output_blocks"
        if kind == "attentions":
            return f"{blocks}.{place}.1.{inner}"
        piece, _, leaf = inner.rpartition(".")
        return f"{blocks}.{place}.0.{_RESNET[piece]}.{leaf}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)", name):
        return f"input_blocks.{(int(found[1]) + 1) * (per_level + 1)}.0.op.{found[2]}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)", name):
        level = int(found[1])
        after = 2 if "CrossAttn" in config["up_block_types"][level] else 1
        return f"output_blocks.{level * (per_level + 1) + per_level}.{after}.conv.{found[2]}"
    raise _nameless(f"unet.{name}")


def _of_open_clip(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of transformers' `CLIPTextModelWithProjection` as open_clip has them."""
    out: dict[str, torch.Tensor] = {}
    fused: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in parameters.items():
        if name in _OPEN_CLIP_ENDS:
            out[_OPEN_CLIP_ENDS[name]] = value.T if name == "text_projection.weight" else value
            continue
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        block, inner, leaf = found.groups() if found else ("", "", "")
        if inner in _OPEN_CLIP:
            out[f"transformer.resblocks.{block}.{_OPEN_CLIP[inner]}.{leaf}"] = value
        elif inner.removeprefix("self_attn.") in _FUSED:
            key = f"transformer.resblocks.{block}.attn.in_proj_{leaf}"
            fused.setdefault(key, {})[inner.removeprefix("self_attn.")] = value
        else:
            raise _nameless(f"text_encoder_2.{name}")
    return out | {key: torch.cat([each[of] for of in _FUSED]) for key, each in fused.items()}


def _of_vae(name: str, levels: int) -> str:
    """A parameter of diffusers' VAE as it is called in the original."""
    if re.match(r"(post_)?quant_conv\.", name):
        return name
    side, _, rest = name.partition(".")
    for ours, theirs in _VAE_PARTS.items():
        if rest.startswith(f"{ours}."):
            inner = rest.removeprefix(f"{ours}.")
            if ours.startswith("mid"):
                piece, _, leaf = inner.rpartition(".")
                inner = f"{_VAE_ATTENTION[piece]}.{leaf}"
            return f"{side}.{theirs}.{inner}"
    if re.fullmatch(r"conv_(in|out)\.\w+", rest):
        return name
    if found := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", rest):
        return f"{side}.mid.block_{int(found[1]) + 1}.{_shortcut(found[2])}"
    if found := re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", rest
    ):
        level = int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])
        where = f"{side}.{found[1]}.{level}"
        if found[3] == "resnets":
            return f"{where}.block.{found[4]}.{_shortcut(found[5])}"
        return f"{where}.{found[3].removesuffix('rs')}.{found[5]}"
    raise _nameless(f"vae.{name}")


def _shortcut(inner: str) -> str:
    return inner.replace("conv_shortcut", "nin_shortcut")


def _nameless(name: str) -> UserError:
    return UserError(
        "the base cannot be written as a single file",
        f"{name} has no name there",
        "export it with --format diffusers",
    )
