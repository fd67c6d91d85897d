"""A run made ready: what the user got wrong is found here, and what decides the weights is known."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from cluster.storage import Storage
from orchestrator.prepare import Prepared, prepare
from orchestrator.spec import load_run


@pytest.fixture
def prepared(tmp_path: Path, tiny_base: Path, storage: Storage) -> Callable[..., Prepared]:
    """Prepares a run of three photos on the tiny base, with `--set` assignments."""
    folder = tmp_path / "rex"
    folder.mkdir()
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{seed}.png")

    def make(*sets: str) -> Prepared:
        subject = {"name": "rex", "class": "dog", "images": [str(folder)]}
        flags = {"subject": subject, "base": {"model": str(tiny_base)}}
        return prepare(load_run(None, flags, ["checkpoint.every=50", *sets]), storage)

    return make


def test_a_photo_is_left_to_train(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(UserError, match=r"there are 3: 0\.png, 1\.png, 2\.png\. set it to at most 2"):
        prepared("data.holdout=3")
    assert prepared("data.holdout=2").photo_names == ["0.png", "1.png", "2.png"]


def test_the_sample_grid_has_its_prompts_after_the_empty_one(prepared: Callable[..., Prepared]) -> None:
    run = prepared("validate.prompts=['{subject} in snow', 'a cat']")
    assert len(run.sample_ids) == 3
    assert len({len(ids) for ids in run.sample_ids}) == 1 and run.sample_ids[0] != run.sample_ids[2]
    assert prepared("validate.prompts=[]").sample_ids == []


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_stored(
    name: str, prepared: Callable[..., Prepared], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"{name} is not installed.*pip install 'raybooth\[{name}\]'"):
        prepared(f"track.{name}=true")
    assert not (Path(storage.uri) / "subjects").exists()


def test_what_decides_the_best_checkpoint_decides_the_weights_when_it_is_published(
    prepared: Callable[..., Prepared],
) -> None:
    watched = ["validate.samples=4", "validate.num_images=3", "checkpoint.every=60"]
    assert prepared().fingerprint == prepared(*watched).fingerprint
    best = prepared("train.load_best_at_end=true").fingerprint
    assert best != prepared("train.load_best_at_end=true", "checkpoint.every=60").fingerprint
    assert best != prepared("train.load_best_at_end=true", "validate.samples=4").fingerprint
    assert best == prepared("train.load_best_at_end=true", "validate.num_images=3").fingerprint


def test_a_run_that_may_end_early_knows_what_it_will_draw_and_by_whom_it_is_judged(
    prepared: Callable[..., Prepared],
) -> None:
    stop = ["train.stop.every=10", "train.stop.dino=pocket", "train.stop.clip=pocket"]
    run = prepared(*stop)
    assert run.run.train.stop and len(run.look_ids) == 1 + len(run.run.train.stop.prompts) + 1
    assert run.look_ids[0] != run.look_ids[-1] and prepared().look_ids == []
    assert len({prepared(*sets).fingerprint for sets in ([], stop, [*stop, "train.stop.patience=3"])}) == 3
    with pytest.raises(UserError, match="facebook/dino-vits16"):
        prepared("train.stop.every=10")


def test_tokens_of_its_own_name_the_subject_and_the_class_does_not_know_them(
    prepared: Callable[..., Prepared],
) -> None:
    plain, own = prepared(), prepared("train.new_tokens.count=2")
    [first, second] = own.identity.token_ids
    assert (own.identity.identifier, second) == ("<zwx>", first + 1) and first not in plain.subject_ids
    where = own.subject_ids.index(first)
    assert own.subject_ids[where : where + 2] == [first, second] and first in own.sample_ids[1]
    assert own.identity.initializer_ids == (own.subject_ids[where + 2],)  # the class noun behind them
    assert not {first, second} & {*own.class_ids, *own.sample_ids[0]}
    assert own.class_ids == plain.class_ids and own.prior_key("cpu") == plain.prior_key("cpu")
    named = prepared("train.new_tokens.count=2", "subject.identifier=Rex")
    assert named.identity.identifier == "<rex>" and named.subject_ids == own.subject_ids
    begun = prepared("train.new_tokens={count: 2, initializer: fox}")
    assert len({run.fingerprint for run in (plain, own, named, begun)}) == 4
    captioned = prepared("train.new_tokens.count=1", "train.templates=['{subject} in snow']")
    assert captioned.identity.token_ids[0] in captioned.caption_ids[0]
    with pytest.raises(UserError, match=r"prior\.prompt names the subject's own token"):
        prepared("train.new_tokens.count=1", "prior.prompt=a <ZWX> {class}")
    with pytest.raises(UserError, match=r"stop_after takes no effect\. it is 9, and there are 9 steps"):
        prepared("train.new_tokens={count: 1, stop_after: 9}", "train.steps=9")


def test_a_mask_travels_with_its_photo_and_decides_what_is_trained(
    prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    plain, folder = prepared(), tmp_path / "rex"
    assert plain.masks is None
    with pytest.raises(UserError, match=r"0\.png has no mask"):
        prepared("train.objective.mask=files")
    shown = np.zeros((40, 50), np.uint8)
    shown[:, :25] = 255
    for seed in range(3):
        Image.fromarray(shown).save(folder / f"{seed}-masklabel.png")
    assert prepared().fingerprint == plain.fingerprint  # a mask is no photo
    assert "a mask" in prepared().notes[0]
    masked = prepared("train.objective.mask=files", "data.flip=true")
    assert masked.masks is not None and masked.masks.shape == (6, 8, 8)
    assert masked.masks[0, :, 0].min() == 1 and masked.masks[0, :, -1].max() == 0
    assert np.array_equal(masked.masks[1], masked.masks[0][:, ::-1])
    assert masked.photos.key == plain.photos.key
    Image.fromarray(255 - shown).save(folder / "1-masklabel.png")
    other = prepared("train.objective.mask=files", "data.flip=true")
    assert other.fingerprint != masked.fingerprint
    Image.fromarray(shown[:, :40]).save(folder / "1-masklabel.png")
    with pytest.raises(UserError, match=r"40x40, the photo is 50x40"):
        prepared("train.objective.mask=files")


def test_what_is_transparent_may_be_left_out(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no transparency"):
        prepared("train.objective.mask=alpha")
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 4), dtype=np.uint8)
        pixels[..., 3] = 0
        pixels[:20, :, 3] = 255
        Image.fromarray(pixels, "RGBA").save(tmp_path / "rex" / f"{seed}.png")
    masks = prepared("train.objective.mask=alpha").masks
    assert masks is not None and masks[0, 0].min() == 1 and masks[0, -1].max() == 0
    pixels[..., 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / "rex" / "2.png")
    with pytest.raises(UserError, match=r"mask of 2\.png is empty"):
        prepared("train.objective.mask=alpha")


def test_a_base_of_sdxl_is_told_sizes_which_decide_what_is_trained(
    prepared: Callable[..., Prepared], tiny_sdxl: Path, tmp_path: Path
) -> None:
    assert prepared().sizes is None
    xl = f"base.model={tiny_sdxl}"
    Image.new("RGB", (50, 40), "red").save(tmp_path / "rex" / "1.png")
    run = prepared(xl, "train.objective.caption_dropout=0.1")
    assert run.sizes is not None and run.sizes.tolist() == [[40, 50, 0, 2, 16, 16]] * 3
    assert len(run.subject_ids) == 2 * 32 and run.subject_ids[:32] != run.subject_ids[32:]  # padded otherwise
    assert run.empty_ids == run.sample_ids[0] == [-1] * 64  # zeros, as diffusers draws
    Image.new("RGB", (100, 80), "red").save(tmp_path / "rex" / "1.png")
    larger = prepared(xl, "train.objective.caption_dropout=0.1")
    assert larger.sizes is not None and larger.sizes[1].tolist() == [80, 100, 0, 2, 16, 16]
    assert larger.photos.key == run.photos.key and larger.fingerprint != run.fingerprint


def test_photos_may_have_captions_of_their_own(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    plain = prepared()
    assert plain.caption_ids == []
    with pytest.raises(UserError, match="no photo has a caption"):
        prepared("train.captions=files")
    (tmp_path / "rex" / "0.txt").write_text("asleep on a sofa\n")
    (tmp_path / "rex" / "1.txt").write_text("{subject} in  snow")
    assert any("skipped 0.txt" in note for note in prepared().notes)
    run = prepared("train.captions=files")
    assert run.notes[0] == "2.png has no caption, so it has the prompt that all share"
    assert len(run.caption_ids) == 3 and run.caption_ids[2] == run.subject_ids
    assert run.fingerprint != plain.fingerprint
    (tmp_path / "rex" / "1.txt").write_text("{subject} in rain")
    assert prepared("train.captions=files").fingerprint != run.fingerprint
    (tmp_path / "rex" / "1.txt").write_text("{breed} in rain")
    with pytest.raises(UserError):
        prepared("train.captions=files")
    with pytest.raises(UserError, match=r"train\.templates takes no effect"):
        prepared("train.captions=files", "train.templates=['{subject}']")
    assert len(prepared("train.templates=['{subject}', 'my {subject}']").caption_ids) == 2
