"""This file is where a run goes through its stages: prior, latents, gang, registry, tracking.

The record is written before the act, so that the same command goes on after the driver was killed at any moment.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster.mailbox import Event, create
from cluster.registry import Registry
from cluster.session import check_fits, gpu_count, resolve_address, session
from cluster.storage import Storage, StorageError
from orchestrator.events import EventLog, GangThread
from orchestrator.prepare import Destination, Prepared, record_path, run_path
from orchestrator.progress import Stage, Stages
from orchestrator.signals import Signals, Terminated
from orchestrator.tracking import (
    Mirrors,
    MlflowTracker,
    TensorBoardTracker,
    Tracker,
    flatten,
    mirror,
    tracking_uri,
)
from orchestrator.watch import Watch
from training import checkpoint
from training.artifact import artifact_path
from training.draw import DRAW_WIDTH
from training.figures import rows_kept
from training.gang import GangShape, run_gang
from training.lease import Lease
from training.png import decode_png, encode_png, grid
from training.prior import draw_prior, prior_count, prior_images
from training.prompt import render_prompt
from training.stream import ImageSet, Pool, draw_pngs, encode, latent_refs, missing_images

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


class Campaign:
    """One run on its way: `raybooth train` is a campaign of one."""

    def __init__(
        self, storage: Storage, stages: Stages, prepared: Prepared, goal: Destination, signals: Signals
    ) -> None:
        self.storage, self.stages, self.prepared, self.goal = storage, stages, prepared, goal
        self.signals = signals
        self.run_path = run_path(prepared.name, goal.version)
        self.artifact = artifact_path(prepared.name, goal.version)
        self.scratch: str | None = None
        self.began = time.monotonic()
        self.outcome = Outcome("queued", prepared.name, goal.version, storage.full(self.artifact))
        self.record: dict[str, Any] = goal.record or {
            "fingerprint": prepared.fingerprint,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": prepared.run.model_dump(mode="json", by_alias=True),
        }

    def run(self, address: str | None) -> Outcome:
        """Take the run through all of its stages.

        Args:
            address: Ray cluster to join; `None` starts a private one on this machine.
        """
        cluster = self.prepared.run.cluster
        self._becomes("preparing")
        mirrors = Mirrors([], self.stages.note)
        try:
            mirrors = self._mirrors()
            with session(address, cluster.workers * cluster.cpus_per_worker + 2, self.storage):
                self.signals.listen()  # Ray has taken them
                joined = resolve_address(address) is not None
                if joined and not self.storage.is_local:  # all nodes reach it, and Ray Train writes on each
                    self.scratch = self.storage.full(f"{self.run_path}/gang")
                wanted, fewest = cluster.gpus_per_worker, cluster.min_workers or cluster.workers
                gpus = float(gpu_count() > 0) if wanted == "auto" else wanted
                check_fits(fewest, cluster.cpus_per_worker, gpus, fixed=not joined)
                shape = GangShape(cluster.workers, cluster.cpus_per_worker, gpus, cluster.min_workers)
                pool = Pool(gpus=1.0 if gpus else 0.0)
                subject, prior = self._images(pool)
                metrics = self._train(shape, subject, prior, mirrors)
                self._becomes("publishing")
                self._samples(pool, mirrors)
            self._register(mirrors, metrics)
            mirrors.finish("succeeded")
            checkpoint.delete(self.storage, self.run_path)
            self.storage.remove(f"{self.run_path}/gang")
            self._becomes("succeeded")
        except BaseException as error:
            state = _state_after(error)
            with suppress(StorageError):  # it may be what failed
                self._becomes(state, reason=str(error))
            mirrors.finish(state)
            if isinstance(error, StorageError):
                raise error.failure() from error
            raise
        self.outcome.seconds = round(time.monotonic() - self.began, 1)
        return self.outcome

    def _becomes(self, state: str, reason: str | None = None) -> None:
        self.outcome.state = state
        self.record |= {"state": state, "reason": reason}
        self.storage.write_json(record_path(self.prepared.name, self.goal.version), self.record)

    def _mirrors(self) -> Mirrors:
        run, prepared = self.prepared.run, self.prepared
        params = flatten(run.model_dump(mode="json", by_alias=True, exclude={"track"}))
        tags = {
            "raybooth.subject": prepared.name,
            "raybooth.version": self.goal.version,
            "raybooth.fingerprint": prepared.fingerprint,
            "raybooth.base_revision": prepared.base.revision,
            "raybooth.photos": prepared.photos.key,
        }
        uri = tracking_uri(self.storage, run.track.mlflow)
        before = self.record.get("mlflow", {})
        run_id = before.get("run_id") if before.get("uri") == uri else None
        title = f"{prepared.name}-{self.goal.version}"
        mlflow = MlflowTracker(uri, run.track.experiment, self.storage, title, params, tags, run_id)
        self.outcome.run_id = mlflow.run_id
        self.record["mlflow"] = {"uri": uri, "run_id": mlflow.run_id}
        self._becomes(self.outcome.state)
        trackers: list[Tracker] = [mlflow]
        if run.track.tensorboard:
            root = Path(self.storage.uri) if self.storage.is_local else Path("raybooth-tensorboard")
            trackers.append(TensorBoardTracker(root / self.run_path / "tensorboard"))
        return Mirrors(trackers, self.stages.note)

    def _images(self, pool: Pool) -> tuple[ImageSet, ImageSet | None]:
        """Draw the class images that are missing and encode what is not encoded yet."""
        run, base = self.prepared.run, self.prepared.base
        subject, prior = self.prepared.subject_images(), None
        key = self.outcome.prior_key = self.prepared.prior_key(pool.device)
        if key:
            have = min(prior_count(self.storage, key), run.prior.num_images)
            if have < run.prior.num_images:
                with self.stages.stage("drawing class images", run.prior.num_images) as stage:
                    stage.at(have)
                    noun = run.subject.class_noun
                    drawn = draw_prior(self.storage, base, run.prior, noun, pool, stage.advance, self._waits)
                self.outcome.prior_images_drawn = drawn
            else:
                self.stages.note(f"class images: all {run.prior.num_images} are there (set {key})")
            prior = prior_images(self.storage, key, run.prior.num_images)
        sets = [subject, prior] if prior else [subject]
        missing = sum(missing_images(self.storage, base, images) for images in sets)
        if missing:
            with self.stages.stage("encoding images", missing) as stage:
                encode(self.storage, base, sets, pool, stage.advance)
        return subject, prior

    def _waits(self) -> None:
        self.stages.note("another run is drawing these class images: waiting for it")

    def _train(
        self, shape: GangShape, subject: ImageSet, prior: ImageSet | None, mirrors: Mirrors
    ) -> Mapping[str, float]:
        """Hand the run to a gang and watch it; returns its last metrics."""
        run, base = self.prepared.run, self.prepared.base
        done = self.storage.manifest(self.artifact)
        if done and done["fingerprint"] == self.prepared.fingerprint:
            log = self._log(mirrors)
            kept = rows_kept(self.storage, f"{self.run_path}/{checkpoint.ROWS}", run.train.steps)
            mirror(log.add([Event(0, 0, "step", row) for row in kept]), mirrors, self.storage)
            return dict(
                done["metrics"]
            )  # published before the driver died, which may not have heard the last steps
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
            meta={
                "fingerprint": self.prepared.fingerprint,
                "prior_key": self.outcome.prior_key,
                "subject_names": self.prepared.photo_names,
            },
            sample_ids=self.prepared.sample_ids,
        )
        self._becomes("training")
        with self.stages.stage(f"training {self.prepared.name}", run.train.steps) as stage:
            return self._watch(shape, lease, stage, mirrors)

    def _log(self, mirrors: Mirrors) -> EventLog:
        """The run's log; what it has already is mirrored again, as the driver that wrote it may not have come to it."""
        log = EventLog(self.storage, f"{self.run_path}/events.jsonl")
        mirror(log.before, mirrors, self.storage)
        return log

    def _watch(self, shape: GangShape, lease: Lease, stage: Stage, mirrors: Mirrors) -> Mapping[str, float]:
        mailbox_name = f"raybooth-{lease.name}-{lease.version}-{uuid4().hex[:8]}"
        mailbox = create(mailbox_name)
        gang = GangThread(lambda: run_gang(mailbox_name, shape, self.scratch))
        log = self._log(mirrors)
        mailbox.post(lease)
        gang.start()
        watch = Watch(mailbox, gang, log, stage, self.stages, mirrors, self.signals)
        try:
            with self.signals.patiently():
                metrics = watch.until_published()
        except BaseException:
            mailbox.close()  # the gang dies with the session; waiting for it to finish its run would take long
            raise
        mailbox.stop()
        gang.join(timeout=STOP_S)
        mailbox.close()
        return metrics

    def _register(self, mirrors: Mirrors, metrics: Mapping[str, float]) -> None:
        """Register the artifact. Our record goes last: what is in it is done, and a restart repeats the rest."""
        self.outcome.metrics = {key: float(value) for key, value in metrics.items()}
        prepared = self.prepared
        number = mirrors.register(prepared.name, self.goal.version, self.storage, self.artifact)
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
                "prior_key": self.outcome.prior_key,
                "mlflow": {**self.record["mlflow"], "version": number},
            },
        )

    def _samples(self, pool: Pool, mirrors: Mirrors) -> None:
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
        source = (self.storage.uri, self.prepared.name, self.goal.version)
        with self.stages.stage("drawing samples", len(requests)) as stage:
            images = []
            for row in draw_pngs(self.prepared.base, requests, pool, DRAW_WIDTH[pool.device], source):
                images.append(decode_png(bytes(row["png"])))
                stage.advance()
        picture = encode_png(grid(images, columns=wanted.num_images), None)
        self.storage.write(f"{self.run_path}/samples.png", picture)
        mirrors.image("samples", picture, self.prepared.run.train.steps)


def _state_after(error: BaseException) -> str:
    if isinstance(error, Terminated | SystemExit):
        return "interrupted"
    return "cancelled" if isinstance(error, KeyboardInterrupt) else "failed"
