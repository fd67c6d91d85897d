"""This file is where drawings of one subject are scored against its photos, its prompts and its class.

The metrics are those of the DreamBooth paper (Ruiz et al. 2023, section 4.2 and its supplement). DINO, CLIP-I: mean
cosine of a drawing to the photos. CLIP-T: cosine of a drawing to its prompt, the identifier taken out. PRES: DINO of
drawings of the class, the subject not being asked for; high means that the class has become the subject. DIV: how far
two drawings of one prompt are apart; the paper takes LPIPS, here it is the cosine distance of DINO. Copies: drawings as
near to a training photo as a soft and moved copy of it, which DINO and CLIP-I would praise.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.embedders import Embedder
from training.png import Pixels
from training.prompt import CLASS_PROMPT, render_prompt, without_subject
from training.scores import (
    CopyTest,
    Estimate,
    Vectors,
    among_photos,
    copy_test,
    difference,
    diversity,
    estimate,
    nearness,
)

METRICS = ("dino", "clip_i", "clip_t", "pres", "div", "copies")
LAYOUT = 12  # pixels: less and photos of one thing are alike, more and a copy that moved is not
HIGHER_IS_BETTER = {"dino", "clip_i", "clip_t", "div"}


@dataclass(frozen=True)
class Picture:
    """A drawing."""

    prompt: str
    """As it was asked for, such as `a photo of {subject} on the beach`."""
    seed: int
    pixels: Pixels


def parted(
    prompts: Sequence[str], num_images: int, drawn: Iterable[Pixels]
) -> tuple[list[Picture], list[Picture]]:
    """Drawings of the subject and of its class, as they lie in a grid: a row for each prompt, the class's last.

    Args:
        prompts: Of the subject's rows.
        num_images: Of each row; their seeds are 0, 1, ...
        drawn: Row by row.
    """
    asked = [(prompt, seed) for prompt in (*prompts, CLASS_PROMPT) for seed in range(num_images)]
    pictures = [Picture(*one, pixels) for one, pixels in zip(asked, drawn, strict=True)]
    return pictures[:-num_images], pictures[-num_images:]


@dataclass(frozen=True)
class Row:
    """What was found of one drawing of the subject."""

    prompt: str
    seed: int
    dino: float
    clip_i: float
    clip_t: float
    nearest: float
    """How alike its layout and that of the nearest photo are, at most 1."""
    photo: int
    """Number of that photo."""
    copy: bool


@dataclass(frozen=True)
class Scores:
    """What was found of one subject's drawings."""

    metrics: Mapping[str, Estimate]
    """By the names in `METRICS`; a metric that cannot be had (DIV of single drawings, PRES without drawings of the
    class) is left out."""
    base: Mapping[str, Estimate]
    """`dino`, `clip_i` and `clip_t` of what the pristine base draws of the class for the same prompts: the floor."""
    ceiling: Mapping[str, Estimate]
    """`dino` and `clip_i` of photos to each other; empty with a single photo."""
    drift: Estimate | None
    """PRES less that of the base's drawings: 0 where the class is what it was."""
    copy: CopyTest
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "scores": {key: value.as_json() for key, value in self.metrics.items()},
            "drift": self.drift.as_json() if self.drift else None,
            "base": {key: value.as_json() for key, value in self.base.items()},
            "ceiling": {key: value.as_json() for key, value in self.ceiling.items()},
            "copy_test": {**asdict(self.copy), "can_tell": self.copy.can_tell},
            "images": [asdict(row) for row in self.rows],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Scores":
        """The scores of `as_json`."""

        def estimates(key: str) -> dict[str, Estimate]:
            return {name: Estimate(**found) for name, found in value[key].items()}

        test = {key: value["copy_test"][key] for key in ("threshold", "copies", "others")}
        return cls(
            estimates("scores"),
            estimates("base"),
            estimates("ceiling"),
            Estimate(**value["drift"]) if value["drift"] else None,
            CopyTest(**test),
            tuple(Row(**row) for row in value["images"]),
        )


def worth(scores: Scores) -> float:
    """One number for how good drawings are: likeness and obedience, less what the class has lost.

    DINO + CLIP-T - drift: a model that draws photos by heart loses in CLIP-T, one that has turned the class into the
    subject in drift. A drift below 0 is no merit.
    """
    drift = max(scores.drift.value, 0.0) if scores.drift else 0.0
    return scores.metrics["dino"].value + scores.metrics["clip_t"].value - drift


@dataclass(frozen=True)
class _Seen:
    """Pictures as both embedders see them."""

    dino: Vectors
    clip: Vectors


class Critic:
    """Scores drawings of one subject; its photos are embedded once.

    Args:
        photos: [H, W, 3] uint8 each; their middle squares are looked at.
        class_noun: The subject's.
        dino: Embeds pictures for DINO, PRES, DIV and copies.
        clip: Embeds pictures and words for CLIP-I and CLIP-T.
    """

    def __init__(self, photos: Sequence[Pixels], class_noun: str, dino: Embedder, clip: Embedder) -> None:
        self._noun, self._dino, self._clip = class_noun, dino, clip
        self._photos = self._see(photos)
        self._layouts = layouts(photos)
        copies = np.stack([layouts(soft_copies(photo)) for photo in photos])
        self.copy = copy_test(self._layouts, copies)

    def score(
        self,
        drawn: Sequence[Picture],
        of_class: Sequence[Picture] = (),
        of_base: Sequence[Picture] = (),
    ) -> Scores:
        """Score drawings.

        Args:
            drawn: Of the subject.
            of_class: Of the class, by the same weights.
            of_base: The same prompts and seeds as `of_class`, by the pristine base.
        """
        rows = self._rows(drawn)
        prompts = [row.prompt for row in rows]
        metrics = {
            key: estimate([float(getattr(row, key)) for row in rows], prompts)
            for key in ("dino", "clip_i", "clip_t")
        }
        metrics["copies"] = estimate([float(row.copy) for row in rows], prompts)
        apart = diversity(self._dino.images([one.pixels for one in drawn]), prompts)
        if apart:
            metrics["div"] = estimate(list(apart.values()), list(apart))
        base: dict[str, Estimate] = {}
        drift = None
        if of_base:
            found = self._rows(of_base)
            for key in ("dino", "clip_i", "clip_t"):
                base[key] = estimate([getattr(row, key) for row in found], [row.prompt for row in found])
        if of_class:
            like = self._likeness(of_class)
            of = [one.prompt for one in of_class]
            metrics["pres"] = estimate(like, of)
            if of_base:
                drift = difference(like, self._likeness(of_base), of)
        return Scores(metrics, base, self._ceiling(), drift, self.copy, tuple(rows))

    def _see(self, pictures: Sequence[Pixels]) -> _Seen:
        dino = self._dino.images(pictures)
        return _Seen(dino, dino if self._clip is self._dino else self._clip.images(pictures))

    def _likeness(self, pictures: Sequence[Picture]) -> list[float]:
        seen = self._dino.images([one.pixels for one in pictures])
        return [float(value) for value in nearness(seen, self._photos.dino)]

    def _rows(self, drawn: Sequence[Picture]) -> list[Row]:
        seen = self._see([one.pixels for one in drawn])
        said = {one.prompt: self._words(one.prompt) for one in drawn}
        words = dict(zip(said, self._clip.texts(list(said.values())), strict=True))
        nearest, photo = nearest_layout([one.pixels for one in drawn], self._layouts)
        columns = zip(
            drawn,
            nearness(seen.dino, self._photos.dino),
            nearness(seen.clip, self._photos.clip),
            (float(picture @ words[one.prompt]) for one, picture in zip(drawn, seen.clip, strict=True)),
            nearest,
            photo,
            strict=True,
        )
        return [
            Row(
                one.prompt,
                one.seed,
                float(dino),
                float(clip_i),
                clip_t,
                float(near),
                int(which),
                bool(near > self.copy.threshold),
            )
            for one, dino, clip_i, clip_t, near, which in columns
        ]

    def _words(self, prompt: str) -> str:
        """What CLIP reads: the prompt without the identifier."""
        return render_prompt(without_subject(prompt), self._noun, None)

    def _ceiling(self) -> dict[str, Estimate]:
        if len(self._photos.dino) < 2:
            return {}
        numbers = [str(number) for number in range(len(self._photos.dino))]
        return {
            "dino": estimate(among_photos(self._photos.dino), numbers),
            "clip_i": estimate(among_photos(self._photos.clip), numbers),
        }


def layouts(pictures: Sequence[Pixels]) -> Vectors:
    """[N, D] float32 of unit length: the middle squares of pictures at `LAYOUT` x `LAYOUT` pixels, as vectors."""
    vectors = []
    for picture in pictures:
        small = _square(Image.fromarray(picture)).resize((LAYOUT, LAYOUT), Image.Resampling.BOX)
        vectors.append((np.asarray(small, np.float32) / 255 - 0.5).ravel())
    found = np.stack(vectors)
    unit: Vectors = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)
    return unit


def nearest_layout(drawn: Sequence[Pixels], photos: Vectors) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """[N] the cosine of each drawing's layout, as it is or mirrored, to the nearest photo's, and [N] which that is."""
    cosines = np.maximum(*(layouts(seen) @ photos.T for seen in (drawn, [one[:, ::-1] for one in drawn])))
    return cosines.max(axis=1).astype(np.float64), cosines.argmax(axis=1)


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def soft_copies(photo: Pixels) -> list[Pixels]:
    """A photo as a model that knows it by heart might draw it: softer and moved."""
    square = _square(Image.fromarray(photo))
    side = square.width
    shift = max(side // 24, 1)
    soft = square.resize((max(side // 2, 1),) * 2, Image.Resampling.BOX).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    moved = [
        soft.crop((shift, shift, side, side)),
        soft.crop((0, 0, side - shift, side - shift)),
        square.crop((shift, shift, side - shift, side - shift)),
    ]
    return [np.asarray(one.resize((side, side), Image.Resampling.BICUBIC)) for one in (soft, *moved)]
