"""This file is where a run is foretold: what is there, what is missing, how large it gets. Nothing is written."""

import tempfile
from dataclasses import asdict, dataclass
from typing import Any

from cluster.session import resolve_address
from cluster.storage import Storage
from orchestrator.fits import Fit, Room, check_memory
from orchestrator.prepare import Prepared, destination, prepare, run_path
from training.artifact import artifact_path
from training.checkpoint import steps_saved
from training.latents import missing_shards
from training.pipeline import BaseInfo
from training.prior import prior_count, prior_images
from training.recipe import Run
from training.shapes import sizes

BYTES_PER_WEIGHT = 4  # artifacts are fp32


@dataclass(frozen=True)
class PriorPlan:
    """Class images: which set, how many of it are there."""

    key: str
    wanted: int
    present: int
    latents_cached: bool

    @property
    def missing(self) -> int:
        """Images still to be drawn."""
        return self.wanted - self.present


@dataclass(frozen=True)
class Plan:
    """What `raybooth train` would do with the same spec."""

    subject: str
    version: str
    state: str
    """`new`, `unfinished` (it would go on) or `succeeded` (there is nothing to do)."""
    method: str
    base: str
    base_revision: str
    image_size: int
    identifier: str
    photos: int
    training_images: int
    latents_cached: bool
    prior: PriorPlan | None
    steps: int
    pairs_per_step: int
    resume_from: int
    checkpoint_every: int
    workers: int
    trained_parameters: int
    artifact: str
    artifact_bytes: int
    memory: Fit
    fingerprint: str
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """The JSON object of `raybooth plan`."""
        prior = {**asdict(self.prior), "missing": self.prior.missing} if self.prior else None
        return {**asdict(self), "prior": prior, "memory": self.memory.as_json()}

    def lines(self) -> list[str]:
        """The same for people."""
        does = {"new": "", "unfinished": ", goes on", "succeeded": ", nothing to do"}[self.state]
        steps = "" if self.state == "succeeded" else f"steps {self.resume_from + 1} to {self.steps}, "
        prior = "none are drawn"
        if self.prior:
            cached = ", latents cached" if self.prior.latents_cached else ""
            prior = f"{self.prior.missing} of {self.prior.wanted} to draw (set {self.prior.key}){cached}"
        return [
            f"{self.subject} {self.version}{does}: {self.method} on {self.base} at {self.image_size} pixels",
            f"  photos        {self.photos}, {self.training_images} training images, latents "
            + ("cached" if self.latents_cached else "to encode"),
            f"  class images  {prior}",
            f"  training      {steps}{self.pairs_per_step} pairs a step, "
            f"{self.workers} workers, a checkpoint every {self.checkpoint_every} steps",
            f"  memory        {self.memory.line()}",
            f"  artifact      {self.artifact}, about {self.artifact_bytes / 1e6:.1f} MB "
            f"({self.trained_parameters:,} trained parameters)",
            *(f"  note: {note}" for note in self.notes),
        ]


def plan_run(
    run: Run, storage: Storage, new_version: bool = False, device: str = "cpu", room: Room | None = None
) -> Plan:
    """Foretell a run. Its photos are read and checked, no weights are loaded, Ray is not started.

    Args:
        run: The run.
        storage: The root to look into; nothing is written there.
        new_version: As for `train`: plan another version even though this one is trained.
        device: `cpu` or `cuda`, what class images would be drawn on and workers would train on.
        room: Memory for them; `None` is this machine's, or unknown when RAY_ADDRESS names a cluster.

    Raises:
        UserError: `train` would refuse the run, also because it cannot fit.
    """
    with tempfile.TemporaryDirectory(prefix="raybooth-") as scratch:
        prepared = prepare(run, Storage(scratch))
    goal = destination(storage, prepared.name, prepared.fingerprint, new_version)
    room = room or (Room(None, None) if resolve_address(None) else Room.here(device))
    trained, size = artifact_size(prepared.base, run)
    return Plan(
        subject=prepared.name,
        version=goal.version,
        state=goal.state,
        method=run.train.method,
        base=run.base.model,
        base_revision=prepared.base.revision,
        image_size=prepared.base.image_size,
        identifier=prepared.identity.identifier,
        photos=prepared.photos.count,
        training_images=prepared.photos.count * run.data.images_per_photo,
        latents_cached=not missing_shards(storage, prepared.base, prepared.subject_images()),
        prior=prior_plan(prepared, storage, device),
        steps=run.train.steps,
        pairs_per_step=run.train.pairs_per_step,
        resume_from=max(steps_saved(storage, run_path(prepared.name, goal.version)), default=0),
        checkpoint_every=run.checkpoint.every,
        workers=run.cluster.workers,
        trained_parameters=trained,
        artifact=storage.full(artifact_path(prepared.name, goal.version)),
        artifact_bytes=size,
        memory=check_memory(prepared.base, run, device, room),
        fingerprint=prepared.fingerprint,
        notes=prepared.notes,
    )


def prior_plan(prepared: Prepared, storage: Storage, device: str) -> PriorPlan | None:
    """The prior set of a run; `None` without prior preservation."""
    key, wanted = prepared.prior_key(device), prepared.run.prior.num_images
    if key is None:
        return None
    present = min(prior_count(storage, key), wanted)
    cached = present == wanted and not missing_shards(
        storage, prepared.base, prior_images(storage, key, wanted)
    )
    return PriorPlan(key, wanted, present, cached)


def artifact_size(base: BaseInfo, run: Run) -> tuple[int, int]:
    """Trained parameters, and bytes of the artifact they are published in; from shapes alone."""
    trained, everything = sizes(base, run.train)
    if run.train.method == "lora":
        return trained, trained * BYTES_PER_WEIGHT
    copied = (
        p for part in ("vae", *base.kind.tokenizers, "scheduler") for p in (base.path / part).glob("*.*")
    )
    return trained, everything * BYTES_PER_WEIGHT + sum(p.stat().st_size for p in copied)
