"""This file is where Ray Data enters: rows flow through actors that keep their model loaded.

Rows come out in the order they went in, whatever the number of actors, so that what is written does not depend on
the size of the cluster.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import SystemException
from ray.exceptions import RayError

from cluster.errors import RayboothError, SystemFailure
from cluster.mailbox import put
from cluster.storage import MANIFEST, Storage, sha256
from training.pipeline import BaseInfo
from training.recipe import Data
from training.resident import DrawWorker, EncodeWorker, ReadImages

Row = dict[str, Any]
LATENT_FORMAT = 1  # of the rows below; part of the key, so that a change makes new sets


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


@dataclass(frozen=True)
class Shard:
    """One Parquet file of PNGs."""

    path: str
    """Under the root."""
    sha256: str
    images: int
    """Training images that it gives, every variant of its pictures counted."""


@dataclass(frozen=True)
class ImageSet:
    """Images to encode, in shards by name."""

    key: str
    shards: Mapping[str, Shard]
    data: Data


@contextmanager
def _streaming() -> Iterator[None]:
    """Ray Data in order, without its own progress bars and logs, and with our errors instead of Ray's.

    Raises:
        RayboothError: What a worker raised.
        SystemFailure: A worker failed otherwise.
    """
    context = DataContext.get_current()
    before = (context.execution_options.preserve_order, context.enable_progress_bars)
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
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before


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
        dataset = ray.data.from_items(list(rows), override_num_blocks=ceil(len(rows) / batch_size))
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
    artifact: tuple[str, str, str] | None = None,
) -> Iterator[Row]:
    """Images of `requests` (each `index` and the fields of a `DrawRequest`) as rows of `index` and `png`.

    Args:
        base: The base to draw with.
        requests: What to draw.
        pool: Number and size of the actors.
        width: The drawer's width: images per forward.
        artifact: Storage URI, subject and version to draw with; `None` is the pristine base.
    """
    arguments = _worker_arguments(base, pool)
    if artifact:
        arguments |= dict(zip(("storage_uri", "name", "version"), artifact, strict=True))
    return map_resident(requests, DrawWorker, arguments, pool, width)


def _worker_arguments(base: BaseInfo, pool: Pool) -> dict[str, Any]:
    return {"model": base.model, "revision": base.revision, "device": pool.device}


def latent_path(base: BaseInfo, images: ImageSet) -> str:
    """Where the latents of a set lie under the root; the same images, crops and VAE give the same place."""
    parts = (LATENT_FORMAT, base.revision, images.key, images.data.model_dump_json())
    return f"latents/{sha256(repr(parts).encode())[:16]}"


def missing_shards(storage: Storage, base: BaseInfo, images: ImageSet) -> list[str]:
    """Names of the shards of a set that were not encoded yet, or that hold other bytes since, in order."""
    manifest = storage.manifest(latent_path(base, images)) or {"shards": {}}
    sources = {name: entry.get("source") for name, entry in manifest["shards"].items()}
    return [name for name, shard in sorted(images.shards.items()) if sources.get(name) != shard.sha256]


def missing_images(storage: Storage, base: BaseInfo, images: ImageSet) -> int:
    """How many images of a set `encode` would encode."""
    return sum(images.shards[name].images for name in missing_shards(storage, base, images))


def encode(
    storage: Storage,
    base: BaseInfo,
    sets: Sequence[ImageSet],
    pool: Pool,
    on_image: Callable[[], None] = lambda: None,
) -> None:
    """Encode what is missing of every set in one pipeline: read and cut in tasks, encode in an actor pool.

    Args:
        storage: Root that holds the images and takes the latents.
        base: Its VAE encodes; frozen, eval, inference mode.
        sets: Photos and class images of any number of subjects.
        pool: Number and size of the encoding actors.
        on_image: Called after every image.

    Raises:
        RayboothError: What a worker raised, such as a damaged shard.
        SystemFailure: A worker failed otherwise.
    """
    shards = [
        {
            "set": number,
            "shard": name,
            "path": images.shards[name].path,
            "sha256": images.shards[name].sha256,
            "image_size": base.image_size,
            "data": images.data.model_dump_json(),
        }
        for number, images in enumerate(sets)
        for name in missing_shards(storage, base, images)
    ]
    if not shards:
        return
    with _streaming():
        pixels = ray.data.from_items(shards, override_num_blocks=len(shards)).flat_map(
            ReadImages(storage.uri), num_cpus=1
        )
        arguments = _worker_arguments(base, pool)
        done: dict[tuple[int, str], list[Row]] = {}
        current: tuple[int, str] | None = None
        for row in _map_actors(pixels, EncodeWorker, arguments, pool, batch_size=8).iter_rows():
            shard = (int(row["set"]), str(row["shard"]))
            if current not in (None, shard):  # rows keep their order, so the one before is whole
                _write_shard(storage, base, sets[current[0]], current[1], done.pop(current))
            current = shard
            done.setdefault(shard, []).append(row)
            on_image()
        for (number, name), rows in done.items():
            _write_shard(storage, base, sets[number], name, rows)


def _write_shard(storage: Storage, base: BaseInfo, images: ImageSet, name: str, rows: list[Row]) -> None:
    path = latent_path(base, images)
    shape = np.asarray(rows[0]["mean"]).shape
    digest = storage.write_rows(
        f"{path}/{name}",
        {
            "row": [int(row["row"]) for row in rows],
            "mean": [np.asarray(row["mean"], dtype="<f4").tobytes() for row in rows],
            "std": [np.asarray(row["std"], dtype="<f4").tobytes() for row in rows],
        },
    )
    with storage.lock(f"locks/latents-{path.rpartition('/')[2]}"):
        manifest = storage.manifest(path) or {
            "kind": "raybooth-latents",
            "base": {"model": base.model, "revision": base.revision},
            "images": images.key,
            "data": images.data.model_dump(),
            "shards": {},
        }
        manifest["shards"][name] = {
            "sha256": digest,
            "source": images.shards[name].sha256,
            "count": len(rows),
            "shape": list(shape),
        }
        storage.write_json(f"{path}/{MANIFEST}", manifest)


def latent_refs(storage: Storage, base: BaseInfo, images: ImageSet, limit: int | None = None) -> list[Any]:
    """The latents of an encoded set as references into Ray's object store, one a shard, in order.

    Args:
        storage: Root that holds the latents.
        base: The base they were encoded with.
        images: The set.
        limit: Use the first `limit` images; `None` uses all.

    Returns:
        References to `{"mean": float32 [N, C, h, w], "std": float32 [N, C, h, w]}`, unscaled.
    """
    path, left, refs = latent_path(base, images), limit, []
    manifest = storage.read_json(f"{path}/{MANIFEST}")
    for name in sorted(images.shards):
        if left == 0:
            break
        entry = manifest["shards"][name]
        rows = storage.read_rows(f"{path}/{name}", entry["sha256"])
        shape = (-1, *entry["shape"])
        arrays = {
            key: np.frombuffer(b"".join(rows[key][:left]), dtype="<f4").reshape(shape)
            for key in ("mean", "std")
        }
        refs.append(put(arrays))
        left = None if left is None else left - len(arrays["mean"])
    return refs
