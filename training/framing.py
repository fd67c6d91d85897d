"""This file is where it is told which part of which photo a training image is: the sizes that SDXL is told.

N training images, S image size in pixels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.cuts import cuts, opened
from training.intake import Intake
from training.recipe import Data

Sizes = NDArray[np.float32]


def image_sizes(intake: Intake, image_size: int, data: Data, step: int | None = None) -> Sizes:
    """The sizes of each training image, float32 [N, 6], in the order of `crops`.

    A photo counts with its true size, upright; where a part begins is counted in the photo as it is after it was shrunk
    until it just covered the part, what was cut off of a long one included. A mirror image begins where it does in the
    mirrored photo.

    Args:
        intake: Photos.
        image_size: S.
        data: The crops and mirror images, as of the photos.
        step: What sides of buckets are multiples of, as of the photos.

    Source:
        arXiv 2307.01952, section 2.2; diffusers' scripts count as much, but of the photo before a crop of their own.
    """
    rows: list[Any] = []
    for photo in intake.photos:
        found = cuts(opened(photo.png), image_size, data, step)
        above, beside = (round(cut * found.covering[0] / photo.width) for cut in photo.cut)
        width, height = found.size
        for top, left in found.corners:
            mirrored = found.covering[0] - left - width
            for start in (left, mirrored) if data.flip else (left,):
                rows.append((*photo.original, above + top, beside + start, height, width))
    return np.asarray(rows, dtype=np.float32)
