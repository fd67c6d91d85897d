"""This file is where a subject is told from other members of its class, by the pocket's CLIP, without eyes.

Shape letters: B batch, D embedding.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """Two galleries, and the question in which of them a picture has its nearest."""

    own: Tensor
    """[N, D] float32 of unit length: true pictures of the subject."""
    others: Tensor
    """[M, D]: pictures of other members of its class."""
    own_recognised: float = 0.0
    """Share of true pictures of the subject, not in the gallery, that are recognised: what drawings can reach."""
    others_mistaken: float = 0.0
    """Share of pictures of other members of the class, not in the gallery, that are taken for the subject."""

    def sees(self, vectors: Tensor) -> Tensor:
        """[B] bool: whether the picture nearest to each embedding of [B, D] is one of the subject."""
        return (vectors @ self.own.T).amax(dim=1) > (vectors @ self.others.T).amax(dim=1)


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
    """One half of pictures of the subject and of others makes the galleries, the other half counts the mistakes.

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
    recognizer = Recognizer(own[::2], others[::2])
    return replace(
        recognizer,
        own_recognised=recognizer.sees(own[1::2]).float().mean().item(),
        others_mistaken=recognizer.sees(others[1::2]).float().mean().item(),
    )
