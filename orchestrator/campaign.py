"""This file is where a campaign goes its way: from its manifest on record to its report."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.errors import SystemFailure
from cluster.figures import RayFigures
from cluster.objects import StorageError
from cluster.registry import CANDIDATE, CHAMPION
from cluster.session import gpu_count, session
from cluster.storage import Storage
from orchestrator.batch import BatchResult, OpenRay, draw_batch
from orchestrator.campaign_mirror import CampaignMirror
from orchestrator.campaign_watch import CampaignWatch
from orchestrator.claims import Claim
from orchestrator.controller import Controller
from orchestrator.fleet import FAMILIES, Fleet
from orchestrator.hold import hold
from orchestrator.ledger import Ledger
from orchestrator.manifest import settings_of
from orchestrator.records import ENDED, RunRow, state_of
from orchestrator.report import write_report
from orchestrator.signals import Signals, Terminated
from orchestrator.site import STREAM_CPUS, Site, settled, survey
from orchestrator.tracking import tracking_uri
from orchestrator.wanted import Wanted
from orchestrator.works import CampaignWorks
from training.prior import prior_count
from training.recipe import Cluster
from training.stream import Pool

SOME_FAILED = 3  # the exit code of a campaign of which some subjects did not succeed


@dataclass
class CampaignOutcome:
    """What became of a campaign, as the `--json` contract names it."""

    campaign: str
    state: str
    subjects: list[dict[str, Any]]
    priors: list[dict[str, Any]]
    images: dict[str, Any] | None = None
    """Of its prompts, if it has any."""
    report: str = ""
    seconds: float = 0.0
    reason: dict[str, Any] | None = field(default=None)
    steps_saved: int = 0
    """That subjects did not train because of `train.stop`."""
    gate: dict[str, Any] | None = None
    """Where the campaign has one: how many versions it let pass, and which it held back, with the reasons."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def exit_code(self) -> int:
        """0 only if every subject succeeded, and every image was drawn."""
        drawn = self.images is None or not self.images["failed"]
        return 0 if self.state == "succeeded" and drawn else SOME_FAILED


def run_campaign(
    name: str, ledger: Ledger, storage: Storage, address: str | None, watch: CampaignWatch
) -> CampaignOutcome:
    """Run a campaign that is on record until every run of it has ended; what has ended before is left as it is.

    Args:
        name: Of the campaign.
        ledger: The record.
        storage: Its root.
        address: Ray cluster to join; `None` starts a private one on this machine.
        watch: Shows it.

    Raises:
        UserError: There is no such campaign, another controller has it, or the cluster cannot be used.
        ClaimLost: Another controller has taken it over.
        Interrupted: SIGTERM; what trained is saved.
    """
    signals = Signals()
    with signals.heard(), ledger.claim(name) as claim:
        storage.check_writable()
        return _Journey(name, ledger, claim, storage, watch, signals).run(address)


class _Journey:
    """A campaign with its controller."""

    def __init__(
        self,
        name: str,
        ledger: Ledger,
        claim: Claim,
        storage: Storage,
        watch: CampaignWatch,
        signals: Signals,
    ) -> None:
        self.name, self.ledger, self.claim, self.storage = name, ledger, claim, storage
        self.watch, self.signals = watch, signals
        self.campaign = ledger.campaign(name)
        self.settings = settings_of(self.campaign.manifest)
        self.images: BatchResult | None = None
        self.gate: dict[str, Any] | None = None

    def run(self, address: str | None) -> CampaignOutcome:
        mirror = self._mirror()
        try:
            state = self._go(address, mirror)
        except BaseException as error:
            mirror.finish("interrupted", str(error))
            with suppress(SystemFailure):  # it may be what failed
                what = str(error) or "interrupted"
                reason = {"what": what, "seen": "", "do": f"raybooth campaign resume {self.name}"}
                self.ledger.record_campaign(
                    self.claim, state="stopped", reason=reason, finished_at=time.time()
                )
            raise
        campaign, rows = self.ledger.campaign(self.name), self.ledger.runs(self.name)
        self.watch.show(campaign, rows)
        outcome = outcome_of(self.ledger, self.storage, self.name)
        outcome.images = self.images.as_json() if self.images else None
        outcome.gate = self.gate
        mirror.counts(_counts(rows), campaign.worker_seconds, at_once=True)
        try:
            report = write_report(self.storage, campaign, rows)
            outcome.report = self.storage.full(report)
            mirror.report(report.rpartition("/")[0])
        except StorageError as error:  # what was trained is on record
            self.watch.note(f"the report is not written: {error}")
        mirror.finish(state)
        return outcome

    def _go(self, address: str | None, mirror: CampaignMirror) -> str:
        """Train and draw what is missing, also what is queued anew meanwhile; returns the campaign's state."""
        while unfinished := [row.id for row in self.ledger.runs(self.name) if row.state not in ENDED]:
            self.campaign = self.ledger.campaign(self.name)
            if self._train(unfinished, address, mirror) == "stopped":
                return "stopped"
        if self.images is None and self.gate is None:
            self._draw(Pool(), lambda: session(address, STREAM_CPUS, self.storage))
        state = state_of(self.ledger.runs(self.name))
        if self.ledger.campaign(self.name).state != state:  # it was interrupted while it drew
            self.ledger.record_campaign(self.claim, state=state, reason=None, finished_at=time.time())
        return state

    def _train(self, runs: Sequence[int], address: str | None, mirror: CampaignMirror) -> str:
        clusters = self._clusters(runs)
        site = survey(clusters, self.settings.schedule, address)
        with session(address, site.cpus, self.storage):
            self.signals.listen()  # Ray has taken them
            site = settled(site, clusters, self.settings.schedule)
            with self.signals.patiently():
                state = self._control(site, mirror)
            if state != "stopped":
                gpus = gpu_count() if site.device == "cuda" else 0
                self._draw(Pool(max(gpus, 1), gpus=float(gpus > 0)), nullcontext)
        return state

    def _control(self, site: Site, mirror: CampaignMirror) -> str:
        """Train, until nothing is left to train."""
        with ExitStack() as stack:
            works = CampaignWorks(
                self.name,
                self.storage,
                self.settings.schedule,
                site,
                self.ledger.spec,
                mirror,
                self.watch.note,
                CANDIDATE if self.settings.gate else CHAMPION,
            )
            stack.callback(works.close)

            # a private Ray has nobody who would ask it
            fleet = Fleet(RayFigures(FAMILIES), self.settings.budget) if site.joined else None

            def show(rows: Sequence[RunRow]) -> None:
                if self.signals.leave:
                    controller.stop("terminated")
                if self.watch.due:
                    campaign = self.ledger.campaign(self.name)
                    self.watch.show(campaign, rows)
                    mirror.counts(_counts(rows), campaign.worker_seconds)
                    if fleet:
                        fleet.look(rows, campaign)

            controller = Controller(
                self.ledger,
                self.claim,
                self.campaign,
                self.settings.schedule,
                self.settings.budget,
                works,
                show,
                self.watch.note,
            )
            state = controller.run()
            if fleet:
                fleet.look(controller.roster.rows, self.ledger.campaign(self.name), at_once=True)
        if self.signals.leave:
            raise Terminated("what trained is saved")
        return state

    def _clusters(self, runs: Sequence[int]) -> list[Cluster]:
        """The different demands of the runs on the cluster."""
        specs = self.ledger.specs(runs).values()
        different = {repr(spec["cluster"]): spec["cluster"] for spec in specs if "cluster" in spec}
        return [Cluster.model_validate(cluster) for cluster in different.values()]

    def _draw(self, pool: Pool, ray: OpenRay) -> None:
        """Judge every subject that succeeded, if there is a gate, and draw the campaign's prompts of it."""
        done = [row for row in self.ledger.runs(self.name, "succeeded") if row.version]
        if self.settings.gate and done:
            versions = [(row.name, str(row.version)) for row in done]
            self.gate = hold(self.storage, self.settings.gate, versions, self.watch, pool, ray)
        if not self.settings.prompts or not done:
            return
        wanted = Wanted(tuple(self.settings.prompts), **self.settings.images.model_dump())
        out = Storage(self.storage.full(f"campaigns/{self.name}/images"))
        subjects = [(row.name, str(row.version)) for row in done]
        self.images = draw_batch(self.storage, out, subjects, wanted, pool, self.watch, ray=ray)

    def _mirror(self) -> CampaignMirror:
        """The campaign in MLflow. It must be reachable at the start; what it misses later is a note."""
        track = self.settings.track
        uri = tracking_uri(self.storage, track.mlflow)
        mirror = CampaignMirror(
            uri,
            track.experiment,
            self.storage,
            self.name,
            self.campaign.manifest,
            self.campaign.created_at,
            self.campaign.mlflow_run_id,
            self.watch.note,
        )
        self.ledger.record_campaign(self.claim, mlflow_run_id=mirror.run_id)
        return mirror


def outcome_of(ledger: Ledger, storage: Storage, name: str) -> CampaignOutcome:
    """What is on record of a campaign, as `--json` tells it."""
    campaign, rows = ledger.campaign(name), ledger.runs(name)
    subjects = [
        {
            "name": row.name,
            "state": row.state,
            "reason": dict(row.reason) if row.reason and row.state in ("failed", "cancelled") else None,
            "version": row.version if row.state == "succeeded" else None,
            "artifact": row.artifact,
            "metrics": dict(row.metrics) if row.metrics else None,
            "attempts": row.attempts,
        }
        for row in rows
    ]
    ended = campaign.finished_at or campaign.created_at
    return CampaignOutcome(
        campaign=name,
        state=campaign.state,
        subjects=subjects,
        priors=_priors(rows, storage),
        seconds=round(ended - campaign.created_at, 1),
        steps_saved=sum(row.steps_saved for row in rows),
        reason=dict(campaign.reason) if campaign.reason else None,
    )


def _priors(rows: Sequence[RunRow], storage: Storage) -> list[dict[str, Any]]:
    """The prior sets of a campaign: whose, how many images, how many of them it drew."""
    sets: dict[str, list[RunRow]] = {}
    for row in rows:
        if row.prior_key:
            sets.setdefault(row.prior_key, []).append(row)
    return [
        {
            "key": key,
            "class": of[0].class_noun,
            "images": prior_count(storage, key),
            "drawn": sum(row.prior_drawn for row in of),
            "subjects": len(of),
        }
        for key, of in sets.items()
    ]


def _counts(rows: Sequence[RunRow]) -> dict[str, int]:
    states = [row.state for row in rows]
    return {state: states.count(state) for state in set(states)}
