"""This file is where pictures are rendered once to train on; every second one looks as if the base had drawn it.

Shape letters: B batch, N pictures in the album.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocket.autoencoder import to_tensor

LATENT_NOISE = 0.3  # most that is added to a latent of unit spread: a little more than the UNet leaves
SHIFT = 3  # pixels, to every side
PART = 64  # pictures that are worked on together


def load_album(
    render: Callable[[int], Image.Image], vae: AutoencoderKL, path: Path, count: int, threads: int
) -> Tensor:
    """Pictures 0 to `count`, rendered at the first call and kept at `path`.

    Args:
        render: Picture of a number, always the same one.
        vae: What every second picture passes through.
        path: A file that holds another number of pictures is made anew.

    Returns:
        [N, 3, 64, 64] uint8.
    """
    if path.exists() and len(pixels := load_file(path)["pixels"]) == count:
        return pixels

    def part(first: int) -> Tensor:
        torch.set_num_threads(1)  # a setting of the calling thread
        pixels = to_tensor([render(index) for index in range(first, min(first + PART, count))])
        pixels[1::2] = redrawn(vae, pixels[1::2], torch.Generator().manual_seed(first))
        return to_bytes(pixels)

    with ThreadPoolExecutor(threads) as pool:
        pixels = torch.cat(list(pool.map(part, range(0, count, PART))))
    partial = path.with_suffix(".partial")
    save_file({"pixels": pixels.contiguous()}, partial)
    partial.replace(path)
    return pixels


@torch.inference_mode()
def redrawn(vae: AutoencoderKL, pixels: Tensor, noise: torch.Generator) -> Tensor:
    """Pictures as soft as drawn ones: encoded, each disturbed by its own amount of noise, decoded.

    Args:
        pixels: [B, 3, 64, 64] float32 in [-1, 1].
    """
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(pixels).latent_dist.mean.float()
        spread = LATENT_NOISE / vae.config.scaling_factor * torch.rand(len(pixels), 1, 1, 1, generator=noise)
        disturbed = latents + spread * torch.randn(latents.shape, generator=noise)
        decoded: Tensor = vae.decode(disturbed).sample.float()
    return decoded.clamp(-1, 1)


def varied(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures moved, mirrored and blurred, each in its own way: what must not change what they show.

    Args:
        pixels: [B, 3, 64, 64] uint8.

    Returns:
        [B, 3, 64, 64] float32 in [-1, 1], channels last.
    """
    floats = pixels.float() / 127.5 - 1.0
    count, size = len(floats), floats.shape[-1]
    mirrored = torch.rand(count, generator=rng) < 0.5
    floats[mirrored] = floats[mirrored].flip(-1)
    blurred = torch.rand(count, generator=rng) < 0.25
    floats[blurred] = F.avg_pool2d(floats[blurred], 3, stride=1, padding=1, count_include_pad=False)
    padded = F.pad(floats, (SHIFT,) * 4, mode="replicate")
    corners = torch.randint(0, 2 * SHIFT + 1, (count, 2), generator=rng).tolist()
    moved = [
        one[:, top : top + size, left : left + size] for one, (top, left) in zip(padded, corners, strict=True)
    ]
    return torch.stack(moved).contiguous(memory_format=torch.channels_last)


def to_bytes(pixels: Tensor) -> Tensor:
    """uint8 levels of pixels in [-1, 1]."""
    return ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
