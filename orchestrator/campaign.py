"""This file is where a run goes through its stages: prior, latents, gang, registry, tracking.

`raybooth train` is a campaign of one. The record is written before the act, so that the same command goes on after
the driver was killed at any moment.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster.errors import RayboothError, SystemFailure
from cluster.mailbox import create
from cluster.registry import Registry
from cluster.session import gpu_count, sees_gpu, session
from cluster.storage import Storage
from orchestrator.events import EventLog, GangThread
from orchestrator.prepare import Destination, Prepared, destination, one_at_a_time, prepare, record_path
from orchestrator.progress import Stage, Stages
from orchestrator.tracking import MlflowTracker, TensorBoardTracker, Tracker, flatten, tracking_uri
from training.artifact import artifact_path
from training.draw import DRAW_WIDTH
from training.gang import GangShape, run_gang
from training.lease import Lease
from training.png import decode_png, encode_png, grid
from training.prior import draw_prior, prior_count, prior_images
from training.prompt import render_prompt
from training.recipe import Run
from training.stream import ImageSet, Pool, draw_pngs, encode, latent_refs, missing_shards

POLL_S = 0.2  # a bar feels live at 5 Hz
STOP_S = 30  # a gang that was told to stop ends within one step and its clean-up


@dataclass
class Outcome:
    """What became of a run, as the `--json` contract names it."""

    state: str
    subject: str
    version: str
    artifact: str
    run_id: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    prior_key: str | None = None
    prior_images_drawn: int = 0
    seconds: float = 0.0
    already_there: bool = False

    def as_json(self) -> dict[str, Any]:
        """The JSON object of `raybooth train`."""
        return dict(vars(self))


def train_subject(
    run: Run, storage: Storage, stages: Stages, address: str | None = None, new_version: bool = False
) -> Outcome:
    """Train one subject from its photos to a registered artifact.

    Args:
        run: The run.
        storage: Root of everything that lasts.
        stages: Shows progress.
        address: Ray cluster to join; `None` starts a private one on this machine.
        new_version: Train again although a version of the same fingerprint is registered.

    Returns:
        The outcome; a version that is there already is returned without work.

    Raises:
        UserError: Something in the run cannot be used.
        SystemFailure: The run failed; the same command goes on.
    """
    storage.check_writable()
    with storage.lock_or_refuse(f"locks/train-{run.subject.name}", one_at_a_time(run.subject.name)):
        prepared = prepare(run, storage, _device(run, address, storage))
        for note in prepared.notes:
            stages.note(f"note: {note}")
        goal = destination(storage, prepared.name, prepared.fingerprint, new_version)
        if goal.state == "succeeded":
            return _finished_before(storage, prepared, goal)
        if goal.state == "unfinished":
            stages.note(f"{prepared.name} {goal.version} was not finished: going on with it")
        return _Campaign(storage, stages, prepared, goal).run(address)


def _device(run: Run, address: str | None, storage: Storage) -> str:
    """What class images will be drawn on, `cpu` or `cuda`; it is part of the address of their set."""
    if run.cluster.gpus_per_worker == 0:
        return "cpu"
    if not address:
        return "cuda" if sees_gpu() else "cpu"
    with session(address, 0, storage):
        return "cuda" if gpu_count() else "cpu"


def _finished_before(storage: Storage, prepared: Prepared, goal: Destination) -> Outcome:
    entry = Registry(storage).show(prepared.name)["versions"][goal.version]
    return Outcome(
        "succeeded",
        prepared.name,
        goal.version,
        storage.full(entry["artifact"]),
        entry.get("mlflow_run_id"),
        entry.get("metrics", {}),
        prepared.prior_key,
        already_there=True,
    )


class _Campaign:
    """One run on its way."""

    def __init__(self, storage: Storage, stages: Stages, prepared: Prepared, goal: Destination) -> None:
        self.storage, self.stages, self.prepared, self.goal = storage, stages, prepared, goal
        self.run_path = f"runs/{prepared.name}/{goal.version}"
        self.artifact = artifact_path(prepared.name, goal.version)
        self.began = time.monotonic()
        self.outcome = Outcome("queued", prepared.name, goal.version, storage.full(self.artifact))
        self.record: dict[str, Any] = goal.record or {
            "fingerprint": prepared.fingerprint,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": prepared.run.model_dump(mode="json", by_alias=True),
        }

    def run(self, address: str | None) -> Outcome:
        cluster = self.prepared.run.cluster
        self._becomes("preparing")
        tracker, others = self._trackers()
        try:
            with session(address, cluster.workers * cluster.cpus_per_worker + 2, self.storage):
                wanted = cluster.gpus_per_worker
                gpus = float(gpu_count() > 0) if wanted == "auto" else wanted
                shape = GangShape(cluster.workers, cluster.cpus_per_worker, gpus)
                pool = Pool(gpus=1.0 if gpus else 0.0)
                subject, prior = self._images(pool)
                metrics = self._train(shape, subject, prior, [tracker, *others])
                self._becomes("publishing")
                self._publish(tracker, metrics)
                self._samples(pool, [tracker, *others])
        except BaseException as error:
            self._becomes("failed" if isinstance(error, RayboothError) else "interrupted", reason=str(error))
            for sink in (tracker, *others):
                sink.finish(succeeded=False)
            raise
        for sink in (tracker, *others):
            sink.finish(succeeded=True)
        self._becomes("succeeded")
        self.storage.remove(f"{self.run_path}/checkpoints")
        self.outcome.seconds = round(time.monotonic() - self.began, 1)
        return self.outcome

    def _becomes(self, state: str, reason: str | None = None) -> None:
        self.outcome.state = state
        self.record |= {"state": state, "reason": reason, "run_id": self.outcome.run_id}
        self.storage.write_json(record_path(self.prepared.name, self.goal.version), self.record)

    def _trackers(self) -> tuple[MlflowTracker, list[Tracker]]:
        run, prepared = self.prepared.run, self.prepared
        params = flatten(run.model_dump(mode="json", by_alias=True, exclude={"track"}))
        tags = {
            "raybooth.subject": prepared.name,
            "raybooth.version": self.goal.version,
            "raybooth.fingerprint": prepared.fingerprint,
            "raybooth.base_revision": prepared.base.revision,
            "raybooth.photos": prepared.photos.key,
            "raybooth.prior": prepared.prior_key or "",
        }
        uri = tracking_uri(self.storage, run.track.mlflow)
        title = f"{prepared.name}-{self.goal.version}"
        mlflow = MlflowTracker(
            uri, run.track.experiment, self.storage, title, params, tags, self.record.get("run_id")
        )
        self.outcome.run_id = mlflow.run_id
        self._becomes(self.outcome.state)  # the run's id is on record before anything is logged to it
        others: list[Tracker] = []
        if run.track.tensorboard:
            root = Path(self.storage.uri) if self.storage.is_local else Path("raybooth-tensorboard")
            others.append(TensorBoardTracker(root / self.run_path / "tensorboard"))
        return mlflow, others

    def _images(self, pool: Pool) -> tuple[ImageSet, ImageSet | None]:
        """Draw the class images that are missing and encode what is not encoded yet."""
        run, base = self.prepared.run, self.prepared.base
        subject, prior = self.prepared.subject_images(), None
        if self.prepared.prior_key:
            key = self.outcome.prior_key = self.prepared.prior_key
            have = min(prior_count(self.storage, key), run.prior.num_images)
            if have < run.prior.num_images:
                with self.stages.stage("drawing class images", run.prior.num_images) as stage:
                    stage.at(have)
                    noun = run.subject.class_noun
                    drawn = draw_prior(self.storage, base, run.prior, noun, pool, stage.advance)
                self.outcome.prior_images_drawn = drawn
            else:
                self.stages.note(f"class images: all {run.prior.num_images} are there (set {key})")
            prior = prior_images(self.storage, key, run.prior.num_images)
        sets = [subject, prior] if prior else [subject]
        if any(missing_shards(self.storage, base, images) for images in sets):
            with self.stages.stage("encoding images", sum(self._count(images) for images in sets)) as stage:
                encode(self.storage, base, sets, pool, stage.advance)
        return subject, prior

    def _count(self, images: ImageSet) -> int:
        """Images of a set that are still to be encoded."""
        if not missing_shards(self.storage, self.prepared.base, images):
            return 0
        if images.key == self.prepared.photos.key:
            data = images.data
            return self.prepared.photos.count * data.variants * (2 if data.flip else 1)
        return prior_count(self.storage, images.key)

    def _train(
        self, shape: GangShape, subject: ImageSet, prior: ImageSet | None, trackers: list[Tracker]
    ) -> Mapping[str, float]:
        """Hand the run to a gang and watch it; returns its last metrics."""
        run, base = self.prepared.run, self.prepared.base
        done = self.storage.manifest(self.artifact)
        if done and done["fingerprint"] == self.prepared.fingerprint:
            return dict(done["metrics"])  # published before the driver died
        lease = Lease(
            run=run.model_dump(mode="json", by_alias=True),
            name=self.prepared.name,
            version=self.goal.version,
            base_model=base.model,
            base_revision=base.revision,
            storage_uri=self.storage.uri,
            subject_latents=latent_refs(self.storage, base, subject),
            class_latents=latent_refs(self.storage, base, prior, run.prior.num_images) if prior else [],
            subject_ids=self.prepared.subject_ids,
            class_ids=self.prepared.class_ids,
            identity=self.prepared.identity.as_json(),
            meta={"fingerprint": self.prepared.fingerprint, "prior_key": self.prepared.prior_key},
        )
        self._becomes("training")
        with self.stages.stage(f"training {self.prepared.name}", run.train.steps) as stage:
            return self._watch(shape, lease, stage, trackers)

    def _watch(
        self, shape: GangShape, lease: Lease, stage: Stage, trackers: list[Tracker]
    ) -> Mapping[str, float]:
        mailbox_name = f"raybooth-{lease.name}-{lease.version}-{uuid4().hex[:8]}"
        mailbox = create(mailbox_name)
        gang = GangThread(lambda: run_gang(mailbox_name, shape))
        events = EventLog(self.storage, f"{self.run_path}/events.jsonl")
        mailbox.post(lease)
        gang.start()
        try:
            while True:
                alive = gang.is_alive()
                heard = mailbox.drain(POLL_S)
                rows = events.add(heard)
                for tracker in trackers:
                    tracker.metrics(rows)
                if rows:
                    stage.at(int(rows[-1]["step"]), _figures(rows[-1]))
                for event in heard:
                    if event.kind == "note":
                        self.stages.note(str(event.payload["text"]))
                    elif event.kind == "published":
                        return dict(event.payload["metrics"])
                    elif event.kind == "failed":
                        raise SystemFailure(*(str(event.payload[key]) for key in ("what", "seen", "do")))
                if not alive:
                    raise SystemFailure(
                        "the gang ended before the run did",
                        str(gang.error or ""),
                        "run the same command again",
                    )
        finally:
            mailbox.stop()
            gang.join(timeout=STOP_S)
            mailbox.close()

    def _publish(self, tracker: MlflowTracker, metrics: Mapping[str, float]) -> None:
        """Register the artifact: our record first, which serving reads; MLflow mirrors it."""
        self.outcome.metrics = {key: float(value) for key, value in metrics.items()}
        prepared = self.prepared
        number = tracker.register(prepared.name, self.goal.version, self.storage, self.artifact)
        Registry(self.storage).add(
            prepared.name,
            self.goal.version,
            {
                "artifact": self.artifact,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "fingerprint": prepared.fingerprint,
                "method": prepared.run.train.method,
                "base": prepared.base.model,
                "class": prepared.identity.class_noun,
                "identifier": prepared.identity.identifier,
                "metrics": self.outcome.metrics,
                "mlflow_run_id": self.outcome.run_id,
                "mlflow_version": number,
                "mlflow_uri": tracking_uri(self.storage, prepared.run.track.mlflow),
            },
        )

    def _samples(self, pool: Pool, trackers: list[Tracker]) -> None:
        """Draw the sample grid of the finished artifact: one row a prompt."""
        wanted, identity = self.prepared.run.validate_, self.prepared.identity
        if not wanted.prompts:
            return
        requests = [
            {
                "index": row * wanted.num_images + seed,
                "prompt": render_prompt(prompt, identity.class_noun, identity.identifier, identity.template),
                "seed": seed,
                "steps": wanted.steps,
                "guidance": wanted.guidance,
            }
            for row, prompt in enumerate(wanted.prompts)
            for seed in range(wanted.num_images)
        ]
        device = "cuda" if pool.gpus else "cpu"
        source = (self.storage.uri, self.prepared.name, self.goal.version)
        with self.stages.stage("drawing samples", len(requests)) as stage:
            images = []
            for row in draw_pngs(self.prepared.base, requests, pool, DRAW_WIDTH[device], source):
                images.append(decode_png(bytes(row["png"])))
                stage.advance()
        picture = encode_png(grid(images, columns=wanted.num_images), None)
        self.storage.write(f"{self.run_path}/samples.png", picture)
        for tracker in trackers:
            tracker.image("samples", picture, self.prepared.run.train.steps)


def _figures(row: Mapping[str, float]) -> str:
    """What stands beside the training bar."""
    prior = f" prior {row['loss_class']:.3f}" if row.get("loss_class") is not None else ""
    return f"loss {row['loss_subject']:.3f}{prior} {row['steps_per_second']:.1f} it/s"
