"""This file is where pictures and words become vectors: CLIP, and DINO for what CLIP does not see. It is their door.

N pictures or texts, D embedding, S side of the embedder's input in pixels.
"""

import io
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cluster.errors import UserError
from cluster.storage import sha256_file
from training.basefolder import locate_model
from training.defaults import base_family
from training.imports import auto_class, loading, text_class, tokenizer_class
from training.pipeline import shipped
from training.png import Pixels
from training.scores import Vectors
from training.stop_settings import Stop

BATCH = 32  # pictures of a forward: bounds memory; the speed is the same from 16 on
POCKET = "pocket"
# of the paper: DINO ViT-S/16 and CLIP ViT-B/32
_PAPER = ("facebook/dino-vits16", "openai/clip-vit-base-patch32")
DEFAULTS = {
    "sd": _PAPER,
    "sdxl": _PAPER,
    "sd3": _PAPER,
    "pocket": (POCKET, POCKET),
}
_KINDS = ("clip", "vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class Embedder:
    """A CLIP, or a vision transformer such as DINO, on one device.

    Args:
        model: `pocket`, a folder as transformers writes it, or a hub id.
        device: Where it computes.

    Raises:
        UserError: There is no such model, it is of another kind, or its weights are not safetensors.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        self.model = model
        self._device = device
        self._folder, self._kind = find_embedder(model)
        self._look = _Look.read(self._folder)
        self._net, self._tokenizer = _load(self._folder, self._kind)
        self._net.to(device)
        self.limit = int(self._net.config.text_config.max_position_embeddings) if self.reads else 0

    @property
    def reads(self) -> bool:
        """Whether it embeds words too."""
        return self._kind == "clip"

    @property
    def name(self) -> str:
        """What scores depend on: the model and a hash of its weights, for people and for comparisons."""
        return f"{self.model} ({_weights_hash(self._folder)})"

    @torch.inference_mode()
    def images(self, pictures: Sequence[Pixels]) -> Vectors:
        """[N, D] float32 of unit length, of pictures [H, W, 3] uint8 of any size: their middle square is seen."""
        parts: list[NDArray[np.float32]] = []
        for batch in _batches(pictures):
            pixels = torch.from_numpy(np.stack([self._look.at(picture) for picture in batch]))
            parts.append(self._seen(pixels.to(self._device)).float().cpu().numpy())
        return _unit(parts)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Vectors:
        """[N, D] float32 of unit length; what is longer than the model reads is cut."""
        parts: list[NDArray[np.float32]] = []
        for batch in _batches(texts):
            ids = self._tokenizer(
                list(batch), padding="max_length", truncation=True, max_length=self.limit, return_tensors="pt"
            ).input_ids.to(self._device)
            parts.append(_pooled(self._net.get_text_features(input_ids=ids)).float().cpu().numpy())
        return _unit(parts)

    def _seen(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._kind == "clip":
            return _pooled(self._net.get_image_features(pixel_values=pixels))
        return cast(torch.Tensor, self._net(pixel_values=pixels).last_hidden_state[:, 0])  # the class token


class _Look:
    """How a model wants its pictures, as its `preprocessor_config.json` says."""

    def __init__(self, shortest: int, side: int, resample: int, mean: Sequence[float], std: Sequence[float]):
        self._shortest, self._side, self._resample = shortest, side, Image.Resampling(resample)
        self._mean, self._std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    @classmethod
    def read(cls, folder: Path) -> "_Look":
        try:
            said: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
            size, crop = said["size"], said.get("crop_size")
            shortest = int(size if isinstance(size, int) else size.get("shortest_edge", size.get("height")))
            if crop and said.get("do_center_crop", True):
                crop = int(crop if isinstance(crop, int) else crop["height"])
            # without a crop a picture is squeezed into a square; ours are squares by then
            return cls(
                shortest, crop or shortest, said.get("resample", 3), said["image_mean"], said["image_std"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the embedder in {folder} does not say how it wants its pictures",
                f"preprocessor_config.json: {error}",
                "name a folder as transformers writes it",
            ) from error

    def at(self, picture: Pixels) -> NDArray[np.float32]:
        """A picture as the model takes it: [3, S, S] float32."""
        image = Image.fromarray(picture)
        scale = self._shortest / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), self._resample)
        left, top = (image.width - self._side) // 2, (image.height - self._side) // 2
        image = image.crop((left, top, left + self._side, top + self._side))
        unit = np.asarray(image, np.float32) / 255
        looked: NDArray[np.float32] = ((unit - self._mean) / self._std).transpose(2, 0, 1).astype(np.float32)
        return looked


def decoded(pngs: Sequence[bytes]) -> list[Pixels]:
    """The pixels [H, W, 3] uint8 of PNGs."""
    return [np.asarray(Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")) for png in pngs]


def find_embedder(model: str) -> tuple[Path, str]:
    """The folder and the kind of an embedder, without loading it; raises as `Embedder`."""
    folder = shipped("clip") if model == POCKET else locate_model(model, "embedder")
    return folder, _kind(folder, model)


def embedders_of(model: str, stop: Stop) -> tuple[str, str]:
    """The embedders of likeness and of words that looks at a run of a base are scored by."""
    dino, clip = DEFAULTS[base_family(model)]
    return stop.dino or dino, stop.clip or clip


@lru_cache(maxsize=4)
def open_embedder(model: str, device: str = "cpu") -> Embedder:
    """An embedder that this process keeps; raises as `Embedder`."""
    return Embedder(model, device)


def _kind(folder: Path, model: str) -> str:
    try:
        kind = str(json.loads((folder / "config.json").read_text("utf-8"))["model_type"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{model} is no embedder",
            f"{folder / 'config.json'}: {error}",
            "name a folder as transformers writes it",
        ) from error
    if kind not in _KINDS:
        raise UserError(
            f"{model} is no embedder that is known", f"it is a {kind}", f"use {', '.join(_KINDS)}"
        )
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(
            f"the embedder {model} has no safetensors weights",
            f"{folder} holds {', '.join(sorted(p.name for p in folder.iterdir()))}; pickles are never read",
            f"convert it so that it holds {_WEIGHTS[0]}, or name another model",
        )
    return kind


def _load(folder: Path, kind: str) -> tuple[Any, Any]:
    settings = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
    if kind == "clip":
        model, tokenizer = text_class("CLIPModel"), tokenizer_class()
        with loading():
            read = tokenizer.from_pretrained(folder, local_files_only=True)
            return model.from_pretrained(folder, **settings).eval(), read
    model = auto_class()
    with loading():
        return model.from_pretrained(folder, trust_remote_code=False, **settings).eval(), None


def _pooled(output: Any) -> torch.Tensor:
    return cast(torch.Tensor, getattr(output, "pooler_output", output))


def _unit(parts: Sequence[NDArray[np.float32]]) -> Vectors:
    found = np.concatenate(parts)
    unit: Vectors = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


@lru_cache(maxsize=8)
def _weights_hash(folder: Path) -> str:
    return sha256_file(next(folder / name for name in _WEIGHTS if (folder / name).is_file()))[:8]
