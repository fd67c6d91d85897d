"""This file is where it is told which part of which photo a training image is: the sizes that SDXL is told.

N training images, S image size in pixels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.intake import Intake, offsets
from training.recipe import Data

Sizes = NDArray[np.float32]


def image_sizes(intake: Intake, image_size: int, data: Data) -> Sizes:
    """The sizes of each training image, float32 [N, 6], in the order of `crops`.

    A photo counts with its true size, upright; where the square begins is counted in the photo as it is after its
    short side became S, what was cut off of a long one included. A mirror image begins where it does in the mirrored
    photo.

    Args:
        intake: Photos.
        image_size: S.
        data: The crops and mirror images, as of the photos.

    Source:
        arXiv 2307.01952, section 2.2; diffusers' scripts count as much, but of the photo before a crop of their own.
    """
    rows: list[Any] = []
    for photo in intake.photos:
        top, left = photo.cut
        spare = max(photo.width, photo.height) - image_size
        for offset in offsets(spare, data):
            tall = photo.height > photo.width
            down, right = (offset, 0) if tall else (0, offset)
            mirrored = photo.width - right - image_size
            for start in (right, mirrored) if data.flip else (right,):
                rows.append((*photo.original, top + down, left + start, image_size, image_size))
    return np.asarray(rows, dtype=np.float32)
