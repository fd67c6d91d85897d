"""This file is where it is found what a photo is of: a face, or what stands out. It is the door of OpenCV.

OpenCV's wheel ships the cascades that find faces; what stands out is computed (Montabone and Soto 2010). No weights are
downloaded.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError

# People from the front, cats, people from the side, which finds most where there is nothing: a photo is searched for
# the next kind when it has none of one.
_FACES = ("haarcascade_frontalface_alt2", "haarcascade_frontalcatface_extended", "haarcascade_profileface")
_SMALLEST = 20  # pixels along a side: the cascades were trained on faces of 20 to 24
_NEIGHBOURS = 5  # detections that must agree; fewer find faces in wallpaper
FOCUSES = ("face", "saliency")


def refuse_missing(crop: str) -> None:
    """Refuse a crop that needs OpenCV where it is not installed, or is another build than ours.

    Raises:
        UserError: It is not.
    """
    if crop not in FOCUSES:
        return
    try:
        cv2 = _cv2()
    except ImportError as error:
        seen = str(error)
    else:  # OpenCV 5 ships no cascades any more, and builds without contributed modules no saliency
        if hasattr(cv2, "saliency") and all(Path(_path(name)).is_file() for name in _FACES):
            return
        seen = f"OpenCV {cv2.__version__} is here without them"
    raise UserError(
        f"data.crop is {crop}, which needs OpenCV 4 with its cascades and contributed modules",
        seen,
        "pip install 'raybooth[crop]', and no other build of OpenCV beside it",
    )


def focused(pixels: NDArray[np.uint8], axis: int, length: int, crop: str) -> int:
    """Where a part begins along one side of a photo so that it holds what the photo is of.

    Args:
        pixels: [H, W, 3].
        axis: The side: 0 is down, 1 across.
        length: Pixels of the part along it.
        crop: `face`: the largest face in the middle of the part, or as `saliency` where none is found. `saliency`: as
            much as can be of what stands out.

    Returns:
        Pixels from the top or from the left.
    """
    spare = pixels.shape[axis] - length
    if crop == "face" and (box := largest_face(pixels)) is not None:
        begin, extent = (box[1], box[3]) if axis == 0 else (box[0], box[2])
        return int(np.clip(round(begin + extent / 2 - length / 2), 0, spare))
    sums = np.concatenate([[0.0], np.cumsum(_saliency(pixels).sum(axis=1 - axis, dtype=np.float64))])
    held = sums[length:] - sums[:-length]
    # of equal ones, as on one colour, the one nearest to the middle
    best = np.flatnonzero(held >= held.max() * (1 - 1e-6))
    return int(best[np.abs(best - spare / 2).argmin()])


def largest_face(pixels: NDArray[np.uint8]) -> tuple[int, int, int, int] | None:
    """Left, top, width and height in pixels of the largest face in [H, W, 3]; `None` where none is found."""
    cv2 = _cv2()
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    for name in _FACES:
        found = _cascade(name).detectMultiScale(
            grey, scaleFactor=1.1, minNeighbors=_NEIGHBOURS, minSize=(_SMALLEST, _SMALLEST)
        )
        if len(found):
            x, y, width, height = max(found, key=lambda box: box[2] * box[3])
            return int(x), int(y), int(width), int(height)
    return None


def _saliency(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How much each pixel stands out, [H, W], 0 to 1."""
    done, found = _cv2().saliency.StaticSaliencyFineGrained_create().computeSaliency(pixels)
    if not done:
        raise RuntimeError("OpenCV computed no saliency")
    weights: NDArray[np.float32] = np.asarray(found, np.float32)
    return weights


@lru_cache(maxsize=len(_FACES))
def _cascade(name: str) -> Any:
    return _cv2().CascadeClassifier(_path(name))


def _path(name: str) -> str:
    return f"{_cv2().data.haarcascades}{name}.xml"


@lru_cache(maxsize=1)
def _cv2() -> Any:
    import cv2

    cv2.setNumThreads(1)  # the same bits on every machine, and no threads beside torch's
    return cv2
