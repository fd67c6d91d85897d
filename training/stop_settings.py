"""This file is where it is set when a run ends before its last step: its drawings have ceased to gain."""

from pydantic import Field

from training.section import Section


class Stop(Section):
    """Looks at what a run draws on its way. It ends when they gain no more, and what drew best is published."""

    patience: int = Field(default=2, ge=1, le=100)
    """Looks in a row without a gain, after which the run ends."""
    min_gain: float = Field(default=0.01, ge=0, le=1)
    """How much more a look must score than the best one before it, to be a gain. The score is DINO + CLIP-T - drift."""
    every: int = Field(default=100, ge=1)
    """Steps between looks, each with a checkpoint."""
    prompts: tuple[str, ...] = Field(
        default=(
            "a photo of {subject}",
            "a photo of {subject} on the beach",
            "a photo of {subject} in the snow",
            "a photo of {subject} in the forest",
        ),
        min_length=1,
        max_length=64,
    )
    """What is drawn at a look; the class is drawn besides, without the subject."""
    num_images: int = Field(default=2, ge=1, le=64)
    """Images per prompt, seeds 0, 1, ..."""
    steps: int = Field(default=15, ge=1, le=1000)
    """Denoising steps."""
    dino: str | None = None
    """Model that tells likeness: `pocket`, a folder or a hub id; `null` takes that of the base's family."""
    clip: str | None = None
    """Model that tells whether a prompt was followed; likewise."""
