"""This file is where the models live that a Ray Data actor keeps loaded: one encodes, one draws.

N images, C latent channels, h w latent size, S image size in pixels.
"""

from typing import Any

import numpy as np
import torch

from cluster.storage import Storage
from training.artifact import open_artifact
from training.draw import Drawer, DrawRequest
from training.intake import crops
from training.pipeline import encode_image, load_vae, open_base
from training.png import encode_png
from training.recipe import Data

Batch = dict[str, Any]


class ReadImages:
    """Reads one Parquet shard of PNGs, checked against its sha256, and cuts each image into its variants.

    A photo gives every variant that `data` enumerates; a class image is square already and gives itself.
    """

    def __init__(self, storage_uri: str) -> None:
        self.storage_uri = storage_uri

    def __call__(self, shard: Batch) -> list[Batch]:
        """Rows `{set, shard, row, pixels uint8 [S, S, 3]}`, in the order of the shard and its variants."""
        rows = Storage(self.storage_uri).read_rows(shard["path"], shard["sha256"])
        data = Data.model_validate_json(shard["data"])
        cuts = [cut for png in rows["png"] for cut in crops(png, shard["image_size"], data)]
        return [
            {"set": shard["set"], "shard": shard["shard"], "row": row, "pixels": pixels}
            for row, pixels in enumerate(cuts)
        ]


class EncodeWorker:
    """The frozen VAE of one base: pixels to the mean and standard deviation of their latents.

    Encodes one image at a time, so that a latent's bits do not depend on what was encoded with it.
    """

    def __init__(self, model: str, revision: str | None, device: str) -> None:
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
        kept = {key: batch[key] for key in ("set", "shard", "row")}
        return {**kept, "mean": np.stack(means), "std": np.stack(stds)}


class DrawWorker:
    """A `Drawer` of the pristine base, or of one published artifact."""

    def __init__(
        self,
        model: str,
        revision: str | None,
        device: str,
        storage_uri: str = "",
        name: str = "",
        version: str = "",
    ) -> None:
        base = open_base(model, revision)
        if name:
            with open_artifact(Storage(storage_uri), name, version) as artifact:
                self.drawer = Drawer(base, artifact.folder, artifact.manifest, device=device)
        else:
            self.drawer = Drawer(base, device=device)

    def __call__(self, batch: Batch) -> Batch:
        """Rows of `index` and the fields of a `DrawRequest` to rows of `index` and `png` (bytes)."""
        columns = [key for key in batch if key != "index"]
        asked = [
            DrawRequest(**{key: _plain(batch[key][i]) for key in columns}) for i in range(len(batch["index"]))
        ]
        images = self.drawer.draw(asked)
        return {"index": batch["index"], "png": [encode_png(image, None) for image in images]}


def _plain(value: Any) -> Any:
    """A numpy scalar as the Python value it holds."""
    return value.item() if isinstance(value, np.generic) else value
