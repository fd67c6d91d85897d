"""This file is where embeddings become scores: how near drawings are to photos and to prompts, and how sure that is.

Plain numpy, on embeddings of unit length, so that a dot product is a cosine.

N drawings, P photos, J soft copies of each photo, D embedding.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
Vectors = NDArray[np.float32]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval."""

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    n: int
    """Values that it is a mean of."""

    def as_json(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def estimate(values: Sequence[float] | Values, groups: Sequence[str]) -> Estimate:
    """The mean of values and its 95 % interval by the percentile bootstrap over groups.

    Images of one prompt are alike, so prompts are drawn again and not images; intervals over images would be too
    narrow. The photos are taken as given.

    Args:
        values: One for each image.
        groups: What each belongs to, such as its prompt.

    Raises:
        ValueError: There is no value.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise ValueError("no values")
    means = _resampled(*_by_group(found, groups))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(found.mean()), float(low), float(high), len(found))


def difference(one: Sequence[float], other: Sequence[float], groups: Sequence[str]) -> Estimate:
    """How much larger the mean of `one` is than that of `other`, with its 95 % interval.

    The two are paired: value i of both is of the same prompt and seed, and belongs to `groups[i]`.
    """
    return estimate(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64), groups)


def _by_group(values: Values, groups: Sequence[str]) -> tuple[Values, Values]:
    """The sum and the number of values of each group."""
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    sums: Values = np.bincount(numbers, weights=values).astype(np.float64)
    return sums, np.bincount(numbers).astype(np.float64)


def _resampled(sums: Values, counts: Values) -> Values:
    """Means over groups drawn with replacement; always the same draws."""
    picked = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    means: Values = sums[picked].sum(axis=1) / counts[picked].sum(axis=1)
    return means


def nearness(drawn: Vectors, photos: Vectors) -> Values:
    """[N]: the mean cosine of each drawing to all photos, as DINO and CLIP-I count it."""
    means: Values = (drawn.astype(np.float64) @ photos.T.astype(np.float64)).mean(axis=1)
    return means


def among_photos(photos: Vectors) -> Values:
    """[P]: the mean cosine of each photo to the others: what a drawing can be expected to reach. Needs two photos."""
    cosines = photos.astype(np.float64) @ photos.T.astype(np.float64)
    means: Values = (cosines.sum(axis=1) - np.diag(cosines)) / (len(photos) - 1)
    return means


def diversity(drawn: Vectors, groups: Sequence[str]) -> dict[str, float]:
    """Of every prompt with two drawings or more, the mean cosine distance of two of its drawings."""
    names, found = np.asarray(groups), {}
    for name in dict.fromkeys(groups):
        own = drawn[names == name].astype(np.float64)
        if len(own) > 1:
            pairs = own @ own.T
            found[name] = float(1 - pairs[np.triu_indices(len(own), 1)].mean())
    return found


@dataclass(frozen=True)
class CopyTest:
    """What counts as a copy of a training photo: what is as near to one as its own soft copies are."""

    threshold: float
    """Cosine to the nearest photo, in the middle between what copies have and what other photos have."""
    copies: float
    """Cosine of the most changed copy of a photo to its photo."""
    others: float
    """Largest cosine of two different photos; 0 with one photo."""

    @property
    def can_tell(self) -> bool:
        """Whether copies are nearer to their photo than any two photos are to each other."""
        return self.copies > self.others


def copy_test(photos: Vectors, copies: Vectors) -> CopyTest:
    """The test that a subject's own photos give.

    Args:
        photos: [P, D].
        copies: [P, J, D], soft copies of each photo.
    """
    wide, others = photos.astype(np.float64), 0.0
    if len(wide) > 1:
        others = float((wide @ wide.T)[np.triu_indices(len(wide), 1)].max())
    own = float(np.einsum("pjd,pd->pj", copies.astype(np.float64), wide).min())
    # photos that are copies of each other: then only what is nearer still is a copy
    return CopyTest((own + others) / 2 if own > others else (1 + others) / 2, own, others)
