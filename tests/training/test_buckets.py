"""Photos in about their own shape: sizes, cuts, steps that are of one size, and class images of the same sizes."""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.errors import SystemFailure, UserError
from cluster.mailbox import fetch
from cluster.storage import Storage
from orchestrator.prepare import Prepared, prepare
from orchestrator.spec import load_run
from training.bank_key import bankable
from training.batches import Batches
from training.buckets import bucket_of, bucket_sizes, bucket_step
from training.cuts import crops
from training.dataplan import DataPlan, Role
from training.draw import Drawer
from training.latents import latent_path, latent_refs
from training.lease import Lease, latent_table
from training.loop import ResidentBase
from training.pipeline import open_base
from training.png import decode_png
from training.prior import draw_prior, prior_images, prior_key, prior_pngs
from training.recipe import Data
from training.request import DrawRequest
from training.stream import Pool, encode

WIDE, SQUARE, HIGH = (24, 8), (16, 16), (8, 24)  # of the tiny base, whose steps are 8 pixels


def test_buckets_have_about_the_bases_area_and_sides_that_its_unet_can_halve() -> None:
    assert bucket_step(512, 8) == 64 and bucket_step(1024, 8) == 128 and bucket_step(16, 2) == 8
    sizes = bucket_sizes(512, 64)
    assert (512, 512) in sizes and (640, 384) in sizes and (384, 640) in sizes
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % 64 == height % 64 == 0 and 0.7 * 512**2 <= width * height <= 512**2
        assert max(width, height) <= 3 * min(width, height)
        assert bucket_of(width, height, 512, 64) == (width, height)  # a drawn image is where it was drawn for
    assert bucket_of(4000, 3000, 512, 64) == (576, 448) and bucket_of(3000, 4000, 512, 64) == (448, 576)
    assert bucket_of(1000, 990, 512, 64) == (512, 512)


def striped(width: int, height: int) -> bytes:
    """A PNG whose red grows to the right and whose green grows downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    out = io.BytesIO()
    Image.fromarray(np.stack([red, green, red * 0], axis=-1).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_a_photo_keeps_all_that_fits_its_bucket() -> None:
    [cut] = crops(striped(48, 16), 16, Data(buckets=True), 8)  # 3:1, as the bucket is
    assert cut.shape == (8, 24, 3) and cut[0, 0].max() < 20 and cut[-1, -1, 0] > 240 and cut[-1, -1, 1] > 230
    [less] = crops(striped(35, 16), 16, Data(buckets=True), 8)  # a little less wide: of its height the middle
    assert less.shape == (8, 24, 3) and less[0, 0, 1] > 15 and less[0, 0, 0] < 10
    [first] = crops(striped(35, 16), 16, Data(buckets=True, crop="start"), 8)
    assert first[0, 0, 1] < less[0, 0, 1]
    several = crops(striped(16, 35), 16, Data(buckets=True, variants=3, flip=True, rotate=10), 8)
    assert {part.shape for part in several} == {(24, 8, 3)} and len(several) == 6
    [square] = crops(striped(48, 16), 16, Data(buckets=True))  # to look at
    assert square.shape == (16, 16, 3)


def plan(**changes: Any) -> DataPlan:
    values = {"seed": 3, "pairs_per_step": 2, "num_timesteps": 1000, "prior_weight": 1.0}
    sizes = {"subject_sizes": (0, 1, 1, 2, 1), "class_sizes": (0, 1, 2, 0, 1, 2, 0)}
    return DataPlan(**{**values, "subject_rows": 5, "class_rows": 7, **sizes, **changes})


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_a_step_is_of_one_size_and_every_photo_has_the_same_share(pairs: int) -> None:
    ours = plan(pairs_per_step=pairs)
    seen: Counter[tuple[Role, int]] = Counter()
    order = []
    for step in range(30):  # six times five photos
        rows = ours.rows(step, 0, 1)
        sizes = {(ours.class_sizes if r.role else ours.subject_sizes)[r.table_row] for r in rows}
        assert len(sizes) == 1
        order.append(sizes.pop())
        seen.update((row.role, row.table_row) for row in rows)
    assert [seen[Role.SUBJECT, row] for row in range(5)] == [6 * pairs] * 5
    of_class = [seen[Role.CLASS, row] for row in range(7)]
    assert max(abs(of_class[a] - of_class[b]) for a, b in ((0, 3), (3, 6), (1, 4), (2, 5))) <= 1
    assert len({tuple(order[i : i + 5]) for i in range(0, 30, 5)}) > 1


def test_the_plan_does_not_depend_on_ranks_and_validates_pairs_of_one_size() -> None:
    ours = plan(pairs_per_step=3)
    whole = {row.sample_index: row for step in range(6) for row in ours.rows(step, 0, 1)}
    parts = [row for step in range(6) for rank in range(2) for row in ours.rows(step, rank, 2)]
    assert {row.sample_index: row for row in parts if row.weight} == whole
    held = plan(subject_rows=3, held_out=2)
    rows = held.validation_rows(6, 0, 1)
    assert [row.table_row for row in rows[::2]] == [3, 4, 3, 4, 3, 4]
    for subject, of_class in zip(rows[::2], rows[1::2], strict=True):
        assert held.subject_sizes[subject.table_row] == held.class_sizes[of_class.table_row]
    trained = {r.table_row for step in range(20) for r in held.rows(step, 0, 1) if r.role is Role.SUBJECT}
    assert trained == {0, 1, 2}


@pytest.fixture
def prepared(tmp_path: Path, tiny_base: Path, storage: Storage) -> Callable[..., Prepared]:
    """Prepares a run of a wide, a square and two high photos on the tiny base, with `--set` assignments."""
    folder = tmp_path / "rex"
    folder.mkdir()
    for number, (width, height) in enumerate(((96, 40), (50, 50), (40, 96), (40, 90))):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")

    def make(*sets: str) -> Prepared:
        subject = {"name": "rex", "class": "dog", "images": [str(folder)]}
        flags = {"subject": subject, "base": {"model": str(tiny_base)}}
        few = ["prior.num_images=6", "prior.steps=2", "checkpoint.every=50"]
        return prepare(load_run(None, flags, [*few, *sets]), storage)

    return make


def test_class_images_get_the_sizes_of_the_photos(prepared: Callable[..., Prepared]) -> None:
    plain, ours = prepared(), prepared("data.buckets=true")
    assert plain.run.prior.sizes == () and ours.run.prior.sizes == (HIGH, SQUARE, WIDE)
    assert len({plain.prior_key("cpu"), ours.prior_key("cpu")}) == 2 and plain.fingerprint != ours.fingerprint
    paths = {latent_path(run.base, run.subject_images()) for run in (plain, ours)}
    assert len(paths) == 2 and plain.photos == ours.photos
    assert bankable(ours.run, 1) == "data.buckets"
    with pytest.raises(UserError, match=r"fewer than the sizes of the photos\. 8x24, 16x16, 24x8"):
        prepared("data.buckets=true", "prior.num_images=2")
    with pytest.raises(UserError, match=r"prior\.sizes is not that of the photos"):
        prepared("prior.sizes=[[24, 8]]")
    taught = ["data.buckets=true", "prior.target=base"]
    assert prepared(*taught, "data.holdout=1").run.data.holdout == 1
    with pytest.raises(UserError, match="held out have a size of their own"):
        prepared(*taught, "data.holdout=2")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_class_images_are_drawn_and_all_is_encoded_in_its_size(
    prepared: Callable[..., Prepared], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pictures of several sizes go from tasks to actors
    monkeypatch.setattr("training.stream.SHARDS_PER_READER", 1)
    one = prepared("data.buckets=true")
    prior, key = one.run.prior, one.prior_key("cpu")
    assert key is not None and draw_prior(storage, one.base, prior, "dog", Pool()) == 6
    drawn = [decode_png(png) for png in prior_pngs(storage, key, 6)]
    assert [image.shape[1::-1] for image in drawn] == [HIGH, SQUARE, WIDE] * 2
    assert prior_key(one.base, prior.model_copy(update={"sizes": ()}), "dog") != key
    images = [one.subject_images(), prior_images(storage, key, 6)]
    encode(storage, one.base, images, Pool())
    subject, of_class = (latent_table(latent_refs(storage, one.base, each)) for each in images)
    assert subject is not None and of_class is not None
    assert [row.shape for row in subject.mean] == [(4, 4, 12), (4, 8, 8), (4, 12, 4), (4, 12, 4)]
    assert [row.shape for row in of_class.std] == [(4, 12, 4), (4, 8, 8), (4, 4, 12)] * 2
    [some] = fetch(latent_refs(storage, one.base, images[1], limit=2))
    assert [row.shape for row in some["mean"]] == [(4, 12, 4), (4, 8, 8)]


def test_images_of_several_sizes_come_out_as_each_alone(tiny_base: Path) -> None:
    drawer = Drawer(open_base(str(tiny_base)), device="cpu")
    asked = [
        DrawRequest("a dog", seed, steps=2, width=width, height=height)
        for seed, (width, height) in enumerate((WIDE, SQUARE, HIGH, WIDE))
    ]
    together = drawer.draw(asked)
    assert [image.shape[1::-1] for image in together] == [WIDE, SQUARE, HIGH, WIDE]
    assert all(
        np.array_equal(drawer.draw([one])[0], image) for one, image in zip(asked, together, strict=True)
    )


def rows_of(seed: int, *sizes: tuple[int, int]) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    mean = [
        generator.standard_normal((4, height // 2, width // 2), dtype=np.float32) for width, height in sizes
    ]
    return {"mean": mean, "std": [np.full_like(row, 0.1) for row in mean]}


@pytest.mark.parametrize("sections", [{}, {"prior": {"target": "base"}}, {"prior": {"weight": 0.0}}])
def test_a_run_in_buckets_is_trained_on_batches_of_one_size(
    sections: dict[str, Any],
    make_job: Callable[..., Lease],
    resident: ResidentBase,
    alone: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = {"steps": 8, "pairs_per_step": 2, "objective": {"offset_noise": 0.1, "input_perturbation": 0.1}}
    job = make_job(
        "rex",
        train=train,
        data={"buckets": True},
        validate={"every": 4, "samples": 5, "prompts": []},
        **sections,
    )
    masks = [np.ones(row.shape[1:], np.float32) for row in rows_of(1, WIDE, SQUARE, HIGH)["mean"]]
    of_class = [rows_of(2, HIGH, SQUARE), rows_of(3, WIDE, HIGH)] if not sections else []
    job = replace(
        job,
        subject_latents=[rows_of(1, WIDE, SQUARE, HIGH)],
        class_latents=of_class,
        masks=masks,
        sample_ids=(),
    )
    batches = Batches.of(job, resident.info, torch.device("cpu"), 0, 1)
    shapes = []
    for step in range(6):
        [batch] = batches.of_step(step)
        shapes.append(tuple(batch.latents.shape[2:]))
        assert (
            batch.mask is not None
            and batch.mask.shape[2:] == batch.latents.shape[2:] == batch.noise.shape[2:]
        )
    assert Counter(shapes) == {(4, 12): 2, (8, 8): 2, (12, 4): 2}
    done = alone(job)
    assert done["metrics"]["validation_loss"] > 0, done
    assert sum(len(payload) for kind, payload in done["events"] if kind == "steps") == 8


@pytest.mark.slow
def test_two_workers_have_the_losses_of_one(
    make_job: Callable[..., Lease], alone: Callable[..., Any], pair: Any
) -> None:
    train = {"method": "full", "steps": 6, "lr": 1e-4, "pairs_per_step": 3}
    sections = {"train": train, "data": {"buckets": True}, "validate": {"every": 3, "samples": 5}}

    def losses(name: str, workers: Callable[..., Any], **more: Any) -> list[float]:
        job = replace(
            make_job(name, **sections, **more),
            subject_latents=[rows_of(1, WIDE, SQUARE, HIGH)],
            class_latents=[rows_of(2, HIGH, SQUARE), rows_of(3, WIDE, HIGH)],
            sample_ids=(),
        )
        done = workers(job)
        events = (done[0] if isinstance(done, list) else done)["events"]
        rows = [row for kind, said in events if kind == "steps" for row in said]
        rows += [said for kind, said in events if kind == "validation"]
        return [row[key] for row in rows for key in ("loss_subject", "loss_class")]

    one, two = losses("one", alone), losses("two", pair, engine={"zero_stage": 3})
    assert len(one) == 2 * (6 + 2) and np.allclose(one, two, atol=1e-5)


def test_a_size_that_the_class_lacks_is_said(
    make_job: Callable[..., Lease], resident: ResidentBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.lease.fetch", list)
    job = replace(
        make_job("rex"), subject_latents=[rows_of(1, WIDE, SQUARE)], class_latents=[rows_of(2, SQUARE)]
    )
    with pytest.raises(SystemFailure, match="lack a size"):
        Batches.of(job, resident.info, torch.device("cpu"), 0, 1)
