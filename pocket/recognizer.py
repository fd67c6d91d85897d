"""This file is where a subject is told from other members of its class, by the pocket's CLIP, without eyes.

Shape letters: B batch, D embedding.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from pocket.album import redrawn
from pocket.autoencoder import to_images, to_tensor
from pocket.clip import embed_images
from pocket.subject import (
    SUBJECT_CLASS,
    SUBJECT_NAME,
    draw_invented,
    draw_subject,
    invent,
    subject_photos,
    write_photos,
)
from pocket.world import PLACES, SIZE, compose

STRANGERS = 32  # invented members of the class
FIRST_STRANGER = 500  # their seeds are not those of subjects


@dataclass(frozen=True)
class Sitter:
    """A subject whose identity is known exactly, because it was drawn here."""

    name: str
    noun: str
    drawing: Image.Image
    """RGBA on a transparent square."""
    photos: Path
    """The folder of its photos."""


@dataclass(frozen=True)
class Recognizer:
    """A direction in the space of pictures, and how far along it the subject begins."""

    direction: Tensor
    """[D] float32, from other members of the class to the subject."""
    threshold: float
    own_recognised: float
    """Share of true pictures of the subject, not seen in the fitting, that are recognised: what drawings can reach."""
    others_mistaken: float
    """Share of pictures of other members of the class, not seen in the fitting, that are taken for the subject."""

    def sees(self, vectors: Tensor) -> Tensor:
        """[B] bool: whether the subject is in pictures of embeddings [B, D]."""
        return vectors @ self.direction > self.threshold


def find_sitter(name: str, folder: Path) -> Sitter:
    """Pippin, or an invented subject such as `robot:3`; its photos are written to a folder of its own in `folder`.

    Raises:
        KeyError: no shape of that class is drawn here.
    """
    if name == SUBJECT_NAME:
        write_photos(folder / name)
        return Sitter(name, SUBJECT_CLASS, draw_subject(), folder / name)
    noun, _, seed = name.partition(":")
    drawing = draw_invented(invent(noun, int(seed or 0)))
    own = folder / f"{noun}{seed or 0}"
    own.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(subject_photos(noun, int(seed or 0))):
        photo.save(own / f"{number}.png")
    return Sitter(own.name, noun, drawing, own)


def fit_recognizer(
    sitter: Sitter, class_drawings: Sequence[Image.Image], clip: CLIPModel, vae: AutoencoderKL
) -> Recognizer:
    """Fits to one half of pictures of the subject and of others, and counts mistakes on the other half.

    Args:
        class_drawings: what the pristine base draws of the class; strangers drawn by our own code join them.
        vae: makes true pictures as soft as drawn ones, so that nobody is recognised by sharpness.
    """
    rng = random.Random(f"pocket recognizer {sitter.name}")
    strangers = [draw_invented(invent(sitter.noun, FIRST_STRANGER + number)) for number in range(STRANGERS)]
    noise = torch.Generator().manual_seed(0)

    def embedded(drawings: Sequence[Image.Image], places: Sequence[str]) -> Tensor:
        pictures = [compose(drawing, place, rng, SIZE) for drawing in drawings for place in places]
        return embed_images(clip, to_images(redrawn(vae, to_tensor(pictures), noise)))

    own = embedded([sitter.drawing] * 4, PLACES)
    others = torch.cat([embedded(strangers, rng.sample(PLACES, 3)), embed_images(clip, class_drawings)])
    direction = own[::2].mean(dim=0) - others[::2].mean(dim=0)
    threshold = parting(own[::2] @ direction, others[::2] @ direction)
    return Recognizer(
        direction,
        threshold,
        own_recognised=(own[1::2] @ direction > threshold).float().mean().item(),
        others_mistaken=(others[1::2] @ direction > threshold).float().mean().item(),
    )


def parting(above: Tensor, below: Tensor) -> float:
    """The score that parts two sets of scores with the fewest mistakes, each set weighing the same.

    In a gap that parts them without a mistake it is the middle of the gap.
    """
    scores = torch.cat([above, below]).sort().values
    cuts = (scores[1:] + scores[:-1]) / 2
    mistakes = torch.stack([(above <= cut).float().mean() + (below > cut).float().mean() for cut in cuts])
    return cuts[mistakes.argmin()].item()
