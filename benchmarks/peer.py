"""This file is where the peer's script is run unchanged: `python -m benchmarks.peer SCRIPT ARGUMENTS...`.

It only stands in for the few torchvision transforms that the script uses, because torchvision is not installed here:
same operations by Pillow and torch.
"""

import random
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image


class Compose:
    """Steps one after the other."""

    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


class Resize:
    """Resizes so that the shorter side has `size` pixels."""

    def __init__(self, size: int, interpolation: Image.Resampling = Image.Resampling.BILINEAR) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = self.size / min(image.size)
        if scale == 1:
            return image
        return image.resize((round(image.width * scale), round(image.height * scale)), self.interpolation)


class CenterCrop:
    """Cuts the middle square."""

    def __init__(self, size: int) -> None:
        self.size = size

    def corner(self, image: Image.Image) -> tuple[int, int]:
        return (image.width - self.size) // 2, (image.height - self.size) // 2

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = self.corner(image)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomCrop(CenterCrop):
    """Cuts a square anywhere."""

    def corner(self, image: Image.Image) -> tuple[int, int]:
        return random.randint(0, image.width - self.size), random.randint(0, image.height - self.size)


class ToTensor:
    """A picture as float32 [3, H, W] in [0, 1]."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Normalize:
    """(x - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean[0], std[0]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.std


def stand_in() -> None:
    """Put a module `torchvision` with these transforms where the script imports it from."""
    transforms = ModuleType("torchvision.transforms")
    for step in (Compose, Resize, CenterCrop, RandomCrop, ToTensor, Normalize):
        setattr(transforms, step.__name__, step)
    modes = {mode.name: mode for mode in Image.Resampling}
    transforms.InterpolationMode = SimpleNamespace(**modes)  # type: ignore[attr-defined]
    torchvision = ModuleType("torchvision")
    torchvision.transforms = transforms  # type: ignore[attr-defined]
    torchvision.__spec__ = ModuleSpec("torchvision", None)  # libraries ask for it, and find no version
    sys.modules |= {"torchvision": torchvision, "torchvision.transforms": transforms}


if __name__ == "__main__":
    import transformers  # noqa: F401  decides for itself whether torchvision is there, before the stand-in is

    stand_in()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if torch.cuda.is_available():
        print("peak_bytes", torch.cuda.max_memory_allocated())
