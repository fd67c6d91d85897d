"""This file is where Ray Data enters: rows flow through actors that keep their model loaded.

Rows come out in the order they went in, whatever the number of actors, so that what is written does not depend on
the size of the cluster.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import SystemException
from ray.exceptions import RayError

from cluster.errors import RayboothError, SystemFailure, failure_of
from cluster.storage import Storage
from training.buckets import bucket_step
from training.household import keep_house
from training.latents import ImageSet, latent_path, missing_shards, write_latents
from training.pipeline import BaseInfo
from training.png import Finish, encode_png
from training.reading import ReadImages
from training.resident import DrawWorker, EncodeShards, EncodeWorker

SHARDS_PER_READER = 64  # a process that read 9 of them took 2.8 CPU s, nearly all of it to start
ROWS = 8  # that are encoded by one call
Row = dict[str, Any]
MOST_BLOCKS = 4000  # of one stream: Ray Data keeps each of them in the object store from the start
_WHO = ("name", "version", "label")  # of a request to draw: what an actor draws alone, one after the other


@dataclass(frozen=True)
class Pool:
    """How many actors of what size a stage of the stream may use."""

    actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def device(self) -> str:
        """What its actors compute on: `cuda` or `cpu`."""
        return "cuda" if self.gpus else "cpu"


@contextmanager
def _streaming() -> Iterator[None]:
    """Ray Data in order, without its own progress bars and logs, and with our errors instead of Ray's.

    Raises:
        RayboothError: What a worker raised.
        SystemFailure: A worker failed otherwise.
    """
    keep_house()
    context = DataContext.get_current()  # set for good: threads of a driver may stream at the same time
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # Ray's wrapper loses its cause on the way here
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # an error is raised, and need not be logged too
    try:
        yield
    except (RayError, SystemException) as error:
        cause = _cause(error)
        if isinstance(cause, RayboothError):
            raise cause from None
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
        # below the message of an error that it carries Ray writes advice; an error of its own ends with the cause
        seen = lines[-1] if cause is error else f"{type(cause).__name__}: {lines[0]}"
        raise SystemFailure(
            "a worker of the stream failed", seen, "run the same command again: what is done stays done"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """The worker's error that Ray's `error` carries, or `error`; Ray keeps it in `cause`, Python in `__cause__`."""
    chain = [error]
    for link in chain:  # grows as it is walked
        if not isinstance(link, (RayError, SystemException)):
            return link
        causes = (getattr(link, "cause", None), link.__cause__)
        chain += [cause for cause in causes if isinstance(cause, BaseException) and cause not in chain]
    return error


def map_resident(
    rows: Sequence[Row], worker: type, arguments: Mapping[str, Any], pool: Pool, batch_size: int
) -> Iterator[Row]:
    """`rows` through a pool of actors that each construct `worker(**arguments)` once.

    Args:
        rows: Plain rows, all with the same keys.
        worker: A class whose call takes and returns a batch of columns.
        arguments: What its constructor takes.
        pool: Number and size of the actors.
        batch_size: Rows a call gets at most.

    Yields:
        Result rows, in the order of `rows`, as soon as they are there.

    Raises:
        RayboothError: What a worker raised.
        SystemFailure: A worker failed otherwise.
    """
    if not rows:
        return
    with _streaming():
        batches = ceil(len(rows) / batch_size)
        blocks = min(batches, MOST_BLOCKS)
        pool = replace(pool, actors=min(pool.actors, batches))  # more would find nothing to do
        dataset = ray.data.from_items(list(rows), override_num_blocks=blocks)
        yield from _map_actors(dataset, worker, arguments, pool, batch_size).iter_rows()


def _map_actors(dataset: Any, worker: type, arguments: Mapping[str, Any], pool: Pool, batch_size: int) -> Any:
    return dataset.map_batches(
        worker,
        fn_constructor_kwargs=dict(arguments),
        batch_size=batch_size,
        compute=ActorPoolStrategy(size=pool.actors),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )


def draw_pngs(
    base: BaseInfo,
    requests: Sequence[Row],
    pool: Pool,
    width: int,
) -> Iterator[Row]:
    """Images of the pristine base as rows of `index` and `png`.

    Args:
        base: The base to draw with.
        requests: What to draw, each `index` and the fields of a `DrawRequest`.
        pool: Number and size of the actors.
        width: The drawer's width: images per forward.
    """
    for row in draw_grouped(base, requests, pool, width):
        if row["error"]:
            raise failure_of(json.loads(row["error"]))
        yield row


def draw_grouped(
    base: BaseInfo,
    requests: Sequence[Row],
    pool: Pool,
    width: int,
    storage_uri: str = "",
    finish: Finish = encode_png,
) -> Iterator[Row]:
    """Images of many subjects in one pipeline, whose actors keep the base and load each subject at most once.

    Args:
        base: What all subjects were trained from.
        requests: What to draw, each `index` and the fields of a `DrawRequest`, and `name` and `version` of a published
            artifact; without a name the pristine base draws. `label` is what the PNG says it shows.
        pool: Number and size of the actors.
        width: The drawer's width: images per forward.
        storage_uri: Root that holds the artifacts.
        finish: Makes the PNGs that say what they show.

    Yields:
        Rows of `index`, `png` and `error`, subject by subject in the order of their first requests, and each subject's
        in order. A subject that cannot be drawn has an empty `png` and as `error` what `failure_of` makes of JSON.

    Raises:
        SystemFailure: A worker failed otherwise.
    """
    subjects: dict[tuple[str, ...], list[Row]] = {}
    for request in requests:
        who = tuple(str(request.get(key, "")) for key in _WHO)
        subjects.setdefault(who, []).append({k: v for k, v in request.items() if k not in _WHO})
    groups = [
        {**dict(zip(_WHO, who, strict=True)), "requests": json.dumps(asked[start : start + width])}
        for who, asked in subjects.items()
        for start in range(0, len(asked), width)
    ]
    arguments = {
        **_worker_arguments(base, pool),
        "width": width,
        "storage_uri": storage_uri,
        "finish": finish,
    }
    yield from map_resident(groups, DrawWorker, arguments, pool, 1)


def _worker_arguments(base: BaseInfo, pool: Pool) -> dict[str, Any]:
    return {"model": base.model, "revision": base.revision, "device": pool.device}


def encode(
    storage: Storage,
    base: BaseInfo,
    sets: Sequence[ImageSet],
    pool: Pool,
    on_image: Callable[[], None] = lambda: None,
    on_set: Callable[[int], None] = lambda number: None,
    on_error: Callable[[int, RayboothError], None] | None = None,
) -> None:
    """Encode what is missing of every set in one pipeline: read and cut in tasks, encode in an actor pool.

    Few shards are read by the actors themselves, as a process that reads has to start.

    Args:
        storage: Root that holds the images and takes the latents.
        base: Its VAE encodes; frozen, eval, inference mode.
        sets: Photos and class images of any number of subjects; one that is given twice is encoded once.
        pool: Number and size of the encoding actors.
        on_image: Called after every image.
        on_set: Called with the index in `sets` of a set as soon as all its latents are stored, at once when they are
            there already; sets are finished in their order.
        on_error: Called with the index of a set that has a damaged shard, once; the other sets go on. `None` raises.

    Raises:
        RayboothError: What a worker raised; without `on_error` also for a damaged shard.
        SystemFailure: A worker failed otherwise.
    """
    same: dict[str, list[int]] = {}  # by where their latents lie
    for number, images in enumerate(sets):
        same.setdefault(latent_path(base, images), []).append(number)
    left = {numbers[0]: missing_shards(storage, base, sets[numbers[0]]) for numbers in same.values()}
    twins = {numbers[0]: numbers for numbers in same.values()}
    failed: set[int] = set()

    def finish(number: int, name: str | None, rows: list[Row]) -> None:
        error = next((row["error"] for row in rows if row["error"]), "")
        if error and on_error:
            for twin in twins[number] if number not in failed else ():
                on_error(twin, failure_of(json.loads(error)))
            failed.add(number)
        elif name is not None:
            write_latents(storage, base, sets[number], name, rows)
            left[number].remove(name)
        if not left[number]:
            for twin in twins[number]:
                on_set(twin)

    shards = [
        {
            "set": number,
            "shard": name,
            "path": sets[number].shards[name].path,
            "sha256": sets[number].shards[name].sha256,
            "image_size": base.image_size,
            "bucket_step": bucket_step(base.image_size, base.vae_factor),
            "data": sets[number].data.model_dump_json(),
        }
        for number, names in left.items()
        for name in names
    ]
    for number, names in left.items():
        if not names:
            finish(number, None, [])
    if not shards:
        return
    with _streaming():
        rows: list[Row] = []
        for row in _encoded(storage, base, shards, pool, on_error is None).iter_rows():
            if rows and _shard(rows[0]) != _shard(row):  # rows keep their order, so the one before is whole
                finish(*_shard(rows[0]), rows)
                rows = []
            rows.append(row)
            if not row["error"]:
                on_image()
        finish(*_shard(rows[0]), rows)


def _encoded(storage: Storage, base: BaseInfo, shards: Sequence[Row], pool: Pool, refuse: bool) -> Any:
    """A dataset of the encoded rows of shards, in order."""
    rows_of = ray.data.from_items(list(shards), override_num_blocks=len(shards))
    arguments = _worker_arguments(base, pool)
    readers = ceil(len(shards) / SHARDS_PER_READER)
    if readers <= pool.actors:
        arguments |= {"storage_uri": storage.uri, "refuse": refuse, "rows": ROWS}
        return _map_actors(rows_of, EncodeShards, arguments, pool, 1)
    pixels = rows_of.flat_map(ReadImages(storage.uri, refuse), num_cpus=1, concurrency=readers)
    return _map_actors(pixels, EncodeWorker, arguments, pool, ROWS)


def _shard(row: Row) -> tuple[int, str]:
    return int(row["set"]), str(row["shard"])
