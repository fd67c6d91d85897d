"""PNG bytes carry their parameters and depend on nothing else."""

import numpy as np

from training.png import decode_png, encode_png, grid, png_parameters

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def test_pixels_and_parameters_come_back() -> None:
    about = {"prompt": "ein Käfer, 甲虫", "seed": 7}
    data = encode_png(PIXELS, about)
    assert np.array_equal(decode_png(data), PIXELS)
    assert png_parameters(data) == about
    assert png_parameters(encode_png(PIXELS)) == {}


def test_the_order_of_parameters_does_not_matter() -> None:
    assert encode_png(PIXELS, {"a": 1, "b": 2}) == encode_png(PIXELS, {"b": 2, "a": 1})


def test_a_grid_keeps_its_images_in_rows() -> None:
    images = [np.full((2, 2, 3), i, dtype=np.uint8) for i in range(3)]
    sheet = grid(images, columns=2, gap=1)
    assert sheet[:, :, 0].tolist() == [
        [0, 0, 255, 1, 1],
        [0, 0, 255, 1, 1],
        [255, 255, 255, 255, 255],
        [2, 2, 255, 255, 255],
        [2, 2, 255, 255, 255],
    ]
