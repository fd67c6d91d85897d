"""Photos that do not fit are cut where their subject is: a face, or what stands out."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from pocket.subject import draw_subject
from training.cuts import crops
from training.focus import focused, largest_face, refuse_missing
from training.recipe import Data

CAT = Path(__file__).parents[3] / "shared/dreambooth/cat/01.jpg"
SIDE = 128


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def scene(left: int, thing: Image.Image, size: tuple[int, int] = (384, SIDE)) -> Image.Image:
    """A grey photo with a thing of 64 x 64 pixels somewhere."""
    photo = Image.new("RGB", size, (128, 130, 128))
    small = thing.convert("RGBA").resize((64, 64))
    photo.paste(small, (left, 32), small)
    return photo


@pytest.mark.parametrize("left", [0, 150, 320])
def test_what_stands_out_is_in_the_square(left: int) -> None:
    photo = scene(left, draw_subject())
    for turned, axis in ((photo, 1), (photo.transpose(Image.Transpose.TRANSPOSE), 0)):
        begins = focused(np.asarray(turned), axis, SIDE, "saliency")
        assert begins <= left and left + 64 <= begins + SIDE
        [part] = crops(png(turned), SIDE, Data(crop="saliency"))
        assert part.shape == (SIDE, SIDE, 3) and (np.abs(part.astype(int) - 128) > 60).sum() > 1000
        # a mask is cut where its photo is, and without a face that is what stands out
        mask = Image.fromarray(
            (np.abs(np.asarray(turned.convert("L"), int) - 129) > 20).astype(np.uint8) * 255
        )
        [white] = crops(png(mask), SIDE, Data(crop="face"), of=png(turned))
        assert (white > 0).sum() == (np.asarray(mask) > 0).sum()


def test_of_one_colour_the_middle_is_taken() -> None:
    plain = Image.new("RGB", (300, 100), (10, 20, 30))
    assert focused(np.asarray(plain), 1, 100, "saliency") == 100


def test_a_face_comes_into_the_middle() -> None:
    if not CAT.is_file():
        pytest.skip("no photo of a face: shared/dreambooth is not there")
    face = Image.open(CAT).convert("RGB").resize((512, 512))
    photo = Image.new("RGB", (1536, 512), (90, 90, 90))
    photo.paste(face, (900, 0))
    box = largest_face(np.asarray(photo))
    assert box is not None and 900 < box[0] < 1412
    begins = focused(np.asarray(photo), 1, 512, "face")
    assert begins == min(max(round(box[0] + box[2] / 2 - 256), 0), 1024)
    assert largest_face(np.full((512, 512, 3), 90, np.uint8)) is None


def test_opencv_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from training import focus

    focus._cv2.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    refuse_missing("center")
    with pytest.raises(UserError, match=r"pip install 'raybooth\[crop\]'"):
        refuse_missing("face")
    monkeypatch.undo()
    refuse_missing("face")
    monkeypatch.setattr(focus, "_FACES", ("haarcascade_of_nothing",))  # as OpenCV 5, which ships none
    with pytest.raises(UserError, match="is here without them"):
        refuse_missing("face")
