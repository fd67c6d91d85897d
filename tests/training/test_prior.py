"""Prior sets and latents through real Ray Data actors: drawn once, the same whoever asks, checked when read."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.errors import SystemFailure, UserError
from cluster.mailbox import fetch
from cluster.storage import Storage
from training.intake import read_photos, store_photos
from training.latents import ImageSet, Shard, latent_path, latent_refs, missing_images, missing_shards
from training.pipeline import encode_image, load_vae, open_base
from training.png import decode_png
from training.prior import draw_prior, image_seed, prior_count, prior_images, prior_key, prior_pngs
from training.recipe import Data, Prior
from training.stream import Pool, draw_pngs, encode

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
PRIOR = Prior(num_images=6, steps=3, guidance=4.0)
FEW = PRIOR.model_copy(update={"num_images": 2})


@pytest.fixture(scope="module")
def _drawn(tiny_base: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with few dogs and cats."""
    root = tmp_path_factory.mktemp("drawn")
    for noun in ("dog", "cat"):
        draw_prior(Storage(str(root)), open_base(str(tiny_base)), FEW, noun, Pool())
    return root


@pytest.fixture
def drawn(_drawn: Path, storage: Storage) -> Storage:
    """A storage of a test's own with few dogs and cats."""
    shutil.copytree(_drawn, storage.uri, dirs_exist_ok=True)
    return storage


def test_a_larger_request_draws_only_what_is_missing_and_equals_one_drawn_at_once(
    tiny_base: Path, storage: Storage, tmp_path: Path
) -> None:
    base, key = open_base(str(tiny_base)), prior_key(open_base(str(tiny_base)), PRIOR, "dog")
    seen: list[int] = []
    first = PRIOR.model_copy(update={"num_images": 3})
    assert draw_prior(storage, base, first, "dog", Pool(), lambda: seen.append(1)) == 3
    assert draw_prior(storage, base, PRIOR, "dog", Pool(), lambda: seen.append(1)) == 3
    assert draw_prior(storage, base, PRIOR, "dog", Pool()) == 0
    assert draw_prior(storage, base, first, "dog", Pool()) == 0
    assert (len(seen), prior_count(storage, key)) == (6, 6)
    at_once = Storage(str(tmp_path / "other"))
    assert draw_prior(at_once, base, PRIOR, "dog", Pool(actors=2)) == 6
    pngs = list(prior_pngs(storage, key, 6))
    assert pngs == list(prior_pngs(at_once, key, 6))
    assert len(set(pngs)) == 6
    assert decode_png(pngs[0]).shape == (16, 16, 3)


def test_two_that_need_the_same_set_at_once_draw_it_once(tiny_base: Path, storage: Storage) -> None:
    base, told = open_base(str(tiny_base)), Event()
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(draw_prior, storage, base, PRIOR, "dog", Pool(), lambda: None, told.set)
            for _ in range(2)
        ]
        assert sorted(answer.result() for answer in asked) == [0, 6]
    assert told.is_set()
    assert prior_count(storage, prior_key(base, PRIOR, "dog")) == 6


def test_the_key_names_what_decides_the_pixels_and_not_how_many(tiny_base: Path, tiny_base_v: Path) -> None:
    base = open_base(str(tiny_base))
    key = prior_key(base, PRIOR, "dog")
    assert key == prior_key(base, PRIOR.model_copy(update={"num_images": 99, "weight": 0.5}), "dog")
    changed = [
        prior_key(base, PRIOR, "cat"),
        prior_key(open_base(str(tiny_base_v)), PRIOR, "dog"),
        prior_key(base, PRIOR, "dog", "cuda"),
        *(
            prior_key(base, PRIOR.model_copy(update=change), "dog")
            for change in (
                {"seed": 1},
                {"steps": 4},
                {"guidance": 5.0},
                {"sampler": "dpm++2m"},
                {"negative_prompt": "cat"},
                {"prompt": "a {class}"},
            )
        ),
    ]
    assert len({key, *changed}) == len(changed) + 1
    assert image_seed(0, 1) != image_seed(1, 0)


def test_a_damaged_shard_is_refused(tiny_base: Path, drawn: Storage) -> None:
    base = open_base(str(tiny_base))
    key = prior_key(base, FEW, "dog")
    shard = Path(drawn.uri) / f"priors/{key}/images-000000-000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemFailure, match="damaged"):
        list(prior_pngs(drawn, key, 2))
    with pytest.raises(SystemFailure, match="damaged") as caught:  # the same error from a worker
        encode(drawn, base, [prior_images(drawn, key, 2)], Pool())
    assert type(caught.value) is SystemFailure and caught.value.do


@pytest.mark.parametrize("shards_per_reader", [64, 1], ids=["read by the actor", "read by tasks"])
def test_a_damaged_shard_refuses_its_set_and_the_other_sets_go_on(
    tiny_base: Path, drawn: Storage, monkeypatch: pytest.MonkeyPatch, shards_per_reader: int
) -> None:
    monkeypatch.setattr("training.stream.SHARDS_PER_READER", shards_per_reader)
    base = open_base(str(tiny_base))
    dogs, cats = (prior_images(drawn, prior_key(base, FEW, noun), 2) for noun in ("dog", "cat"))
    gone = replace(dogs, key="gone", shards={"a": Shard("priors/none/a.parquet", "0" * 64, 2)})
    Path(drawn.uri, next(iter(dogs.shards.values())).path).write_bytes(b"x")
    errors: dict[int, str] = {}
    sets, images = [dogs, cats, gone, cats], []
    done: list[int] = []

    def refuse(number: int, error: Exception) -> None:
        errors[number] = f"{type(error).__name__} {error}"

    encode(drawn, base, sets, Pool(), lambda: images.append(1), done.append, refuse)
    assert (done, len(images), sorted(errors)) == ([1, 3], 2, [0, 2])
    assert "SystemFailure" in errors[0] and "damaged" in errors[0] and "missing" in errors[2]
    done.clear()
    encode(drawn, base, [cats], Pool(), on_set=done.append)  # told at once
    assert done == [0]


def test_what_a_worker_cannot_do_is_said_without_rays_traceback(tiny_base: Path) -> None:
    base = open_base(str(tiny_base))
    request = {"index": 0, "prompt": "a photo " * 100, "seed": 0}
    with pytest.raises(UserError) as caught:
        list(draw_pngs(base, [request], Pool(), 4))
    assert type(caught.value) is UserError and "ray" not in str(caught.value)
    with pytest.raises(SystemFailure, match=r"a worker of the stream failed.*unexpected keyword"):
        list(draw_pngs(base, [{**request, "colour": "red"}], Pool(), 4))


def test_latents_are_the_vaes_own_for_every_variant_and_are_encoded_once(
    tiny_base: Path, storage: Storage, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 80, 3), dtype=np.uint8)
    for number, photo in enumerate(pixels):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    base = open_base(str(tiny_base))
    stored = store_photos(storage, "rex", read_photos([str(tmp_path)], base.image_size), base.image_size)
    data = Data(variants=2, flip=True)
    shard = Shard(f"{stored.path}/photos.parquet", stored.digest, images=2 * 2 * 2)
    photos = ImageSet(stored.key, {"photos.parquet": shard}, data)
    assert missing_images(storage, base, photos) == 8
    seen: list[int] = []
    encode(storage, base, [photos], Pool(), lambda: seen.append(1))
    encode(storage, base, [photos], Pool(), lambda: seen.append(1))
    assert len(seen) == 2 * 2 * 2
    assert (missing_shards(storage, base, photos), missing_images(storage, base, photos)) == ([], 0)
    [found] = fetch(latent_refs(storage, base, photos))
    assert found["mean"].shape == found["std"].shape == (8, 4, 8, 8)
    assert found["mean"].dtype == np.float32
    # the mirrored variant is the VAE's latent of the mirrored pixels, not the mirrored latent
    from training.cuts import crops

    cuts = crops(storage.read_rows(shard.path, shard.sha256)["png"][1], 16, data)
    with torch.inference_mode():
        image = torch.from_numpy(np.ascontiguousarray(cuts[3])).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        mean, std = encode_image(load_vae(base), image)
    assert np.array_equal(found["mean"][7], mean[0].numpy())
    assert np.array_equal(found["std"][7], std[0].numpy())
    assert latent_path(base, replace(photos, data=Data())) != latent_path(base, photos)
    changed = replace(photos, shards={"photos.parquet": replace(shard, sha256="0" * 64)})
    assert missing_shards(storage, base, changed) == ["photos.parquet"]


def test_a_run_that_wants_fewer_class_images_uses_the_first(tiny_base: Path, drawn: Storage) -> None:
    base = open_base(str(tiny_base))
    images = prior_images(drawn, prior_key(base, FEW, "dog"), 2)
    encode(drawn, base, [images], Pool())
    every = np.concatenate([block["mean"] for block in fetch(latent_refs(drawn, base, images))])
    some = np.concatenate([block["mean"] for block in fetch(latent_refs(drawn, base, images, limit=1))])
    assert len(every) == 2
    assert np.array_equal(some, every[:1])
