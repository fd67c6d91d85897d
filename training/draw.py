"""This file is where images are drawn one list after the other: of the pristine base, or of one artifact of it."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cluster.storage import Storage
from training.artifact import artifact_hash, open_artifact
from training.lease import Draw
from training.outfit import PLAIN
from training.pipeline import BaseInfo
from training.png import encode_png, grid
from training.request import DrawRequest
from training.studio import Row, Studio


class Drawer:
    """Draws images of the pristine base, or of one artifact of it after the other.

    Args:
        base: What is drawn with.
        artifact: Local folder of an artifact; `None` for the pristine base.
        manifest: The artifact's; its base must be `base`.
        device: `cpu`, `cuda`, or `auto`.
        width: Rows of a forward pass; `None` takes the device's.
        models: As a `Studio` takes them.

    Raises:
        UserError: The artifact was trained from another base.
        SystemFailure: It does not fit the base.
    """

    def __init__(
        self,
        base: BaseInfo,
        artifact: Path | None = None,
        manifest: Mapping[str, Any] | None = None,
        device: str = "auto",
        width: int | None = None,
        models: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        self.base = base
        self.studio = Studio(base, device, width, models=models)
        self.wear(artifact, manifest)

    def wear(self, artifact: Path | None, manifest: Mapping[str, Any] | None = None) -> None:
        """Draw with another artifact from here on; arguments and errors as those of the constructor."""
        self._outfit = PLAIN if artifact is None else self.studio.read(artifact, manifest)
        self.artifact = artifact_hash(manifest) if manifest else ""

    def draw(
        self, requests: Sequence[DrawRequest], on_step: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Images [height, width, 3] uint8, in the order of the requests.

        Args:
            requests: Any mixture of prompts, samplers, steps, guidance and sizes; those of one size are drawn together.
            on_step: Called with the denoising steps of images done and in all.

        Raises:
            UserError: A prompt is too long, or a sampler cannot do what is asked.
        """
        rows = enumerate([self.studio.row(request, self._outfit) for request in requests])
        waiting = deque(sorted(rows, key=lambda row: tuple(row[1].x.shape)))
        total, done = sum(len(row.table) for _, row in waiting), 0
        running: list[tuple[int, Row]] = []
        images: dict[int, NDArray[np.uint8]] = {}
        while waiting or running:
            while waiting and self._fits(waiting[0][1], [row for _, row in running]):
                running.append(waiting.popleft())
            self.studio.step([row for _, row in running])
            done += len(running)
            images |= {i: self.studio.pixels(row.x) for i, row in running if row.done}
            running = [(i, row) for i, row in running if not row.done]
            if on_step:
                on_step(done, total)
        return [images[i] for i in range(len(requests))]

    def _fits(self, row: Row, running: Sequence[Row]) -> bool:
        """Whether a row may join those that are drawn: it has their size, and there is room."""
        if running and running[0].x.shape != row.x.shape:
            return False
        return sum(other.cost for other in running) + row.cost <= self.studio.width


def draw_grid(
    asked: Draw, base: BaseInfo, models: tuple[nn.Module, nn.Module], on_step: Callable[[int], None]
) -> None:
    """Draw a published artifact and write the images, which are those of any other drawer, as one picture.

    Args:
        asked: What is drawn, and where the picture goes.
        base: What it was trained from.
        models: Its UNet and text encoder, frozen, on the device to draw on. Parameters are left as they were.
        on_step: Called with the denoising steps done.

    Raises:
        UserError: A prompt is too long, or a sampler cannot do what is asked.
        SystemFailure: The artifact cannot be read.
    """
    storage, threads = Storage(asked.first.storage_uri), torch.get_num_threads()
    device = next(models[0].parameters()).device.type
    try:
        with open_artifact(storage, asked.first.name, asked.first.version) as artifact:
            drawer = Drawer(base, artifact.folder, artifact.manifest, device, models=models)
        try:
            images = drawer.draw(asked.requests, lambda done, total: on_step(done))
        finally:
            drawer.studio.rest()
    finally:
        torch.set_num_threads(threads)
    storage.write(asked.path, encode_png(grid(images, asked.columns), None))
