"""This file is where it is named what one image is wanted to be. It imports nothing heavy."""

from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import UserError
from training.recipe import SamplerName

# Rows of a forward pass, part of what the bits of an image depend on. An image takes two with guidance.
FORWARD_ROWS = {"cpu": 8, "cuda": 16}
MOST_SIDE = 4  # times the base's own: beyond, memory grows with the fourth power and pictures fall apart


@dataclass(frozen=True)
class DrawRequest:
    """One image."""

    prompt: str
    seed: int
    negative_prompt: str = ""
    steps: int = 25
    guidance: float = 7.5
    """1 is without guidance, and costs half."""
    sampler: SamplerName | None = None
    """`None` is the base's own."""
    eta: float = 0.0
    height: int | None = None
    """Pixels; `None` is the base's own."""
    width: int | None = None

    @property
    def rows(self) -> int:
        """Rows of a forward pass that it takes: two with guidance, one without."""
        return 1 if self.guidance == 1.0 else 2

    def check_size(self, own: int, factor: int, longest: int | None = None) -> None:
        """Refuse a size that a base cannot draw.

        Args:
            own: Pixels along a side of the images it was made for.
            factor: Pixels per latent along a side.
            longest: Pixels along a side that the base can see; `None` is any number.

        Raises:
            UserError: A side is no multiple of what the UNet halves, or is too large.
        """
        most = MOST_SIDE * own if longest is None else min(MOST_SIDE * own, longest)
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and (side % (4 * factor) or not 4 * factor <= side <= most):
                raise UserError(
                    f"the {name} {side} cannot be drawn",
                    f"the base draws {own} x {own}",
                    f"take a multiple of {4 * factor}, at most {most}",
                )

    def parameters(self, subject: str, base_revision: str, artifact: str = "") -> dict[str, Any]:
        """What the PNG of `subject` says of how it was drawn; `artifact` is the hash of its weights."""
        asked = {key: value for key, value in asdict(self).items() if value is not None}
        by = {"artifact": artifact} if artifact else {}
        return {**asked, "subject": subject, "base_revision": base_revision, **by}
