"""This file is where the intake of photos is tested, on real files: what comes in right, and what is refused."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cluster.errors import UserError
from cluster.storage import Storage
from training.cuts import crops
from training.intake import MAX_BYTES, Intake, read_photos, store_photos
from training.recipe import Data

SIZE = 64  # the base's image size here, in pixels


def picture(width: int = 96, height: int = 80, seed: int = 0) -> Image.Image:
    """A picture of smooth colour, different for every seed."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def pixels(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def one(path: Path) -> NDArray[np.uint8]:
    (photo,) = read_photos([str(path)], SIZE).photos
    return pixels(photo.png)


def refusal(*paths: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        read_photos([str(path) for path in paths], SIZE)
    return caught.value


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels: 60 bytes that would decode to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# -- what comes in -----------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_and_other_files_are_skipped_with_a_note(tmp_path: Path) -> None:
    for seed, name in enumerate(("b.PNG", "a.jpg", "c.webp")):
        picture(seed=seed).save(tmp_path / name)
    picture(seed=9).save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    intake = read_photos([str(tmp_path)], SIZE)
    assert [photo.name for photo in intake.photos] == ["a.jpg", "b.PNG", "c.webp"]
    skipped = [note.split(":")[0] for note in intake.notes]
    assert skipped == ["skipped .hidden.png", "skipped .ipynb_checkpoints", "skipped notes.txt"]


def test_files_are_sorted_however_they_were_given(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.png" for name in "cab"]
    for seed, file in enumerate(files):
        picture(seed=seed).save(file)
    assert read_photos([str(f) for f in files], SIZE).key(SIZE) == read_photos([str(tmp_path)], SIZE).key(
        SIZE
    )


def test_a_path_with_spaces_and_other_letters_is_a_path(tmp_path: Path) -> None:
    file = tmp_path / "mein Hund – 犬" / "Ähre 1.png"
    file.parent.mkdir()
    picture().save(file)
    (photo,) = read_photos([str(file.parent)], SIZE).photos
    assert photo.name == "Ähre 1.png"


def test_the_short_side_becomes_the_image_size_and_nothing_is_squashed(tmp_path: Path) -> None:
    wide = Image.new("RGB", (300, 200), "white")
    wide.paste("black", (100, 50, 200, 150))  # a square, which must stay one
    wide.save(tmp_path / "a.png")
    (photo,) = read_photos([str(tmp_path)], SIZE).photos
    assert (photo.width, photo.height) == (96, 64)
    dark = pixels(photo.png)[..., 0] < 128
    assert dark.any(axis=0).sum() == dark.any(axis=1).sum() == 32


def test_a_panorama_is_cut_to_its_middle_with_a_note(tmp_path: Path) -> None:
    long = Image.new("RGB", (64, 640), "red")
    long.paste("blue", (0, 224, 64, 416))
    long.save(tmp_path / "a.png")
    intake = read_photos([str(tmp_path)], SIZE)
    assert (intake.photos[0].width, intake.photos[0].height) == (64, 192)
    assert (pixels(intake.photos[0].png) == (0, 0, 255)).all()
    assert intake.notes == ["a.png is longer than 3:1, its middle is used"]


def test_a_photo_that_was_turned_by_its_exif_comes_in_upright(tmp_path: Path) -> None:
    upright = picture(64, 96)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0
    )
    difference = one(tmp_path / "a.jpg").astype(int) - np.asarray(upright)
    assert difference.shape == (96, 64, 3)
    assert np.abs(difference).max() <= 4


def test_a_transparent_background_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    image.quantize(4).save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        seen = one(tmp_path / name)
        assert tuple(seen[0, 0]) == (0, 0, 255)
        assert tuple(seen[0, 63]) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 65535, 64, dtype=np.uint16)[None], 64, axis=0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    seen = one(tmp_path / "a.png")
    assert (seen == (ramp >> 8)[..., None]).all()


def test_cmyk_becomes_the_colour_it_prints(tmp_path: Path) -> None:
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(one(tmp_path / "a.jpg").astype(int) - (255, 0, 0)).max() <= 4


def test_a_stored_photo_holds_pixels_alone_and_does_not_depend_on_its_name(tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "a.png", icc_profile=b"profile" * 9, pnginfo=None)
    (tmp_path / "other").mkdir()
    image.save(tmp_path / "other" / "b.png")
    first, second = (read_photos([str(p)], SIZE) for p in (tmp_path / "a.png", tmp_path / "other"))
    assert first.photos[0].png == second.photos[0].png
    assert first.photos[0].sha256_source != second.photos[0].sha256_source
    assert first.key(SIZE) == second.key(SIZE) != first.key(SIZE + 1)


# -- what is refused ---------------------------------------------------------------------------------------


def test_no_images_is_refused_and_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "clip.mov").write_bytes(b"moving")
    error = refusal(tmp_path)
    assert error.what == f"no photos in {tmp_path}"
    assert error.seen == "skipped clip.mov: a hidden file, a folder, or not .jpg, .jpeg, .png, .webp"
    assert error.do.startswith("give a folder with 3 to 5 photos")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").seen == "nothing is there"


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path / "rexx")
    assert error.what == f"{tmp_path / 'rexx'} does not exist"
    assert error.do == "check the path"


def test_one_unreadable_photo_among_five_refuses_them_all(tmp_path: Path) -> None:
    for seed in range(5):
        picture(400, 300, seed).save(tmp_path / f"{seed}.jpg")
    whole = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(whole[: len(whole) // 2])
    error = refusal(tmp_path)
    assert error.what == f"{tmp_path / '3.jpg'} is damaged"
    assert "truncated" in error.seen
    assert error.do == "save it again, or remove it from the photos"


def test_one_pixel_is_too_small(tmp_path: Path) -> None:
    picture(1, 1).save(tmp_path / "dot.png")
    error = refusal(tmp_path)
    assert error.what == f"{tmp_path / 'dot.png'} is too small"
    assert error.seen == f"1x1 pixels, the base draws {SIZE}x{SIZE}"
    assert error.do == "use a photo whose shorter side has at least 32 pixels"


def test_a_header_of_50000_by_50000_is_refused_before_decoding(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(50_000, 50_000))
    error = refusal(tmp_path)
    assert error.what == f"{tmp_path / 'bomb.png'} has too many pixels"
    assert error.seen == "50000x50000, at most 100 million pixels are decoded"
    assert error.do == "save it smaller"


def test_a_real_decompression_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    assert refusal(tmp_path).seen == "12000x12000, at most 100 million pixels are decoded"


def test_a_file_over_the_byte_cap_is_not_even_read(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(MAX_BYTES + 1_000_000)  # a hole: it takes no disk
    error = refusal(tmp_path)
    assert error.what == f"{tmp_path / 'a.jpg'} is too large"
    assert error.seen == "51 MB, at most 50 MB are read"
    assert error.do == "save it smaller"


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"<!DOCTYPE html><html></html>", "it begins with b'<!DOCTYPE html><'"),
        (b"GIF89a" + bytes(20), "it begins with b'GIF89a"),
        (b"", "it is empty"),
    ],
)
def test_a_jpg_that_is_something_else_is_refused(tmp_path: Path, content: bytes, seen: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    error = refusal(tmp_path)
    assert error.what == f"{tmp_path / 'a.jpg'} is not a JPEG, PNG or WebP image"
    assert error.seen.startswith(seen)
    assert error.do == "save it as one of these, or remove it from the photos"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_photo_cut_off_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    picture(400, 300).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for eighth in range(1, 8):
        (tmp_path / name).write_bytes(whole[: len(whole) * eighth // 8])
        assert refusal(tmp_path).what == f"{tmp_path / name} is damaged"


@pytest.mark.parametrize("head", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"RIFF\x10\0\0\0WEBPVP8X"])
def test_a_magic_number_with_nothing_behind_it_is_refused(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "a.png").write_bytes(head + b"nonsense")
    error = refusal(tmp_path)
    assert error.what == f"{tmp_path / 'a.png'} is damaged"
    assert "remove it from the photos" in error.do


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_an_animation_is_refused(tmp_path: Path, name: str) -> None:
    picture(seed=0).save(tmp_path / name, save_all=True, append_images=[picture(seed=1)])
    error = refusal(tmp_path)
    assert error.what == f"{tmp_path / name} is animated"
    assert error.seen == "2 frames"
    assert error.do == "save one frame as a picture"


def test_exact_duplicates_are_refused_even_under_another_format(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.webp", lossless=True)
    error = refusal(tmp_path)
    assert error.what == "b.webp is a duplicate of a.png"
    assert error.do == "remove one of them"


# -- storing -----------------------------------------------------------------------------------------------


@pytest.fixture
def intake(tmp_path: Path) -> Intake:
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        picture(seed=seed).save(tmp_path / "photos" / f"{seed}.png")
    return read_photos([str(tmp_path / "photos")], SIZE)


def test_photos_are_stored_as_rows_under_the_address_of_their_pixels(
    storage: Storage, intake: Intake
) -> None:
    stored = store_photos(storage, "rex", intake, SIZE)
    assert stored.path == f"subjects/rex/{intake.key(SIZE)}"
    assert stored.count == 3
    rows = storage.read_rows(f"{stored.path}/photos.parquet", stored.digest)
    assert rows["name"] == ["0.png", "1.png", "2.png"]
    assert rows["png"] == [photo.png for photo in intake.photos]
    manifest = storage.manifest(stored.path)
    assert manifest is not None
    assert (manifest["count"], manifest["image_size"]) == (3, SIZE)


def test_what_is_stored_whole_is_used_again_and_what_is_damaged_is_written_again(
    storage: Storage, intake: Intake
) -> None:
    stored = store_photos(storage, "rex", intake, SIZE)
    table = Path(storage.full(f"{stored.path}/photos.parquet"))
    written = table.stat().st_mtime_ns
    assert store_photos(storage, "rex", intake, SIZE) == stored
    assert table.stat().st_mtime_ns == written
    table.write_bytes(table.read_bytes()[:-1])
    assert store_photos(storage, "rex", intake, SIZE) == stored
    assert len(storage.read_rows(f"{stored.path}/photos.parquet", stored.digest)["png"]) == 3


# -- crops -------------------------------------------------------------------------------------------------


def striped(width: int, height: int) -> bytes:
    """A PNG whose pixels tell their own column (red) and row (green)."""
    rows, columns = np.mgrid[:height, :width]
    out = io.BytesIO()
    Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(("crop", "offset"), [("start", 0), ("center", 16), ("end", 32)])
def test_the_one_crop_is_where_the_recipe_says(crop: str, offset: int) -> None:
    (wide,) = crops(striped(96, 64), SIZE, Data.model_validate({"crop": crop}))
    (high,) = crops(striped(64, 96), SIZE, Data.model_validate({"crop": crop}))
    assert wide.shape == high.shape == (64, 64, 3)
    assert tuple(wide[0, 0]) == (offset, 0, 0)
    assert tuple(high[0, 0]) == (0, offset, 0)


def test_variants_are_spread_over_the_long_side_and_mirrored_when_asked() -> None:
    cut = crops(striped(96, 64), SIZE, Data(variants=3, flip=True))
    assert [int(square[0, 0, 0]) for square in cut] == [0, 63, 16, 79, 32, 95]
    assert all(square.dtype == np.uint8 and square.shape == (64, 64, 3) for square in cut)


def test_every_photo_gives_the_same_number_of_crops() -> None:
    assert len(crops(striped(64, 64), SIZE, Data(variants=4))) == 4


# -- photos in an object store -----------------------------------------------------------------------------


def test_photos_in_an_object_store_are_those_in_a_folder(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Storage(f"{bucket}/photos")
    for seed, name in enumerate(("b 1.png", "a.png")):
        picture(seed=seed).save(tmp_path / name)
        remote.write(f"rex/{name}", (tmp_path / name).read_bytes())
    remote.write("rex/subject.yaml", b"class: dog")  # a campaign's, and no surprise
    remote.write("rex/notes.txt", b"mine")
    found = read_photos([remote.full("rex/")], SIZE)
    assert found.photos == read_photos([str(tmp_path)], SIZE).photos
    assert [note.split(":")[0] for note in found.notes] == ["skipped notes.txt"]
    [alone] = read_photos([remote.full("rex/a.png")], SIZE).photos
    assert alone == found.photos[0]

    remote.write("broken/a.jpg", b"\xff\xd8\xff\xe0 broken")
    with pytest.raises(UserError, match=r"broken/a\.jpg is damaged"):
        read_photos([remote.full("broken")], SIZE)
    with pytest.raises(UserError, match="does not exist"):
        read_photos([remote.full("nobody")], SIZE)
    monkeypatch.setattr("training.intake.MAX_BYTES", 100)
    monkeypatch.setattr("training.intake.read", pytest.fail)  # what is too large is not even downloaded
    with pytest.raises(UserError, match="is too large"):
        read_photos([remote.full("rex")], SIZE)


# -- what looks the same, and other light ------------------------------------------------------------------


def _scene(seed: int, size: int = 64) -> Image.Image:
    """Soft spots of light, as a photo has."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def test_a_photo_that_was_saved_again_is_told_and_another_one_is_not(tmp_path: Path) -> None:
    _scene(1).save(tmp_path / "a.png")
    _scene(2).save(tmp_path / "b.png")
    _scene(1).save(tmp_path / "c.jpg", quality=85)
    _scene(1).resize((100, 100), Image.Resampling.BICUBIC).save(tmp_path / "d.png")
    notes = read_photos([str(tmp_path)], 64).notes
    assert [note.partition(":")[0] for note in notes] == [
        "a.png and c.jpg look the same",
        "a.png and d.png look the same",
        "c.jpg and d.png look the same",
    ]


def test_variants_may_be_turned_and_have_no_empty_corners(tmp_path: Path) -> None:
    half = np.full((64, 64, 3), 255, np.uint8)
    half[:, :32] = (200, 40, 40)
    Image.fromarray(half).save(tmp_path / "a.png")
    [photo] = read_photos([str(tmp_path)], 64).photos
    plain = crops(photo.png, 64, Data(variants=4))
    turned = crops(photo.png, 64, Data(variants=4, flip=True, rotate=30))
    assert np.array_equal(turned[0], plain[0]) and len(turned) == 8
    for square, mirror in zip(turned[2::2], turned[3::2], strict=True):
        assert square[..., 0].min() > 180 and not np.array_equal(square, plain[0])  # black is nowhere in it
        assert np.array_equal(mirror, square[:, ::-1])
        # what was upright leans: the edge is further to one side at the top than at the bottom
        assert (square[0, :, 1] > 128).sum() != (square[-1, :, 1] > 128).sum()
        assert abs(int((square[32, :, 1] > 128).sum()) - 32) <= 1  # about the middle
    again = crops(photo.png, 64, Data(variants=4, flip=True, rotate=30))
    assert all(np.array_equal(a, b) for a, b in zip(turned, again, strict=True))
    with pytest.raises(ValueError, match="`rotate` takes no effect"):
        Data(rotate=5)


def test_variants_may_differ_in_light_and_the_first_does_not(tmp_path: Path) -> None:
    _scene(1).save(tmp_path / "a.png")
    [photo] = read_photos([str(tmp_path)], 64).photos
    plain = crops(photo.png, 64, Data(variants=3, flip=True))
    lit = crops(photo.png, 64, Data(variants=3, flip=True, color=0.2))
    assert np.array_equal(plain[0], lit[0]) and np.array_equal(plain[1], lit[1])
    apart = [np.abs(a.astype(int) - b).mean() for a, b in zip(plain[2:], lit[2:], strict=True)]
    assert min(apart) > 1 and max(apart) < 60
    assert not np.array_equal(lit[2], lit[4]) and np.array_equal(lit[3], lit[2][:, ::-1])
    again = crops(photo.png, 64, Data(variants=3, flip=True, color=0.2))
    assert all(np.array_equal(a, b) for a, b in zip(lit, again, strict=True))
