"""This file is where prior sets are made: images that the pristine base draws of a class, shared by everybody.

A set is addressed by what decides its pixels and not by its size, so a larger request draws only what is missing, and
every subject of a class, whoever trains it, uses the same images.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from typing import Any

from cluster.errors import UserError
from cluster.storage import MANIFEST, Storage, sha256
from training.latents import ImageSet, Shard
from training.pipeline import BaseInfo
from training.prompt import render_prompt
from training.recipe import Data, Prior
from training.request import FORWARD_ROWS
from training.stream import Pool, draw_pngs

SHARD = 32  # images a Parquet shard holds: what is lost at most when drawing is interrupted
SEED_SCHEME = "sha256(seed:index)[:6]"


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` of a set, below 2**48: the same whoever draws it, in whatever company."""
    return int.from_bytes(bytes.fromhex(sha256(f"{seed}:{index}".encode())[:12]))


def prior_spec(base: BaseInfo, prior: Prior, class_noun: str, device: str = "cpu") -> dict[str, Any]:
    """Everything that decides the pixels of a prior set; `num_images` is not part of it."""
    return {
        "base": base.revision,
        "prompt": render_prompt(prior.prompt, class_noun, None),
        "negative_prompt": prior.negative_prompt,
        "sampler": prior.sampler,
        "steps": prior.steps,
        "guidance": prior.guidance,
        "image_size": base.image_size,
        "seed": prior.seed,
        "seed_scheme": SEED_SCHEME,
        **({"sizes": [list(size) for size in prior.sizes]} if prior.sizes else {}),
        "dtype": "float32",
        "device": device,
        "width": FORWARD_ROWS[device],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def prior_key(base: BaseInfo, prior: Prior, class_noun: str, device: str = "cpu") -> str:
    """The address of a prior set, 16 hex digits."""
    spec = prior_spec(base, prior, class_noun, device)
    return sha256(json.dumps(spec, sort_keys=True).encode())[:16]


def size_of(prior: Prior, index: int) -> dict[str, int]:
    """`width` and `height` of image `index` of a set, where they are not the base's: its sizes take turns."""
    if not prior.sizes:
        return {}
    return dict(zip(("width", "height"), prior.sizes[index % len(prior.sizes)], strict=True))


def prior_path(key: str) -> str:
    """Where a prior set lies under the root."""
    return f"priors/{key}"


def prior_count(storage: Storage, key: str) -> int:
    """Images of a prior set that are drawn and stored."""
    manifest = storage.manifest(prior_path(key))
    return int(manifest["count"]) if manifest else 0


def prior_images(storage: Storage, key: str, limit: int) -> ImageSet:
    """The shards that hold the first `limit` images of a stored set."""
    path = prior_path(key)
    used = {
        entry["name"]: Shard(f"{path}/{entry['name']}", entry["sha256"], entry["count"])
        for entry in _entries(storage, key, limit)
    }
    spec = storage.read_json(f"{path}/{MANIFEST}")["spec"]
    return ImageSet(key, used, Data(buckets=bool(spec.get("sizes"))))


def prior_pngs(storage: Storage, key: str, limit: int) -> Iterator[bytes]:
    """The first `limit` images of a stored set as PNG bytes, checked against the manifest."""
    for entry in _entries(storage, key, limit):
        rows = storage.read_rows(f"{prior_path(key)}/{entry['name']}", entry["sha256"])
        yield from rows["png"][: limit - entry["first"]]


def _entries(storage: Storage, key: str, limit: int) -> list[dict[str, Any]]:
    """The manifest's entries of the shards that hold the first `limit` images."""
    shards = storage.read_json(f"{prior_path(key)}/{MANIFEST}")["shards"]
    return [entry for entry in shards if entry["first"] < limit]


def draw_prior(
    storage: Storage,
    base: BaseInfo,
    prior: Prior,
    class_noun: str,
    pool: Pool,
    on_image: Callable[[], None] = lambda: None,
    on_wait: Callable[[], None] = lambda: None,
) -> int:
    """Draw what is missing of one prior set; returns the number of images drawn. See `draw_priors`."""
    drawn: list[int] = []
    asked = [(prior, class_noun)]
    draw_priors(
        storage, base, asked, pool, on_image, lambda _: on_wait(), lambda _, images: drawn.append(images)
    )
    return drawn[0]


def draw_priors(
    storage: Storage,
    base: BaseInfo,
    asked: Sequence[tuple[Prior, str]],
    pool: Pool,
    on_image: Callable[[], None] = lambda: None,
    on_wait: Callable[[int], None] = lambda number: None,
    on_set: Callable[[int, int], None] = lambda number, images: None,
) -> None:
    """Draw what is missing of prior sets, all in one pipeline; two callers that need the same set draw it once.

    Sets that others are drawing at the moment come last.

    Args:
        storage: Where sets are kept.
        base: The pristine base.
        asked: What to draw, with `num_images`, how many, and the class; every set once.
        pool: Actors to draw with.
        on_image: Called after every image.
        on_wait: Called with the index of a set that another process is drawing, before waiting for it.
        on_set: Called with the index of a set that is whole, and how many images of it were drawn here.
    """
    busy: list[int] = []
    with ExitStack() as locks:
        mine: list[_Set] = []
        for number, (prior, noun) in enumerate(asked):
            wanted = _Set(number, storage, base, prior, noun, pool.device)
            if wanted.have() == prior.num_images:
                on_set(number, 0)
                continue
            try:
                locks.enter_context(storage.lock_or_refuse(wanted.lock, UserError("busy")))
                mine.append(wanted)
            except UserError:
                busy.append(number)
        _draw(base, mine, pool, on_image, on_set)
    for number in busy:
        wanted = _Set(number, storage, base, *asked[number], pool.device)
        with storage.lock(wanted.lock, partial(on_wait, number)):
            _draw(base, [wanted], pool, on_image, on_set)


def _draw(
    base: BaseInfo,
    sets: Sequence["_Set"],
    pool: Pool,
    on_image: Callable[[], None],
    on_set: Callable[[int, int], None],
) -> None:
    """Draw the missing images of sets whose locks are held."""
    places: list[tuple[_Set, int]] = []
    requests: list[dict[str, Any]] = []
    for wanted in sets:
        rows = wanted.missing()
        if not rows:
            on_set(wanted.number, 0)
        for row in rows:
            places.append((wanted, row["index"]))
            requests.append({**row, "index": len(requests)})
    for row in draw_pngs(base, requests, pool, FORWARD_ROWS[pool.device]):
        wanted, index = places[int(row["index"])]
        wanted.take({"index": index, "png": row["png"]})
        on_image()
        if index + 1 == wanted.prior.num_images:
            on_set(wanted.number, wanted.drawn)


class _Set:
    """A prior set that is being drawn."""

    def __init__(
        self, number: int, storage: Storage, base: BaseInfo, prior: Prior, noun: str, device: str
    ) -> None:
        self.number, self.prior, self.drawn = number, prior, 0
        self._storage, self._base, self._noun = storage, base, noun
        self._spec = prior_spec(base, prior, noun, device)
        self._key = prior_key(base, prior, noun, device)
        self._shard: list[dict[str, Any]] = []
        self._manifest: dict[str, Any] = {}

    @property
    def lock(self) -> str:
        """Whoever draws it holds this."""
        return f"locks/prior-{self._key}"

    def have(self) -> int:
        """Images that are there, of those that are wanted."""
        return min(prior_count(self._storage, self._key), self.prior.num_images)

    def missing(self) -> list[dict[str, Any]]:
        """Requests for the images that are not there. The lock is held."""
        self._manifest = self._storage.manifest(prior_path(self._key)) or {
            "kind": "raybooth-prior",
            "model": self._base.model,
            "class": self._noun,
            "spec": self._spec,
            "count": 0,
            "shards": [],
        }
        prior = self.prior
        return [
            {
                "index": index,
                "prompt": self._spec["prompt"],
                "seed": image_seed(prior.seed, index),
                "negative_prompt": prior.negative_prompt,
                "steps": prior.steps,
                "guidance": prior.guidance,
                "sampler": prior.sampler,
                **size_of(prior, index),
            }
            for index in range(int(self._manifest["count"]), prior.num_images)
        ]

    def take(self, row: dict[str, Any]) -> None:
        """The next image."""
        self._shard.append(row)
        self.drawn += 1
        last = int(row["index"]) + 1
        if last % SHARD == 0 or last == self.prior.num_images:
            _write_shard(self._storage, prior_path(self._key), self._manifest, self._shard, self.prior.seed)
            self._shard = []


def _write_shard(
    storage: Storage, path: str, manifest: dict[str, Any], rows: list[dict[str, Any]], seed: int
) -> None:
    """Add `rows` as a shard and replace the manifest, which goes last."""
    indices = [int(row["index"]) for row in rows]
    # its last index too: where there are no locks, another writer may cut its shards elsewhere
    name = f"images-{indices[0]:06d}-{indices[-1]:06d}.parquet"
    digest = storage.write_rows(
        f"{path}/{name}",
        {
            "index": indices,
            "seed": [image_seed(seed, index) for index in indices],
            "png": [bytes(row["png"]) for row in rows],
        },
    )
    manifest["shards"].append({"name": name, "first": indices[0], "count": len(rows), "sha256": digest})
    manifest["count"] = indices[-1] + 1
    storage.write_json(f"{path}/{MANIFEST}", manifest)
