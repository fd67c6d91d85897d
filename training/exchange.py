"""This file is where LoRAs take the form in which other programs write and read them: kohya's names, diffusers' names.

Parts are `unet` (of SD3 `transformer`), `text_encoder` and `text_encoder_2`, layers the names of their modules; the
names of a file are found among those of the base, so that nothing is guessed. d_in and d_out are the width of a layer,
r a rank.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cluster.errors import UserError
from training.lora import LayerFactors

Adapters = Mapping[str, Mapping[str, LayerFactors]]
"""By part and layer."""
_TEXT = "text_model."  # which a text encoder's layers have before them in files
_FACTOR = re.compile(
    r"\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|alpha)(?:\.default)?(?:\.weight)?$"
)
_OTHER_KINDS = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a LoCon with Tucker factors",
}


def _prefixes(texts: Sequence[str], denoiser: str = "unet") -> dict[str, str]:
    """What kohya's names begin with, by part: text encoders have a number where there are several."""
    numbers = range(1, len(texts) + 1) if len(texts) > 1 else ("",)
    return {denoiser: f"lora_{denoiser}_"} | {
        part: f"lora_te{number}_" for part, number in zip(texts, numbers, strict=True)
    }


def to_kohya(
    adapters: Adapters, texts: Sequence[str] = ("text_encoder",), originals: Mapping[str, str] = {}
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of the file that kohya's scripts, ComfyUI and AUTOMATIC1111 read.

    Args:
        adapters: The LoRA.
        texts: The base's text encoders, in order.
        originals: What the UNet's layers are called there, where that is not as diffusers calls them: kohya's scripts
            train an SDXL under the names of the original checkpoint, any other base under diffusers'.
    """
    prefixes = _prefixes(texts)
    tensors: dict[str, torch.Tensor] = {}
    ranks: set[int] = set()
    for part, layers in adapters.items():
        for layer, factors in layers.items():
            rank = factors.a.shape[0]
            ranks.add(rank)
            key = (
                prefixes[part]
                + (_TEXT if part == "text_encoder" else "").replace(".", "_")
                + (originals.get(layer, layer) if part == "unet" else layer).replace(".", "_")
            )
            tensors[f"{key}.lora_down.weight"] = factors.a.float().contiguous()
            tensors[f"{key}.lora_up.weight"] = factors.b.float().contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(float(factors.scale * rank))
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(
            max(f.scale * f.a.shape[0] for layers in adapters.values() for f in layers.values())
        ),
    }
    return tensors, metadata


@dataclass
class _Found:
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    alpha: float | None = None


def from_exchange(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    file: str,
    originals: Mapping[str, str] = {},
) -> dict[str, dict[str, LayerFactors]]:
    """The LoRA that a file of kohya's or diffusers' names holds, every layer of it of one rank and scale 1.

    Args:
        tensors: Of the file.
        metadata: Of the file; diffusers keeps alphas there.
        shapes: By part and layer of the base, the denoiser first, the shape of the weight.
        file: Its name, for people.
        originals: What the UNet's layers may be called besides, by their names in the base.

    Raises:
        UserError: It is no LoRA, or it does not fit the base.
    """
    denoiser, *texts = shapes
    prefixes = _prefixes(texts, denoiser)
    names = {part: _names(part, prefixes[part], layers) for part, layers in shapes.items()}
    if originals:
        names["unet"] |= {
            prefixes["unet"] + name.replace(".", "_"): layer for layer, name in originals.items()
        }
    alphas = _alphas(metadata, shapes)
    found: dict[tuple[str, str], _Found] = {}
    for key, tensor in tensors.items():
        part, layer, factor = _place(key, names, file)
        entry = found.setdefault((part, layer), _Found())
        if factor == "alpha":
            entry.alpha = float(tensor)
        elif factor in ("lora_A", "lora_down", "lora.down"):
            entry.a = tensor.float()
        else:
            entry.b = tensor.float()
    if not found:
        raise UserError(f"{file} holds no LoRA", "it has no tensors", "give a LoRA in safetensors")
    widest = 0
    for (part, layer), entry in found.items():
        if entry.a is None or entry.b is None:
            raise UserError(f"{file} is damaged", f"{part}.{layer} lacks a factor", "export it again")
        widest = max(widest, entry.a.shape[0])
    adapters: dict[str, dict[str, LayerFactors]] = {}
    for (part, layer), entry in sorted(found.items()):
        assert entry.a is not None and entry.b is not None  # looked at above
        rank, shape = entry.a.shape[0], shapes[part][layer]
        alpha = entry.alpha if entry.alpha is not None else alphas.get(part, float(rank))
        a, b = _as_layer(entry.a, entry.b, shape, f"{part}.{layer}", file)
        adapters.setdefault(part, {})[layer] = LayerFactors(
            _padded(a, 0, widest), _padded(b * (alpha / rank), 1, widest), 1.0
        )
    return adapters


def _names(part: str, kohyas: str, layers: Iterable[str]) -> dict[str, str]:
    """Layers by every name that a file may have for them."""
    prefixes = ("", _TEXT) if part == "text_encoder" else ("",)
    out = {}
    for layer in layers:
        for prefix in prefixes:
            out[kohyas + (prefix + layer).replace(".", "_")] = layer
            out[f"{part}.{prefix}{layer}"] = layer
    return out


def _place(key: str, names: Mapping[str, Mapping[str, str]], file: str) -> tuple[str, str, str]:
    """Part, layer and factor of a tensor."""
    for sign, kind in _OTHER_KINDS.items():
        if sign in key:
            raise UserError(
                f"{file} is {kind}",
                f"it has {key}",
                "import a plain LoRA, or merge this one with the program that made it",
            )
    # diffusers' older names put adapters into attention processors
    current = re.sub(r"\.processor\.(to_(?:q|k|v|out))_lora\.", r".\1.lora.", key)
    factor = _FACTOR.search(current)
    name = current[: factor.start()] if factor else current
    for part, known in names.items():
        for candidate in (name, f"{name}.0"):  # to_out is to_out.0 there
            if factor and candidate in known:
                return part, known[candidate], factor[1]
    raise UserError(
        f"{file} does not fit the base",
        f"there is nowhere to put {key}",
        "name the base that it was trained from with --base",
    )


def _alphas(metadata: Mapping[str, str], parts: Iterable[str]) -> dict[str, float]:
    """Alpha of each part, where diffusers keeps it."""
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return {part: float(config[f"{part}.lora_alpha"]) for part in parts if f"{part}.lora_alpha" in config}


def _as_layer(
    a: torch.Tensor, b: torch.Tensor, shape: tuple[int, ...], layer: str, file: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors in the shape of their layer: some programs write those of linear layers as 1 x 1 convolutions."""
    if len(shape) == 2 and len(a.shape) == 4 and a.shape[2:] == b.shape[2:] == (1, 1):
        a, b = a.flatten(1), b.flatten(1)
    if len(shape) == 4 and len(a.shape) == len(b.shape) == 2 and shape[2:] == (1, 1):
        a, b = a[..., None, None], b[..., None, None]
    fits = len(a.shape) == len(shape) and a.shape[1:] == shape[1:] and b.shape[:2] == (shape[0], a.shape[0])
    if not fits:
        raise UserError(
            f"{file} does not fit the base",
            f"{layer} is {tuple(shape)} there, and the file has factors {tuple(a.shape)} and {tuple(b.shape)}",
            "name the base that it was trained from with --base",
        )
    return a, b


def _padded(factor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """A factor with zeros up to a rank, so that one file has one."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor.contiguous()
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)
