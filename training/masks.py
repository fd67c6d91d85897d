"""This file is where it is read where a photo shows its subject: from its transparency, or a grey picture beside it.

S image size in pixels, N training images, h w latent size.
"""

import io
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from cluster.errors import UserError
from cluster.source import Entry, read
from training.buckets import Rows, bucket_step
from training.cuts import crops
from training.recipe import Data

if TYPE_CHECKING:
    from training.intake import Intake

Mask = Literal["none", "alpha", "files"]
SUFFIX = "-masklabel.png"  # as OneTrainer names them: rex.jpg has rex-masklabel.png


def is_mask(name: str) -> bool:
    """Whether a file is named as the mask of a photo."""
    return name.endswith(SUFFIX)


def mask_of_alpha(image: Image.Image, file: str) -> Image.Image:
    """The opacity of a photo as a grey picture.

    Raises:
        UserError: It has none.
    """
    if not image.has_transparency_data:
        raise UserError(
            f"{file} has no transparency",
            "train.objective.mask is alpha: where a photo is opaque is what is learnt",
            "cut the subject out and save it as PNG or WebP, or set train.objective.mask: files",
        )
    return image.convert("RGBA").getchannel("A")


def mask_beside(photo: Entry, masks: Mapping[str, Entry], size: tuple[int, int]) -> Image.Image:
    """The grey picture beside a photo, white where it counts.

    Args:
        photo: The photo.
        masks: Files named as masks, by name.
        size: Width and height of the photo, upright.

    Raises:
        UserError: It is missing, no PNG, or of another size.
    """
    wanted = PurePosixPath(photo.name).stem + SUFFIX
    if wanted not in masks:
        raise UserError(
            f"{photo.place} has no mask",
            f"train.objective.mask is files, and there is no {wanted} beside it",
            "draw one, white where the subject is, or set train.objective.mask: none",
        )
    place = masks[wanted].place
    try:
        with PngImageFile(io.BytesIO(read(place))) as source:
            found = source.convert("L")
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise UserError(f"{place} is damaged", str(error), "save it again as PNG") from error
    if found.size != size:
        raise UserError(
            f"{place} does not fit its photo",
            f"it is {found.width}x{found.height}, the photo is {size[0]}x{size[1]}",
            "save it in the photo's size, upright",
        )
    return found


def latent_masks(intake: "Intake", image_size: int, factor: int, data: Data) -> Rows:
    """Where each training image counts, float32 [N, h, w] from 0 to 1: the share of white of each latent's pixels.

    Where sizes differ, a list of N.

    Args:
        intake: Photos with masks.
        image_size: S.
        factor: Pixels per latent along a side.
        data: The crops and mirror images, as of the photos.

    Raises:
        UserError: Nothing of an image would be learnt.
    """
    step, found = bucket_step(image_size, factor), []
    for photo in intake.photos:
        for cut in crops(photo.mask, image_size, data, step, of=photo.png):
            height, width = (side // factor for side in cut.shape)
            share = cut.reshape(height, factor, width, factor).mean(axis=(1, 3)) / 255
            if share.max() < 0.5:
                raise UserError(
                    f"the mask of {photo.name} is empty",
                    "no part of the crop that is trained on is white",
                    "draw it again, or set data.crop or data.variants so that the subject is in it",
                )
            found.append(share.astype(np.float32))
    return np.stack(found) if len({share.shape for share in found}) == 1 else found
