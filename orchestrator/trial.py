"""This file is where one recipe is tried on several subjects: trained in turns by a gang that stays, scored on the way.

A trial goes from rung to rung. At each every subject is trained on to the rung's step, leaves a checkpoint, and draws a
few images, which are scored. What was found at a rung is on record before the next one begins, so that a trial which is
asked for again tells what it knows and goes on behind it.
"""

import time
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from cluster.errors import SystemFailure, UserError, failure_of
from cluster.mailbox import MailboxClient, create
from cluster.storage import Storage
from orchestrator.bench import (
    LOST,
    RUNG,
    Bench,
    Record,
    forget,
    grid_path,
    read_trial,
    trial_path,
    trial_run,
    version_of,
)
from orchestrator.events import GangThread
from orchestrator.population import begun_at
from orchestrator.prepare import Prepared, prepare
from orchestrator.space import key_of
from training.critic import Critic, Picture, Scores, parted, worth
from training.cuts import crops
from training.embedders import decoded, open_embedder
from training.gang import run_gang
from training.latents import latent_refs
from training.lease import Lease
from training.png import tiles
from training.prior import prior_images, prior_key, prior_pngs
from training.prompt import CLASS_PROMPT

WORST = {
    "worth": -1.0,
    "dino": -1.0,
    "clip_t": -1.0,
    "drift": 1.0,
}  # what a recipe is worth that cannot be trained
NEWS_S = 5.0  # between two looks at whether the gang is alive


class Workplace:
    """A gang and the critics, for one trial after the other."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.storage = bench, Storage(bench.storage_uri)
        self._name = f"raybooth-study-{bench.study}-{uuid4().hex[:8]}"
        self._mailbox: MailboxClient | None = None
        self._gang: GangThread | None = None
        self._critics: dict[str, tuple[Critic, list[Picture]]] = {}
        self._latents: dict[str, tuple[list[Any], list[Any]]] = {}

    def begin(self, values: Mapping[str, Any]) -> "Trial":
        """The trial of a recipe, with what is on record of it."""
        return Trial(self, dict(values))

    def train(self, lease: Lease) -> float:
        """Have a lease trained; returns the seconds until its training began.

        Raises:
            RayboothError: It failed.
        """
        mailbox = self._open()
        began, first_step = time.monotonic(), 0.0
        number = mailbox.post(lease)
        while True:
            events = mailbox.drain(NEWS_S)
            for event in events:
                if event.lease != number:
                    continue
                if event.kind == "started":
                    first_step = time.monotonic() - began
                elif event.kind == "published":
                    return first_step
                elif event.kind == "failed":
                    raise failure_of(event.payload)
            if not events and self._gang and not self._gang.is_alive():
                raise SystemFailure(
                    "the gang of a trial ended", str(self._gang.error), "run it again: it goes on"
                )

    def critic(self, prepared: Prepared) -> tuple[Critic, list[Picture]]:
        """The critic of a subject, and what the base draws of its class."""
        name = prepared.name
        if name not in self._critics:
            bench, run, base = self.bench, prepared.run, prepared.base
            photos = [crops(png, base.image_size, run.data)[0] for png in photo_rows(self.storage, prepared)]
            critic = Critic(
                photos,
                prepared.identity.class_noun,
                open_embedder(bench.dino),
                open_embedder(bench.clip),
            )
            pngs = list(prior_pngs(self.storage, self._prior(prepared), run.prior.num_images))
            of_base = [Picture(CLASS_PROMPT, seed, one) for seed, one in enumerate(decoded(pngs))]
            self._critics[name] = critic, of_base
        return self._critics[name]

    def latents(self, prepared: Prepared) -> tuple[list[Any], list[Any]]:
        """References to the latents of a subject and its class, put into the object store once."""
        name = prepared.name
        if name not in self._latents:
            base, wanted = prepared.base, prepared.run.prior.num_images
            images = prior_images(self.storage, self._prior(prepared), wanted)
            of_class = latent_refs(self.storage, base, images, wanted)
            self._latents[name] = latent_refs(self.storage, base, prepared.subject_images()), of_class
        return self._latents[name]

    def close(self) -> None:
        """Let the gang go."""
        if self._mailbox:
            self._mailbox.stop()
            if self._gang:
                self._gang.join(timeout=10)
            self._mailbox.close()
            self._mailbox = None

    def _prior(self, prepared: Prepared) -> str:
        """The key of the class images, also for a recipe that does not train on them."""
        noun = prepared.identity.class_noun
        return prior_key(prepared.base, prepared.run.prior, noun, self.bench.device)

    def _open(self) -> MailboxClient:
        if self._mailbox is None:
            self._mailbox = create(self._name)
            self._gang = GangThread(lambda: run_gang(self._name, self.bench.shape))
            self._gang.start()
        return self._mailbox


class Trial:
    """One recipe on its way from rung to rung.

    Args:
        workplace: Trains and scores.
        values: The recipe's, by dotted setting.
    """

    def __init__(self, workplace: Workplace, values: dict[str, Any]) -> None:
        self._place, self._bench = workplace, workplace.bench
        self.values, self.key = values, key_of(values)
        known = read_trial(workplace.storage, self._bench.study, self.key)
        self.record: Record = known or {"values": values, "state": "running", "rows": []}
        begun = begun_at(values) if self._bench.population else 0
        self._first = sum(rung <= begun for rung in self._bench.rungs)  # that came before its own
        self._rung = self._first

    def go_on(self, rungs: int) -> None:
        """Have so many rungs told already."""
        self._rung = rungs

    def step(self) -> Record:
        """The next rung: what is on record of it, or what is found by training on; `last` if nothing comes after it.

        Raises:
            SystemFailure: A worker failed.
        """
        rung, rows = self._rung, self.record["rows"]
        self._rung += 1
        place = rung - self._first
        if place >= len(rows) and not (self._bench.population and self.record["state"] == "failed"):
            step, since = self._bench.rungs[rung], self._bench.rungs[rung - 1] if rung else 0
            ended = rung + 1 == len(self._bench.rungs)
            self.record["state"] = "done" if ended else "running"
            try:
                rows.append(self._climb(step, since))
            except (
                UserError
            ) as error:  # such as a learning rate with which it diverges: an answer, and no good one
                rows.append({"step": step, **WORST, "steps_spent": 0, "reason": error.as_json()})
                self.record["state"], ended = "failed", True
            self._place.storage.write_json(trial_path(self._bench.study, self.key), self.record)
            if ended and not self._bench.population:  # of which any history may be needed to the end
                forget(self._place.storage, self._bench, self.key)
        ended = rung + 1 == len(self._bench.rungs)
        over = self.record["state"] in ("stopped", "failed") and place + 1 >= len(rows)
        return {
            **rows[min(place, len(rows) - 1)],
            # a member that is lost says so again at every rung, until it takes over: the others wait for all
            "last": ended or (over and not self._bench.population),
            RUNG: rung + 1,
            LOST: over and self.record["state"] == "failed",
        }

    def _climb(self, until: int, since: int) -> Record:
        began, starts = time.monotonic(), []
        scores: dict[str, Scores] = {}
        for spec in self._bench.specs:
            prepared = prepare(trial_run(self._bench, spec, self.values), self._place.storage)
            lease = self._lease(prepared, until)
            starts.append(self._place.train(lease))
            scores[prepared.name] = self._score(prepared, lease, until)
        return {
            "step": until,
            "worth": sum(map(worth, scores.values())) / len(scores),
            **means(scores),
            "steps_spent": (until - since) * len(scores),
            "seconds": round(time.monotonic() - began, 2),
            "start_s": [round(seconds, 3) for seconds in starts],
            "subjects": {name: one.as_json() for name, one in scores.items()},
        }

    def _lease(self, prepared: Prepared, until: int) -> Lease:
        subject, of_class = self._place.latents(prepared)
        version = version_of(self._bench.study, self.key)
        return prepared.lease(self._bench.storage_uri, version, subject, of_class, None, until)

    def _score(self, prepared: Prepared, lease: Lease, step: int) -> Scores:
        bench = self._bench
        path = grid_path(lease.name, bench.study, self.key, step)
        [picture] = decoded([self._place.storage.read(path)])
        drawn = tiles(picture, bench.num_images, len(bench.prompts) + 1)
        own, of_class = parted(bench.prompts, bench.num_images, drawn)
        critic, of_base = self._place.critic(prepared)
        return critic.score(own, of_class, of_base[: len(of_class)])


def means(scores: Mapping[str, Scores]) -> dict[str, float]:
    """The three objectives, as means over subjects: likeness, obedience, and what the class has lost."""
    count = len(scores)
    drifts = [one.drift.value if one.drift else 0.0 for one in scores.values()]
    return {
        "dino": sum(one.metrics["dino"].value for one in scores.values()) / count,
        "clip_t": sum(one.metrics["clip_t"].value for one in scores.values()) / count,
        "drift": sum(drifts) / count,
    }


def photo_rows(storage: Storage, prepared: Prepared) -> list[bytes]:
    """The photos of a prepared subject that are trained, as PNG bytes."""
    rows = storage.read_rows(f"{prepared.photos.path}/photos.parquet", prepared.photos.digest)
    pngs: list[bytes] = rows["png"]
    return pngs[: len(pngs) - prepared.run.data.holdout]
