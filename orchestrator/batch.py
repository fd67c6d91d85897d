"""This file is where many subjects are drawn with many prompts: what is there is left, the rest is one stream."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from json import loads
from math import ceil
from typing import Any, TypeVar

import torch

from cluster.errors import RayboothError, UserError, failure_of
from cluster.objects import StorageError
from cluster.session import gpu_count, resolve_address, session
from cluster.storage import Storage
from orchestrator.gallery import Entry, Gallery, Image
from orchestrator.gallery_sheets import write_sheets
from orchestrator.progress import Stages
from orchestrator.wanted import Wanted, wanted_images
from serving.provenance import Provenance
from training.pipeline import BaseInfo
from training.request import FORWARD_ROWS
from training.stream import Pool, draw_grouped

SHARD = 64  # images that go on record together, and
SHARD_S = 60.0  # seconds after which they do anyway: what a killed process draws again at most
Subject = tuple[str, str]  # name and version
Look = Callable[[], tuple[BaseInfo, list[Image]]]
"""Finds out what is wanted of a subject and what base draws it; raises a `RayboothError` when it cannot be drawn."""
OpenRay = Callable[[], AbstractContextManager[None]]
"""Opens Ray around the drawing, once there is something to draw."""
_T = TypeVar("_T")


@dataclass
class BatchResult:
    """What a batch came to."""

    images: list[Entry] = field(default_factory=list)
    """Of what was wanted, all that is there now, subject by subject, prompt by prompt, seed by seed."""
    drawn: int = 0
    there: int = 0
    """That were there before."""
    failed: dict[Subject, RayboothError] = field(default_factory=dict)
    """Subjects that lack images, with the reason."""
    index: str = ""
    """Path of the index under the root of the images."""
    sheets: dict[Subject, str] = field(default_factory=dict)
    """Paths of the contact sheets."""

    def as_json(self) -> dict[str, Any]:
        """The counts and reasons for programs."""
        return {
            "state": "failed" if self.failed else "succeeded",
            "images": len(self.images),
            "drawn": self.drawn,
            "there": self.there,
            "failed": [
                {"name": name, "version": version, "reason": error.as_json()}
                for (name, version), error in self.failed.items()
            ],
        }


def draw_batch(
    storage: Storage,
    out: Storage,
    subjects: Sequence[Subject],
    wanted: Wanted,
    pool: Pool,
    stages: Stages,
    form: str = "png",
    ray: OpenRay = nullcontext,
) -> BatchResult:
    """Draw what is missing of every subject's images; killed at any moment and called again, it goes on.

    Args:
        storage: Root that holds the artifacts.
        out: Root that takes the images.
        subjects: Name and version of each.
        wanted: What to draw of them.
        pool: Actors to draw with; no more of them are started than have something to do.
        stages: Shows progress.
        form: `png`, an object an image, or `parquet`, up to `SHARD` of them in one.
        ray: Entered around the drawing, if there is something to draw: for a caller that has no session yet.

    Returns:
        The images and the subjects that failed; one that fails does not stop the others.

    Raises:
        UserError: The sampler or the form is unknown, or `out` keeps its images in another form.
        SystemFailure: A worker failed, or `out` cannot be written; what is done stays done.
    """
    wanted.check()
    asked: dict[Subject, Look] = {
        subject: partial(wanted_images, storage, *subject, wanted, pool.device) for subject in subjects
    }
    return draw_asked(storage, out, asked, pool, stages, form, ray)


def draw_asked(
    storage: Storage,
    out: Storage,
    asked: Mapping[Subject, Look],
    pool: Pool,
    stages: Stages,
    form: str = "png",
    ray: OpenRay = nullcontext,
    sheets: bool = True,
) -> BatchResult:
    """`draw_batch` of images that are not the same of every subject, and with `sheets` off without contact sheets."""
    gallery = Gallery(out, form)
    try:
        with out.lock(
            Gallery.LOCK, lambda: stages.note(f"another process draws into {out.uri}: waiting for it")
        ):
            return _Batch(storage, gallery, pool, stages, sheets).run(asked, ray)
    except StorageError as error:
        raise error.failure() from error


def run_batch(
    storage: Storage,
    out: Storage,
    subjects: Sequence[Subject],
    wanted: Wanted,
    stages: Stages,
    form: str,
    actors: int | None,
    address: str | None,
) -> BatchResult:
    """`draw_batch` in a session of its own; a private Ray is only started when there is something to draw.

    Args:
        storage: Root that holds the artifacts.
        out: Root that takes the images.
        subjects: Name and version of each.
        wanted: What to draw of them.
        stages: Shows progress.
        form: `png` or `parquet`.
        actors: How many draw; `None` is one per GPU, or one without any.
        address: Ray cluster to join; `None` starts a private one on this machine.

    Raises:
        UserError: There are fewer GPUs than `actors`, or no subject can be drawn for a mistake in what is asked.
        SystemFailure: A worker failed, or `out` cannot be written.
    """
    result = with_pool(
        storage,
        actors,
        address,
        lambda pool, ray: draw_batch(storage, out, subjects, wanted, pool, stages, form, ray),
    )
    mistakes = [error for error in result.failed.values() if isinstance(error, UserError)]
    if not result.images and mistakes:
        raise mistakes[0]
    return result


def with_pool(
    storage: Storage, actors: int | None, address: str | None, draw: Callable[[Pool, OpenRay], _T]
) -> _T:
    """What `draw` returns, given actors to draw with and a session to enter once there is something to draw.

    Args:
        storage: Root that holds the artifacts.
        actors: How many draw; `None` is one per GPU, or one without any.
        address: Ray cluster to join; `None` starts a private one on this machine, and only when it is entered.
        draw: Draws.

    Raises:
        UserError: There are fewer GPUs than `actors`.
    """
    joined = resolve_address(address) is not None

    def drawn(gpus: int) -> _T:
        pool = Pool(actors or max(gpus, 1), gpus=1.0 if gpus else 0.0)
        if gpus and pool.actors > gpus and not joined:  # a cluster may grow
            raise UserError(f"--actors {pool.actors} wants a GPU each", f"there are {gpus}", "lower it")

        def ray() -> AbstractContextManager[None]:
            return nullcontext() if joined else session(None, pool.actors + 1, storage)

        return draw(pool, ray)

    if joined:
        with session(address, 1, storage):
            return drawn(gpu_count())
    return drawn(torch.cuda.device_count())


class _Batch:
    def __init__(self, storage: Storage, gallery: Gallery, pool: Pool, stages: Stages, sheets: bool) -> None:
        self.storage, self.gallery, self.sheets = storage, gallery, sheets
        self.pool, self.stages = pool, stages
        self.result = BatchResult()
        self.bases: dict[str, BaseInfo] = {}  # by revision

    def run(self, asked: Mapping[Subject, Look], ray: OpenRay) -> BatchResult:
        result, everything = self.result, []
        entries: dict[str, Entry] = {}
        with self.stages.stage("reading what is there", len(asked)) as stage:
            for subject, look in asked.items():
                try:
                    base, images = look()
                except RayboothError as error:
                    result.failed[subject] = error
                else:
                    self.bases[base.revision] = base
                    everything += images
                    entries |= self.gallery.there(images[0].label, images)
                stage.advance()
        missing = [image for image in everything if image.key not in entries]
        result.there = len(everything) - len(missing)
        if missing:
            if result.there:
                self.stages.note(f"{result.there} of {len(everything)} images are there already")
            with ray(), self.stages.stage("drawing images", len(missing)) as stage:
                drawn = self._draw(missing, stage.at)
            entries |= {entry.image.key: entry for entry in drawn}
            result.drawn = len(drawn)
        result.images = [entries[image.key] for image in everything if image.key in entries]
        if result.images:
            result.index = self.gallery.write_index()
            if self.sheets:
                changed = {image.label for image in missing}
                result.sheets = write_sheets(self.gallery, result.images, changed)
        return result

    def _draw(self, missing: Sequence[Image], show: Callable[[int, str], None]) -> list[Entry]:
        """Draw images and put them on record, also those that are drawn when something fails."""
        kept: list[Entry] = []
        shard: list[tuple[Image, bytes]] = []
        began = 0.0

        def keep() -> None:
            whole, shard[:] = list(shard), []
            if whole:
                kept.extend(self.gallery.add(whole))

        try:
            for number, (image, png) in enumerate(self._pngs(missing)):
                full = len(shard) >= SHARD or time.monotonic() - began > SHARD_S
                if shard and (full or shard[0][0].label != image.label):
                    keep()
                if not shard:
                    began = time.monotonic()
                shard.append((image, png))
                show(number + 1, image.label)
        finally:
            keep()
        return kept

    def _pngs(self, missing: Sequence[Image]) -> Iterator[tuple[Image, bytes]]:
        """The images, base by base and subject by subject; those of a subject that fails are left out."""
        for revision, base in self.bases.items():
            images = [image for image in missing if image.base_revision == revision]
            width = FORWARD_ROWS[self.pool.device]
            pool = replace(self.pool, actors=min(self.pool.actors, ceil(len(images) / width)))
            requests = [
                {
                    "index": index,
                    "name": image.subject if image.artifact else "",
                    "version": image.version if image.artifact else "",
                    "label": image.label,
                    **asdict(image.request),
                }
                for index, image in enumerate(images)
            ]
            for row in draw_grouped(base, requests, pool, width, self.storage.uri, Provenance().png):
                image = images[int(row["index"])]
                if row["error"]:
                    failed = failure_of(loads(row["error"]))
                    self.result.failed.setdefault((image.subject, image.version), failed)
                else:
                    yield image, bytes(row["png"])
