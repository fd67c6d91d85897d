"""This file is where a pretrained base enters: found, checked, pinned and loaded.

Everything that differs between bases (prediction type, VAE scaling factor, sizes, token limit) is read from the base's
JSON and carried in `BaseInfo`.

B batch, L tokens, C latent channels, H W latent size.
"""

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from cluster.errors import UserError
from training.basefolder import locate, part_config, read_json
from training.basekind import T5, BaseKind, check_scheduler, check_widths, is_clip, kind_of
from training.conditioning import SILENT, JointEncoder, TwinEncoder
from training.imports import denoiser_class, loading, text_class, tokenizer_class, vae_class
from training.noise import noise_process
from training.recipe import SamplerName

if TYPE_CHECKING:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

_BOX = "pocket"  # the one base that ships with raybooth
T5_TOKENS = 256  # that diffusers' pipeline of SD3 has its T5 read, padding included
_LOADING: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "torch_dtype": torch.float32}


@dataclass(frozen=True)
class BaseInfo:
    """A pretrained pipeline in diffusers layout, pinned, and what its JSON says of it."""

    kind: BaseKind
    model: str
    """`pocket`, a hub id, or the absolute path of a folder: workers have another working folder."""
    path: Path
    """Absolute local folder in diffusers layout."""
    revision: str
    """Commit of a hub id; for a folder a hash of 16 hex digits over the files that are used."""
    prediction_type: str
    """`epsilon` or `v_prediction`, from the scheduler's config; `flow` of a base of flow matching."""
    scaling_factor: float
    """What VAE latents are multiplied with before the denoiser sees them."""
    latent_channels: int
    """Channels of a latent."""
    vae_factor: int
    """Pixels per latent along a side."""
    image_size: int
    """Pixels along a side of the image that the base was made for."""
    token_limit: int
    """Tokens of a prompt in a CLIP's tokenizer, start and end included."""
    scheduler: Mapping[str, Any] = field(hash=False)
    """The scheduler's config, as the base's pipeline would use it."""
    silent: bool = False
    """Whether an unconditional row without a negative prompt is told zeros, not what the empty prompt becomes."""
    shift_factor: float = 0.0
    """What is taken from VAE latents before they are multiplied."""
    longest_side: int | None = None
    """Pixels along a side that it can see at most; `None` is any number."""

    @property
    def latent_size(self) -> int:
        """Latents along a side."""
        return self.image_size // self.vae_factor

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE latents as the denoiser sees them."""
        return (latents - self.shift_factor) * self.scaling_factor

    @property
    def prompt_ids(self) -> int:
        """Token ids of a prompt: those of all tokenizers."""
        return sum(T5_TOKENS if named == T5 else self.token_limit for _, named in self.kind.encoders)

    @property
    def text_tokens(self) -> int:
        """Places of the text that the denoiser is told."""
        return self.token_limit + (T5_TOKENS if self.kind.flow else 0)

    @property
    def sampler(self) -> SamplerName:
        """What images are drawn with where nothing else is asked for."""
        return "euler" if self.kind.flow else "ddim"


def open_base(model: str, revision: str | None = None) -> BaseInfo:
    """Find a base, check that it can be used, and read what it says of itself; loads no weights.

    Args:
        model: `pocket`, a folder in diffusers layout, or a hub id. What is cached locally is used first, and
            nothing is downloaded when `HF_HUB_OFFLINE` is set.
        revision: The commit of a hub id (`None`: the newest one), or the hash that a folder must have.

    Raises:
        UserError: There is no such base, a part is missing, its weights are not safetensors, or it is not a
            Stable Diffusion 1.x/2.x, SDXL or SD3.
    """
    box = shipped("weights") if model == _BOX else None
    folder, revision = locate(model, revision, box)
    index = read_json(folder / "model_index.json", model)
    kind = kind_of(index, model)
    configs = {part: part_config(folder, part, model, kind) for part in kind.parts}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", model)
    tokenizers = [read_json(folder / name / "tokenizer_config.json", model) for name in kind.tokenizers]
    unet, vae = configs[kind.denoiser], configs["vae"]
    texts = [configs[part] for part in kind.texts]
    check_widths(unet, texts, kind, model)
    check_scheduler(scheduler, kind, model)
    if T5 in dict(kind.encoders).values():
        read_json(
            folder / kind.tokenizers[-1] / "tokenizer.json", model
        )  # without it there would be no words
    prediction_type = noise_process(scheduler).prediction_type
    vae_factor = 2 ** (len(vae["block_out_channels"]) - 1)
    of_clips = [number for number, (_, named) in enumerate(kind.encoders) if named != T5]
    limits = [int(texts[number]["max_position_embeddings"]) for number in of_clips]
    limits += [
        int(tokenizers[n]["model_max_length"]) for n in of_clips if "model_max_length" in tokenizers[n]
    ]
    return BaseInfo(
        kind=kind,
        model=str(folder) if Path(model).expanduser().resolve() == folder else model,
        path=folder,
        revision=revision,
        prediction_type=prediction_type,
        scaling_factor=float(vae.get("scaling_factor", 0.18215)),
        latent_channels=int(vae["latent_channels"]),
        vae_factor=vae_factor,
        image_size=int(unet["sample_size"]) * vae_factor,
        token_limit=min(limits),
        scheduler={**scheduler, **kind.scheduler},
        # diffusers' pipeline of SDXL takes zeros where its index says nothing of it
        silent=kind.sized and bool(index.get("force_zeros_for_empty_prompt", True)),
        shift_factor=float(vae.get("shift_factor") or 0.0),
        # a transformer has an embedding of each place
        longest_side=int(unet["pos_embed_max_size"]) * int(unet["patch_size"]) * vae_factor
        if kind.flow
        else None,
    )


def shipped(part: str) -> Path:
    """A folder of the base in the box: its `weights`, or the `clip` that embeds its pictures."""
    return Path(str(importlib.resources.files(_BOX) / part))


def load_tokenizer(base: BaseInfo) -> "CLIPTokenizer | tuple[CLIPTokenizer, ...]":
    """The base's tokenizer; of a base with several text encoders a tuple of theirs, of which a T5's is no CLIP's."""
    found = tuple(
        tokenizer_class(named == T5).from_pretrained(base.path / name, local_files_only=True)
        for name, (_, named) in zip(base.kind.tokenizers, base.kind.encoders, strict=True)
    )
    return found if len(found) > 1 else found[0]


def tokenizers(tokenizer: Any) -> tuple[Any, ...]:
    """Those of `load_tokenizer`, also where there is one."""
    return tokenizer if isinstance(tokenizer, tuple) else (tokenizer,)


def end_id(tokenizer: Any) -> int:
    """The id that ends a prompt, in the first tokenizer; `tokenizer` is of `load_tokenizer`."""
    return int(tokenizers(tokenizer)[0].eos_token_id)


def token_ids(
    tokenizer: Any, prompts: Sequence[str], limit: int, words: Mapping[str, Sequence[int]] = {}
) -> torch.Tensor:
    """Token ids of prompts, padded to `limit` as the base's pipeline pads.

    Args:
        tokenizer: Of `load_tokenizer`.
        prompts: B prompts.
        limit: L, the base's `token_limit`; a T5 has `T5_TOKENS`.
        words: Those that the tokenizer does not have, in lower case, and the ids that each stands for.

    Returns:
        [B, L] int64; [B, n L] of n tokenizers, one after the other.

    Raises:
        UserError: A prompt has more tokens than `limit`; it would be cut in silence.
    """
    if isinstance(tokenizer, tuple):
        limits = [limit if is_clip(each) else T5_TOKENS for each in tokenizer]
        parts = zip(tokenizer, limits, strict=True)
        return torch.cat([token_ids(each, prompts, most, words) for each, most in parts], dim=1)
    rows = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=False).input_ids
    rows = [_with_words(tokenizer, *row, limit, words) for row in zip(prompts, rows, strict=True)]
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > limit:
            raise UserError(
                f"the prompt {prompt!r} is too long",
                f"it has {len(row)} tokens with its start and end, the base takes {limit}",
                "shorten it",
            )
    return torch.tensor(rows, dtype=torch.int64)


def unsaid_ids(base: BaseInfo, tokenizer: Any) -> torch.Tensor:
    """Token ids [1, ids of a prompt] of what an unconditional row is told where there is no negative prompt."""
    if base.silent:
        return torch.full((1, base.prompt_ids), SILENT)
    return token_ids(tokenizer, [""], base.token_limit)


def _with_words(
    tokenizer: Any, prompt: str, row: list[int], limit: int, words: Mapping[str, Sequence[int]]
) -> list[int]:
    """The ids of a prompt as the tokenizer would give them if it had the words; `row` is without."""
    parts = re.split(f"({'|'.join(map(re.escape, words))})", prompt.lower()) if words else [prompt]
    if len(parts) == 1:
        return row
    inside = [
        i
        for p in parts
        for i in (words[p] if p in words else tokenizer(p, add_special_tokens=False).input_ids)
    ]
    whole = [tokenizer.bos_token_id, *inside, tokenizer.eos_token_id]
    return whole + [tokenizer.pad_token_id] * (limit - len(whole))


def load_unet(base: BaseInfo) -> nn.Module:
    """The base's denoiser, a UNet or a transformer: fp32, on the CPU, in eval mode, frozen."""
    unet = denoiser_class(base.kind.denoiser)
    with loading():
        return _frozen(unet.from_pretrained(base.path / base.kind.denoiser, **_LOADING))


def load_vae(base: BaseInfo) -> nn.Module:
    """The base's VAE: fp32 (SDXL's overflows in fp16, `force_upcast`), on the CPU, in eval mode, frozen."""
    vae = vae_class()
    with loading():
        return _frozen(vae.from_pretrained(base.path / "vae", **_LOADING))


def load_text_encoder(base: BaseInfo) -> nn.Module:
    """The base's text encoder, one module also where it is two models: fp32, on the CPU, in eval mode, frozen."""
    found = [(part, text_class(named)) for part, named in base.kind.encoders]
    with loading():
        models = [model.from_pretrained(base.path / part, **_LOADING) for part, model in found]
    return _frozen(_one_encoder(base, models))


def empty_unet(base: BaseInfo) -> nn.Module:
    """The base's denoiser without weights, on the meta device: its shapes cost no memory."""
    unet = denoiser_class(base.kind.denoiser)
    with torch.device("meta"):
        return cast(nn.Module, unet.from_config(part_settings(base, base.kind.denoiser)))


def empty_text_encoder(base: BaseInfo) -> nn.Module:
    """The base's text encoder without weights, on the meta device."""
    models = []
    for part, named in base.kind.encoders:
        model = text_class(named)
        config = model.config_class.from_pretrained(base.path / part)
        with torch.device("meta"):
            models.append(model(config))
    return _one_encoder(base, models)


def _one_encoder(base: BaseInfo, models: Sequence[nn.Module]) -> nn.Module:
    """A base's text encoders as one module."""
    if len(models) == 1:
        return models[0]
    if not base.kind.flow:
        return TwinEncoder(*models)
    width = int(part_settings(base, base.kind.denoiser)["joint_attention_dim"])
    third = models[2] if len(models) > 2 else None
    return JointEncoder(models[0], models[1], third, base.token_limit, T5_TOKENS, width)


def empty_vae(base: BaseInfo) -> nn.Module:
    """The base's VAE without weights, on the meta device."""
    vae = vae_class()
    with torch.device("meta"):
        return cast(nn.Module, vae.from_config(read_json(base.path / "vae/config.json", base.model)))


def encode_image(vae: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [B, C, H, W] of the latents of images, not scaled.

    Args:
        vae: Of `load_vae`.
        pixels: [B, 3, height, width] float32 in [-1, 1].
    """
    posterior = vae.encode(pixels).latent_dist  # type: ignore[operator]
    return posterior.mean, posterior.std


def decode_latents(vae: nn.Module, latents: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """Images [B, 3, height, width] float32, about [-1, 1], of scaled latents [B, C, H, W]; what was taken from them
    before is the VAE's to say."""
    plain, shift = latents / scaling_factor, cast(Any, vae).config.shift_factor
    plain = plain + shift if shift else plain
    return cast(torch.Tensor, vae.decode(plain, return_dict=False)[0])  # type: ignore[operator]


def part_settings(base: BaseInfo, part: str) -> dict[str, Any]:
    """The config of a part of a base, such as `unet`."""
    return read_json(base.path / part / "config.json", base.model)


def _frozen(model: Any) -> nn.Module:
    return cast(nn.Module, model.eval().requires_grad_(False))
