"""This file is where one run goes through its stages: prior, latents, gang, registry, tracking."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from cluster.errors import failure_of
from cluster.mailbox import GANG_KILLED, MEMORY, MailboxClient, create
from cluster.objects import StorageError
from cluster.session import check_fits, gpu_count, resolve_address, session
from cluster.storage import Storage
from orchestrator.events import GangThread
from orchestrator.prepare import Destination, Prepared
from orchestrator.progress import Stages
from orchestrator.run_record import RunRecord
from orchestrator.signals import Signals, Terminated
from orchestrator.watch import POLL_S, Watch, ended
from training.gang import GangShape, run_gang
from training.latents import ImageSet, latent_refs, missing_images
from training.lease import Draw, Lease
from training.prior import draw_prior, prior_count, prior_images
from training.prompt import render_prompt
from training.request import DrawRequest
from training.stream import Pool, encode

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


class SingleRun:
    """One run on its way, with a bar for each of its stages."""

    def __init__(
        self, storage: Storage, stages: Stages, prepared: Prepared, goal: Destination, signals: Signals
    ) -> None:
        self.storage, self.stages, self.prepared = storage, stages, prepared
        self.signals = signals
        self.record = RunRecord(storage, prepared, goal, stages.note)
        self.scratch: str | None = None
        self.began = time.monotonic()
        self.outcome = Outcome("queued", prepared.name, goal.version, storage.full(self.record.artifact))

    def run(self, address: str | None) -> Outcome:
        """Take the run through all of its stages.

        Args:
            address: Ray cluster to join; `None` starts a private one on this machine.
        """
        cluster = self.prepared.run.cluster
        self._becomes("preparing")
        try:
            self.record.track()
            self.outcome.run_id = self.record.mlflow_run_id
            with session(address, cluster.workers * cluster.cpus_per_worker + 2, self.storage):
                self.signals.listen()  # Ray has taken them
                joined = resolve_address(address) is not None
                if joined and not self.storage.is_local:  # all nodes reach it, and Ray Train writes on each
                    self.scratch = self.storage.full(f"{self.record.path}/gang")
                wanted, fewest = cluster.gpus_per_worker, cluster.min_workers or cluster.workers
                gpus = float(gpu_count() > 0) if wanted == "auto" else wanted
                check_fits(fewest, cluster.cpus_per_worker, gpus, fixed=not joined)
                shape = GangShape(cluster.workers, cluster.cpus_per_worker, gpus, cluster.min_workers)
                pool = Pool(gpus=1.0 if gpus else 0.0)
                subject, prior = self._images(pool)
                metrics = self._train(shape, subject, prior)
            self.outcome.metrics = {key: float(value) for key, value in metrics.items()}
            self.record.register(metrics, self.outcome.prior_key)
            self.record.succeeded()
            self.outcome.state = "succeeded"
        except BaseException as error:
            self.outcome.state = _state_after(error)
            with suppress(StorageError):  # it may be what failed
                self.record.becomes(self.outcome.state, str(error))
            self.record.mirrors.finish(self.outcome.state, str(error))
            if isinstance(error, StorageError):
                raise error.failure() from error
            raise
        self.outcome.seconds = round(time.monotonic() - self.began, 1)
        return self.outcome

    def _becomes(self, state: str) -> None:
        self.outcome.state = state
        self.record.becomes(state)

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

    def _train(self, shape: GangShape, subject: ImageSet, prior: ImageSet | None) -> Mapping[str, float]:
        """Hand the run to a gang, watch it, and have it draw what it was trained for; returns its last metrics."""
        metrics: Mapping[str, float] | None = self.record.published()  # before the driver died
        base, wanted = self.prepared.base, self.prepared.run.prior.num_images
        of_class = latent_refs(self.storage, base, prior, wanted) if prior else []
        lease = self.record.lease(latent_refs(self.storage, base, subject), of_class, self.outcome.prior_key)
        asked = self._samples(lease)
        if metrics is not None and not asked:
            return metrics
        with self._gang(shape) as (mailbox, gang):
            if metrics is None:
                metrics = self._watch(mailbox, gang, lease)
            self._becomes("publishing")
            if asked:
                self._draw(mailbox, gang, asked)
        return metrics

    @contextmanager
    def _gang(self, shape: GangShape) -> Iterator[tuple[MailboxClient, GangThread]]:
        """A gang and its mailbox, until there is nothing more for it to do."""
        name = f"raybooth-{self.prepared.name}-{self.record.version}-{uuid4().hex[:8]}"
        mailbox = create(name)
        gang = GangThread(lambda: run_gang(name, shape, self.scratch))
        gang.start()
        try:
            yield mailbox, gang
        except BaseException:
            mailbox.close()  # the gang dies with the session; waiting for it to finish its run would take long
            raise
        mailbox.stop()
        gang.join(timeout=STOP_S)
        mailbox.close()

    def _watch(self, mailbox: MailboxClient, gang: GangThread, lease: Lease) -> Mapping[str, float]:
        self._becomes("training")
        mailbox.post(lease)
        with self.stages.stage(f"training {self.prepared.name}", self.prepared.run.train.steps) as stage:
            watch = Watch(mailbox, gang, self.record, stage, self.stages, self.signals)
            with self.signals.patiently():
                return watch.until_published()

    def _samples(self, lease: Lease) -> Draw | None:
        """The sample grid of the finished artifact: one row a prompt."""
        wanted, identity = self.prepared.run.validate_, self.prepared.identity
        requests = tuple(
            DrawRequest(
                render_prompt(prompt, identity.class_noun, identity.identifier, identity.template),
                seed,
                steps=wanted.steps,
                guidance=wanted.guidance,
            )
            for prompt in wanted.prompts
            for seed in range(wanted.num_images)
        )
        return (
            Draw(lease, requests, wanted.num_images, f"{self.record.path}/samples.png") if requests else None
        )

    def _draw(self, mailbox: MailboxClient, gang: GangThread, asked: Draw) -> None:
        """Have the workers draw the sample grid: another process would first have to load what they have.

        What was trained is published, and is worth more than its samples.
        """
        number = mailbox.post(asked)
        with self.stages.stage("drawing samples", sum(request.steps for request in asked.requests)) as stage:
            drawn = False
            while not drawn:
                alive = gang.is_alive()
                for event in mailbox.drain(POLL_S):
                    if event.lease != number:
                        continue
                    if event.kind == "drawn":
                        stage.at(int(event.payload["steps"]))
                    elif event.kind == "note":
                        self.stages.note(str(event.payload["text"]))
                    elif event.kind == "failed" and event.payload["kind"] in (MEMORY, GANG_KILLED):
                        seen = event.payload["seen"]
                        self.stages.note(f"no samples: the workers died of drawing them: {seen}")
                        return
                    elif event.kind == "failed":
                        raise failure_of(event.payload)
                    drawn |= event.kind == "published"
                if not (alive or drawn):
                    raise ended(gang)
        picture = self.storage.read(asked.path)
        self.record.mirrors.image("samples", picture, self.prepared.run.train.steps)


def _state_after(error: BaseException) -> str:
    if isinstance(error, Terminated | SystemExit):
        return "interrupted"
    return "cancelled" if isinstance(error, KeyboardInterrupt) else "failed"
