"""This file is where latents lie: those of a set of images under an address of the images, the crops and the VAE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.mailbox import put
from cluster.storage import MANIFEST, Storage, sha256
from training.pipeline import BaseInfo
from training.recipe import Data

LATENT_FORMAT = 1  # of the rows below; part of the key, so that a change makes new sets


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


def latent_path(base: BaseInfo, images: ImageSet) -> str:
    """Where the latents of a set lie under the root; the same images, crops and VAE give the same place."""
    data = images.data
    # what came later changes no place where it is not used
    later = {name for name in ("color", "rotate", "buckets") if not getattr(data, name)}
    parts = (LATENT_FORMAT, base.revision, images.key, data.model_dump_json(exclude=later))
    return f"latents/{sha256(repr(parts).encode())[:16]}"


def missing_shards(storage: Storage, base: BaseInfo, images: ImageSet) -> list[str]:
    """Names of the shards of a set that were not encoded yet, or that hold other bytes since, in order."""
    manifest = storage.manifest(latent_path(base, images)) or {"shards": {}}
    sources = {name: entry.get("source") for name, entry in manifest["shards"].items()}
    return [name for name, shard in sorted(images.shards.items()) if sources.get(name) != shard.sha256]


def missing_images(storage: Storage, base: BaseInfo, images: ImageSet) -> int:
    """How many images of a set `encode` would encode."""
    return sum(images.shards[name].images for name in missing_shards(storage, base, images))


def write_latents(
    storage: Storage, base: BaseInfo, images: ImageSet, name: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Keep the latents of one shard of a set, and say so in the set's manifest.

    Args:
        storage: Root that takes them.
        base: The base they were encoded with.
        images: The set.
        name: The shard.
        rows: `row`, and `mean` and `std`, float32 [C, h, w], of every image of the shard.
    """
    path = latent_path(base, images)
    shapes = [list(np.asarray(row["mean"]).shape) for row in rows]
    one = all(shape == shapes[0] for shape in shapes)
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
            **({"shape": shapes[0]} if one else {"shapes": shapes}),
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
        References to `{"mean": float32 [N, C, h, w], "std": float32 [N, C, h, w]}`, unscaled; where sizes differ, to
        lists of N arrays.
    """
    path, left, refs = latent_path(base, images), limit, []
    manifest = storage.read_json(f"{path}/{MANIFEST}")
    for name in sorted(images.shards):
        if left == 0:
            break
        entry = manifest["shards"][name]
        rows = storage.read_rows(f"{path}/{name}", entry["sha256"])
        arrays = {key: _arrays(rows[key][:left], entry) for key in ("mean", "std")}
        refs.append(put(arrays))
        left = None if left is None else left - len(arrays["mean"])
    return refs


def _arrays(rows: Sequence[bytes], entry: Mapping[str, Any]) -> Any:
    """Rows of a shard as one array, or as a list of arrays of their own sizes."""
    if "shape" in entry:
        return np.frombuffer(b"".join(rows), dtype="<f4").reshape(-1, *entry["shape"])
    shapes = entry["shapes"][: len(rows)]
    return [np.frombuffer(row, dtype="<f4").reshape(shape) for row, shape in zip(rows, shapes, strict=True)]
