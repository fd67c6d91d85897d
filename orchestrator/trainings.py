"""This file is where a training that a client asked the ingress for becomes a campaign of one, left to run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.errors import UserError
from cluster.storage import Storage
from orchestrator.campaign_settings import CampaignSettings, Schedule
from orchestrator.detached import detach
from orchestrator.ledger import Ledger
from orchestrator.manifest import CampaignSpec, Row
from orchestrator.records import ENDED, RunRow
from orchestrator.spec import parse_run
from orchestrator.submission import enroll
from serving.trainer import Happening, TrainingOrder, TrainingState, TrainingStatus
from training.recipe import Run, Track
from training.section import merge

# As a campaign's runs: no sample grids on the way, so that it could be trained in a bank
_ALONE: Mapping[str, Any] = {"validate": {"prompts": []}}
_STATUS: Mapping[str, TrainingStatus] = {
    "queued": "starting",
    "preparing": "starting",
    "training": "processing",
    "publishing": "processing",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "canceled",
}
# Where each setting that a client may give lies in a run
_PLACES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "method": (("train", "method"),),
    "steps": (("train", "steps"),),
    "lr": (("train", "lr"),),
    "rank": (("train", "lora", "rank"), ("train", "lora", "alpha")),
    "pairs_per_step": (("train", "pairs_per_step"),),
    "prior_weight": (("prior", "weight"),),
    "prior_images": (("prior", "num_images"),),
    "train_text_encoder": (("train", "text_encoder", "train"),),
    "flip": (("data", "flip"),),
    "seed": (("train", "seed"),),
}


class CampaignTrainer:
    """Trains subjects as campaigns of one.

    Args:
        storage: The root.
        ledger: URI of the record of campaigns.
        base: What is trained: `pocket`, a folder, or a hub id.
        address: Ray cluster to train on; `None` is this machine.
        defaults: Sections of run.yaml under what clients give.
        track: Where figures go.
    """

    def __init__(
        self,
        storage: Storage,
        ledger: str,
        base: str = "pocket",
        address: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        track: Track | None = None,
    ) -> None:
        self._storage, self._ledger, self._base, self._address = storage, ledger, base, address
        self._defaults, self._track = dict(defaults or {}), track or Track()

    def check(self, order: TrainingOrder) -> None:
        """Refuse what could not be trained; raises UserError."""
        self._run(order)

    def enroll(self, order: TrainingOrder) -> None:
        """Put a training on record."""
        name = campaign_of(order.id)
        alone = Schedule(gangs=1, bank=1)  # nobody to train together with: nothing to measure
        settings = CampaignSettings(name=name, prompts=(), schedule=alone, track=self._track)
        row = Row(order.subject, order.class_noun, order.tenant, 0, self._run(order), None)
        with self._record() as ledger:
            enroll(CampaignSpec(name, {}, [row], settings, f"training {order.id}"), ledger, self._storage)

    def run(self, identity: str) -> None:
        """See that a controller has the campaign."""
        name = campaign_of(identity)
        with self._record() as ledger:
            if ledger.holder(name) or _only(ledger, name).state in ENDED:
                return
        detach(name, self._ledger, self._storage, self._address)

    def state(self, identity: str) -> TrainingState | None:
        """What is on record of it."""
        name = campaign_of(identity)
        with self._record() as ledger:
            try:
                held = ledger.holder(name) is not None
                row = _only(ledger, name)
            except UserError:
                return None
        return TrainingState(
            status=_STATUS[row.state],
            phase=row.phase or row.state,
            step=row.step,
            steps=row.steps,
            held=held,
            rate=row.rate,
            version=row.version if row.state == "succeeded" else None,
            reason=row.reason,
            metrics={key: float(value) for key, value in (row.metrics or {}).items()},
            started=row.started_at,
            finished=row.finished_at,
        )

    def history(self, identity: str) -> Sequence[Happening]:
        """The states that it came into."""
        name = campaign_of(identity)
        with self._record() as ledger:
            moments = ledger.history(_only(ledger, name).id)
        return [Happening(each.at, each.state, each.phase, each.attempt, each.reason) for each in moments]

    def cancel(self, identity: str) -> None:
        """End it, or ask its controller to."""
        with self._record() as ledger:
            ledger.ask(campaign_of(identity), "cancel")

    @contextmanager
    def _record(self) -> Iterator[Ledger]:
        with Ledger(self._ledger) as ledger:
            yield ledger

    def _run(self, order: TrainingOrder) -> Run:
        raw: dict[str, Any] = merge(_ALONE, self._defaults)
        for key, value in order.params.items():
            for place in _PLACES[key]:
                section: Any = value
                for part in reversed(place):
                    section = {part: section}
                raw = merge(raw, section)
        who = {"name": order.subject, "class": order.class_noun, "images": list(order.photos)}
        return parse_run(merge(raw, {"base": {"model": self._base}, "subject": who}))


def campaign_of(identity: str) -> str:
    """The campaign that trains it."""
    return f"training-{identity}"


def _only(ledger: Ledger, campaign: str) -> RunRow:
    """The one run of a campaign; raises UserError when there is none."""
    runs = ledger.runs(campaign)
    if not runs:
        raise UserError(f"there is no campaign {campaign}")
    return runs[0]
