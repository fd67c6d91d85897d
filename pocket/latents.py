"""This file is where pictures are rendered and encoded once, so that the UNet's training only reads latents."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocket.autoencoder import to_tensor
from pocket.sprites import Sprites
from pocket.world import picture

SEED = 2
CHUNK = 4096  # pictures per file: half a minute of work is what a kill can cost


@dataclass(frozen=True)
class Pool:
    """Encoded pictures, ready to train on."""

    latents: Tensor
    """[N, 16, 8, 8] float16, the posterior means times the autoencoder's scaling factor."""
    captions: list[str]
    """N captions."""


def load_pool(sprites: Sprites, vae: AutoencoderKL, folder: Path, count: int, threads: int) -> Pool:
    """The first `count` pictures of the training world; chunks that are not on disk yet are encoded now."""
    folder.mkdir(parents=True, exist_ok=True)
    latents, captions = [], list[str]()
    for number in range(-(-count // CHUNK)):
        tensors, texts = folder / f"{number:03d}.safetensors", folder / f"{number:03d}.json"
        if not texts.exists():
            _encode_chunk(sprites, vae, number, threads, tensors, texts)
        latents.append(load_file(tensors)["latents"])
        captions.extend(json.loads(texts.read_text()))
    return Pool(torch.cat(latents)[:count], captions[:count])


def _encode_chunk(
    sprites: Sprites, vae: AutoencoderKL, number: int, threads: int, tensors: Path, texts: Path
) -> None:
    """Writes one chunk; the captions go last and say that the chunk is whole."""
    began = time.monotonic()

    def encode(first: int) -> tuple[Tensor, list[str]]:
        torch.set_num_threads(1)
        drawn = [picture(sprites, SEED, index) for index in range(first, first + 32)]
        pixels = to_tensor([image for image, _ in drawn])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(pixels).latent_dist.mean.float()
        return (mean * vae.config.scaling_factor).half(), [shown.caption for _, shown in drawn]

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(encode, range(number * CHUNK, (number + 1) * CHUNK, 32)))
    partial = tensors.with_suffix(".partial")
    save_file({"latents": torch.cat([latents for latents, _ in parts]).contiguous()}, partial)
    partial.replace(tensors)
    partial.write_text(json.dumps([caption for _, captions in parts for caption in captions]))
    partial.replace(texts)
    print(f"latents: chunk {number}, {CHUNK / (time.monotonic() - began):.0f} pictures/s", flush=True)
