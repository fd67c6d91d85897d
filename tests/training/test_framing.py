"""Every training image knows which part of which photo it is."""

from pathlib import Path

import numpy as np
from PIL import Image

from training.cuts import crops
from training.framing import image_sizes
from training.intake import Intake, read_photos
from training.recipe import Data


def intake(folder: Path, *sizes: tuple[int, int]) -> Intake:
    """Photos whose pixels say where they are: red grows to the right, green downwards."""
    for number, (width, height) in enumerate(sizes):
        across, down = np.meshgrid(np.arange(width), np.arange(height))
        pixels = np.stack([across * 255 // width, down * 255 // height, across * 0], axis=-1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return read_photos([str(folder)], 32)


def test_sizes_are_the_photos_own_and_crops_those_of_the_squares(tmp_path: Path) -> None:
    photos = intake(tmp_path, (96, 64), (64, 128), (32, 32))
    assert image_sizes(photos, 32, Data()).tolist() == [
        [64, 96, 0, 8, 32, 32],  # 48 x 32 when shrunk
        [128, 64, 16, 0, 32, 32],
        [32, 32, 0, 0, 32, 32],
    ]
    ends = image_sizes(photos, 32, Data(crop="end"))
    assert ends[:, 2:4].tolist() == [[0, 16], [32, 0], [0, 0]]


def test_variants_and_mirror_images_have_crops_of_their_own(tmp_path: Path) -> None:
    photos, data = intake(tmp_path, (96, 64)), Data(variants=2, flip=True)
    sizes = image_sizes(photos, 32, data)
    assert sizes[:, 2:4].tolist() == [[0, 0], [0, 16], [0, 16], [0, 0]]
    cuts = crops(photos.photos[0].png, 32, data)
    assert len(cuts) == len(sizes)
    for cut, (_, _, _, left, _, _), mirrored in zip(cuts, sizes, (False, True) * 2, strict=True):
        first = int(cut[0, 0, 0]) * 48 / 255  # where in the shrunk photo the first column is
        assert abs(first - (47 - left if mirrored else left)) < 2


def test_what_a_long_photo_lost_counts(tmp_path: Path) -> None:
    [sizes] = image_sizes(intake(tmp_path, (64 * 5, 64)), 32, Data(crop="start"))
    assert sizes.tolist() == [64, 320, 0, 32, 32, 32]  # cut to its middle 192, from 64 on, at half the size


def test_a_photo_is_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60), "red").save(tmp_path / "turned.jpg", exif=exif)
    [sizes] = image_sizes(read_photos([str(tmp_path)], 32), 32, Data())
    assert sizes.tolist() == [90, 60, 8, 0, 32, 32]
