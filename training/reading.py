"""This file is where stored pictures are read for encoding. It imports no torch: the tasks that read start often."""

import json
from typing import Any

import numpy as np

from cluster.errors import RayboothError, SystemFailure
from cluster.objects import StorageError
from cluster.storage import Storage
from training.cuts import crops
from training.recipe import Data

Batch = dict[str, Any]


class ReadImages:
    """Reads one Parquet shard of PNGs, checked against its sha256, and cuts each image into its variants.

    A photo gives every variant that `data` enumerates; a class image is drawn as it is wanted and gives itself.
    """

    def __init__(self, storage_uri: str, refuse: bool = True) -> None:
        self.storage_uri, self.refuse = storage_uri, refuse

    def __call__(self, shard: Batch) -> list[Batch]:
        """Rows `{set, shard, row, pixels uint8 [height, width, 3], error}`, in the order of the shard and its variants.

        A shard that cannot be read raises, or without `refuse` gives one row of an empty picture whose `error` is
        JSON of the error.
        """
        kept = {"set": shard["set"], "shard": shard["shard"]}
        try:
            rows = self._read(shard)
        except RayboothError as error:
            if self.refuse:
                raise
            nothing = np.zeros((shard["image_size"],) * 2 + (3,), np.uint8)
            return [{**kept, "row": 0, "pixels": nothing, "error": error_text(error)}]
        data = Data.model_validate_json(shard["data"])
        size, step = shard["image_size"], shard["bucket_step"]
        cuts = [cut for png in rows["png"] for cut in crops(png, size, data, step)]
        return [{**kept, "row": row, "pixels": pixels, "error": ""} for row, pixels in enumerate(cuts)]

    def _read(self, shard: Batch) -> dict[str, list[Any]]:
        storage = Storage(self.storage_uri)
        try:
            return storage.read_rows(shard["path"], shard["sha256"])
        except FileNotFoundError as error:
            raise SystemFailure(
                f"{storage.full(shard['path'])} is missing",
                "its manifest names it",
                "delete its folder; it is made again",
            ) from error
        except StorageError as error:
            raise error.failure() from error


def error_text(error: RayboothError) -> str:
    """An error as JSON, which `failure_of` reads."""
    return json.dumps({**error.as_json(), "exit_code": error.exit_code})
