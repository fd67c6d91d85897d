"""This file is where the models live that a Ray Data actor keeps loaded: one encodes, one draws.

N images, C latent channels, h w latent size, S image size in pixels.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cluster.errors import RayboothError, failure_of
from cluster.objects import failure_about
from cluster.storage import Storage
from training.artifact import open_artifact
from training.draw import Drawer
from training.imports import forgo
from training.pipeline import encode_image, load_vae, open_base
from training.png import Finish, encode_png
from training.reading import ReadImages, error_text
from training.request import DrawRequest

Batch = dict[str, Any]


class EncodeWorker:
    """The frozen VAE of one base: pixels to the mean and standard deviation of their latents.

    Encodes one image at a time, so that a latent's bits do not depend on what was encoded with it.
    """

    def __init__(self, model: str, revision: str | None, device: str) -> None:
        forgo(only_vae=True)
        self.device = device
        self.vae = load_vae(open_base(model, revision)).to(self.device)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Batch:
        """Adds `mean`, `std` (float32 [C, h, w], unscaled) to each row and drops the pixels."""
        means, stds = [], []
        for pixels in batch["pixels"]:
            image = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device).permute(2, 0, 1)[None]
            mean, std = encode_image(self.vae, image.float() / 127.5 - 1.0)
            means.append(mean[0].cpu().numpy())
            stds.append(std[0].cpu().numpy())
        kept = {key: batch[key] for key in ("set", "shard", "row", "error")}
        return {**kept, "mean": _column(means), "std": _column(stds)}


class EncodeShards:
    """Reads shards and encodes what it has read: where they are few, a process of their own for reading costs more."""

    def __init__(
        self, model: str, revision: str | None, device: str, storage_uri: str, refuse: bool, rows: int
    ) -> None:
        self.read, self.encode = ReadImages(storage_uri, refuse), EncodeWorker(model, revision, device)
        self.rows = rows

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """One shard, as `ReadImages` takes it, to batches of at most `rows` rows, as `EncodeWorker` gives them."""
        read = self.read({key: column[0] for key, column in batch.items()})
        for start in range(0, len(read), self.rows):
            part = read[start : start + self.rows]
            columns = {key: np.array([row[key] for row in part]) for key in part[0] if key != "pixels"}
            yield self.encode({**columns, "pixels": [row["pixels"] for row in part]})


def _column(arrays: list[Any]) -> Any:
    """Arrays as a column: stacked, or where sizes differ each by itself."""
    if all(array.shape == arrays[0].shape for array in arrays):
        return np.stack(arrays)
    column = np.empty(len(arrays), dtype=object)
    column[:] = arrays
    return column


class DrawWorker:
    """A `Drawer` of one base that wears one subject after another; a subject that cannot be worn fails alone."""

    def __init__(
        self,
        model: str,
        revision: str | None,
        device: str,
        width: int,
        storage_uri: str,
        finish: Finish = encode_png,
    ) -> None:
        forgo()
        self.drawer = Drawer(open_base(model, revision), device=device, width=width)
        self.storage_uri = storage_uri
        self.finish = finish
        self.worn = ("", "")
        self.failed: dict[tuple[str, str], str] = {}  # a damaged artifact is not read again for every batch

    def __call__(self, batch: Batch) -> Batch:
        """Groups of one subject each, `name, version, label, requests`, to rows of `index, png, error`.

        `requests` is JSON: a list of the fields of a `DrawRequest` and an `index`. `label` is what the PNG says it
        shows; empty writes nothing into it. `error` is empty or JSON of the error, and then `png` is empty.
        """
        rows: list[tuple[int, bytes, str]] = []
        groups = (map(str, batch[key]) for key in ("name", "version", "label", "requests"))
        for name, version, label, requests in zip(*groups, strict=True):
            asked = json.loads(requests)
            indices = [request.pop("index") for request in asked]
            try:
                pngs = self._draw(name, version, label, [DrawRequest(**request) for request in asked])
                rows += [(index, png, "") for index, png in zip(indices, pngs, strict=True)]
            except RayboothError as error:
                rows += [(index, b"", error_text(error)) for index in indices]
        return {key: [row[i] for row in rows] for i, key in enumerate(("index", "png", "error"))}

    def _draw(self, name: str, version: str, label: str, requests: list[DrawRequest]) -> list[bytes]:
        self._wear(name, version)
        by = (label, self.drawer.base.revision, self.drawer.artifact)
        return [
            self.finish(image, request.parameters(*by)) if label else encode_png(image, None)
            for request, image in zip(requests, self.drawer.draw(requests), strict=True)
        ]

    def _wear(self, name: str, version: str) -> None:
        subject = (name, version)
        if subject in self.failed:
            raise failure_of(json.loads(self.failed[subject]))
        if subject == self.worn:
            return
        self.worn = ("?", "")  # until it fits
        try:
            if name:
                with open_artifact(Storage(self.storage_uri), name, version) as artifact:
                    self.drawer.wear(artifact.folder, artifact.manifest)
            else:
                self.drawer.wear(None)
        except (
            Exception
        ) as error:  # a loader may raise anything, and one bad subject does not stop the others
            failure = failure_about(f"{name} {version} cannot be loaded", error, "train it again")
            self.failed[subject] = error_text(failure)
            raise failure_of(json.loads(self.failed[subject])) from error
        self.worn = subject
