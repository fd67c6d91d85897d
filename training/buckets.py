"""This file is where pictures that are not square keep their shape: in buckets, sizes of about the base's area.

S image size of the base in pixels. A size is (width, height), in pixels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]
Rows = NDArray[np.float32] | Sequence[NDArray[np.float32]]
"""Arrays of one size, stacked, or each of its own."""
LONGEST = 3  # sides of a bucket: as of the photos that are kept
SHARES = 8  # of S: the step between sizes where the UNet can have it so fine, 64 pixels at 512


def bucket_step(image_size: int, vae_factor: int) -> int:
    """What the sides of a base's buckets are multiples of: an eighth of S, or what its UNet halves, pixels."""
    halved = 4 * vae_factor
    return max(halved, image_size // SHARES // halved * halved)


@lru_cache(maxsize=64)
def bucket_sizes(image_size: int, step: int) -> Sequence[Size]:
    """The buckets of a base, from the highest to the widest; the square is one of them.

    Each has for its longer side the largest shorter one with which its area is at most S x S.
    """
    wide = [
        (side, image_size * image_size // side // step * step)
        for side in range(image_size, LONGEST * image_size + 1, step)
        if image_size * image_size // side >= step
    ]
    wide = [(width, height) for width, height in wide if width <= LONGEST * height]
    return [*((height, width) for width, height in reversed(wide[1:])), *wide]


def bucket_of(width: int, height: int, image_size: int, step: int) -> Size:
    """The bucket of a picture: that of the nearest aspect, of two as near the less long one."""
    aspect = math.log(width / height)
    return min(
        bucket_sizes(image_size, step),
        key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), abs(size[0] - size[1]), size),
    )
