"""`generate` draws the champion, each image by its own seed, and says in the PNG how."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.storage import Storage
from serving.generate import GenerateResult, generate
from serving.provenance import NO_ROOM
from training.artifact import artifact_hash
from training.pipeline import open_base
from training.png import decode_png, png_parameters

PROMPT = "a photo of {subject} on the beach"


@pytest.fixture
def rex(storage: Storage, published: Callable[..., None]) -> Storage:
    """A storage root with one registered version of `rex`."""
    published("rex")
    return storage


def draw(storage: Storage, out: Path, *prompts: str, **options: object) -> GenerateResult:
    return generate(storage, "rex", None, prompts, out=out, steps=4, **options)  # type: ignore[arg-type]


def test_the_first_of_four_is_the_one_alone_to_the_byte(rex: Storage, tmp_path: Path) -> None:
    four = draw(rex, tmp_path / "four", PROMPT, n=4, seed=7)
    one = draw(rex, tmp_path / "one é", PROMPT, n=1, seed=7)
    other = draw(rex, tmp_path / "other", "a red clock", PROMPT, n=2, seed=8)
    assert four.seeds == [7, 8, 9, 10]
    assert [p.name for p in four.images] == [
        f"rex-v1-a-photo-of-subject-on-the-beach-s{s}.png" for s in four.seeds
    ]
    assert one.images[0].read_bytes() == four.images[0].read_bytes()
    assert [p.read_bytes() for p in other.images[2:]] == [p.read_bytes() for p in four.images[1:3]]
    assert four.grid is not None and four.grid.is_file() and one.grid is None
    assert not list((tmp_path / "four").glob(".tmp-*"))


def test_a_png_says_how_it_was_drawn(rex: Storage, tmp_path: Path, tiny_base: Path) -> None:
    result = draw(rex, tmp_path, PROMPT, n=1, seed=7, negative_prompt="snow", guidance=3.0)
    data = result.images[0].read_bytes()
    assert decode_png(data).shape == (16, 16, 3)
    assert png_parameters(data) == {
        "prompt": "a photo of a zwx dog on the beach",
        "negative_prompt": "snow",
        "seed": 7,
        "steps": 4,
        "guidance": 3.0,
        "sampler": "ddim",
        "eta": 0.0,
        "subject": "rex-v1",
        "base_revision": open_base(str(tiny_base)).revision,
        "artifact": artifact_hash(rex.manifest("artifacts/rex/v1") or {}),
        "watermark": NO_ROOM,
    }


def test_prompts_that_letters_cannot_tell_apart_get_files_of_their_own(rex: Storage, tmp_path: Path) -> None:
    result = draw(rex, tmp_path, "a dog, red", "a dog. red", "a dog red", "a dog red", n=1)
    assert len({p.name for p in result.images}) == len(result.images) == 3


def test_progress_ends_with_every_image(rex: Storage, tmp_path: Path) -> None:
    seen: list[int] = []
    draw(rex, tmp_path, PROMPT, n=5, on_images=seen.append)
    assert seen == sorted(seen) and seen[-1] == 5


def test_the_pristine_base_draws_but_knows_no_subject(
    storage: Storage, tmp_path: Path, tiny_base: Path
) -> None:
    result = generate(storage, "base", None, ["a dog"], n=1, steps=2, out=tmp_path, base=str(tiny_base))
    assert result.images[0].name == "base-a-dog-s0.png"
    for prompt in (PROMPT, "a {class}"):
        with pytest.raises(UserError, match=r"subject|class"):
            generate(storage, "base", None, [prompt], n=1, out=tmp_path, base=str(tiny_base))


def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(rex: Storage, tmp_path: Path) -> None:
    out, taken = tmp_path / "out", tmp_path / "taken"
    taken.write_text("a file")
    for name, version, prompt, folder in (
        ("rax", None, PROMPT, out),
        ("rex", "v9", PROMPT, out),
        ("rex", None, "a {thing}", out),
        ("rex", None, "dog " * 40, out),
        ("rex", None, PROMPT, taken),
    ):
        with pytest.raises(UserError):
            generate(rex, name, version, [prompt], n=1, steps=2, out=folder)
    assert not list(out.glob("*"))
