"""This file is where prior sets are made: images that the pristine base draws of a class, shared by everybody.

A set is addressed by what decides its pixels and not by its size, so a larger request draws only what is missing, and
every subject of a class, whoever trains it, uses the same images.
"""

import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from cluster.storage import MANIFEST, Storage, sha256
from training.draw import DRAW_WIDTH
from training.pipeline import BaseInfo
from training.prompt import render_prompt
from training.recipe import Data, Prior
from training.stream import ImageSet, Pool, Shard, draw_pngs

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
        "dtype": "float32",
        "device": device,
        "width": DRAW_WIDTH[device],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def prior_key(base: BaseInfo, prior: Prior, class_noun: str, device: str = "cpu") -> str:
    """The address of a prior set, 16 hex digits."""
    spec = prior_spec(base, prior, class_noun, device)
    return sha256(json.dumps(spec, sort_keys=True).encode())[:16]


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
    return ImageSet(key, used, Data())


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
    """Draw what is missing of a prior set; two callers that need the same set draw it once.

    Args:
        storage: Where sets are kept.
        base: The pristine base.
        prior: What to draw, and `num_images`, how many.
        class_noun: The class.
        pool: Actors to draw with.
        on_image: Called after every image.
        on_wait: Called when another process is drawing this set, before waiting for it.

    Returns:
        The number of images drawn, 0 when all were there.
    """
    spec = prior_spec(base, prior, class_noun, pool.device)
    key = prior_key(base, prior, class_noun, pool.device)
    path, drawn = prior_path(key), 0
    if prior_count(storage, key) >= prior.num_images:
        return 0
    with storage.lock(f"locks/prior-{key}", on_wait):
        have = prior_count(storage, key)
        manifest = storage.manifest(path) or {
            "kind": "raybooth-prior",
            "model": base.model,
            "class": class_noun,
            "spec": spec,
            "count": 0,
            "shards": [],
        }
        wanted = [
            {
                "index": index,
                "prompt": spec["prompt"],
                "seed": image_seed(prior.seed, index),
                "negative_prompt": prior.negative_prompt,
                "steps": prior.steps,
                "guidance": prior.guidance,
                "sampler": prior.sampler,
            }
            for index in range(have, prior.num_images)
        ]
        shard: list[dict[str, Any]] = []
        for row in draw_pngs(base, wanted, pool, DRAW_WIDTH[pool.device]):
            shard.append(row)
            drawn += 1
            on_image()
            last = int(row["index"])
            if (last + 1) % SHARD == 0 or last + 1 == prior.num_images:
                _write_shard(storage, path, manifest, shard, prior.seed)
                shard = []
    return drawn


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
