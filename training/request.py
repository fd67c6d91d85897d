"""This file is where it is named what one image is wanted to be. It imports nothing heavy."""

from dataclasses import asdict, dataclass
from typing import Any

from training.recipe import SamplerName


@dataclass(frozen=True)
class DrawRequest:
    """One image."""

    prompt: str
    seed: int
    negative_prompt: str = ""
    steps: int = 25
    guidance: float = 7.5
    """1 is without guidance, and costs half."""
    sampler: SamplerName = "ddim"
    eta: float = 0.0

    def parameters(self, subject: str, base_revision: str) -> dict[str, Any]:
        """What the PNG of `subject` says of how it was drawn."""
        return {**asdict(self), "subject": subject, "base_revision": base_revision}
