"""This file is where the ledger's facts have their names: campaigns, their runs, and what is asked of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RUN_STATES = ("queued", "preparing", "training", "publishing", "succeeded", "failed", "cancelled")
ENDED = ("succeeded", "failed", "cancelled")
CAMPAIGN_STATES = ("queued", "running", "succeeded", "failed", "cancelled", "stopped")

Reason = Mapping[str, Any]
"""`what, seen, do`, and the `kind` of failure where there is one."""


@dataclass(frozen=True)
class NewRun:
    """A row of a manifest on its way into the ledger.

    One with a mistake has a `reason`, and need not have a spec: it is enrolled as failed.
    """

    name: str
    class_noun: str
    tenant: str
    priority: int
    steps: int
    spec: Mapping[str, Any] | None
    """The run as `run.yaml` has it, complete."""
    reason: Reason | None = None


@dataclass(frozen=True)
class RunRow:
    """What is on record of a run, but for its spec, which is read alone. Times are seconds since the epoch."""

    id: int
    position: int
    """In the manifest, from 0; ones no longer listed come last."""
    name: str
    class_noun: str
    tenant: str
    priority: int
    """Higher goes first."""
    steps: int
    state: str
    phase: str | None
    """What is done within the state, for people."""
    step: int
    version: str | None
    fingerprint: str | None
    prior_key: str | None
    group_no: int | None
    """The unit that a gang takes; `None` until it is decided."""
    width: int | None
    """Of the bank that trains it: the run's bits are a function of its recipe and this."""
    attempts: int
    """Tries begun that count."""
    kills: int
    """How often it ended its gang."""
    smaller: int
    """How far it was made to need less memory: see `orchestrator.recovery.Size`."""
    reason: Reason | None
    metrics: Mapping[str, float] | None
    artifact: str | None
    mlflow_run_id: str | None
    prior_drawn: int
    """Class images drawn on its behalf."""
    gang: str | None
    rate: float | None
    """Steps per second."""
    loss_subject: float | None
    loss_class: float | None
    started_at: float | None
    finished_at: float | None

    @property
    def steps_saved(self) -> int:
        """Steps that it did not train because its drawings gained no more."""
        return saved_of(self.metrics or {})


def saved_of(metrics: Mapping[str, float]) -> int:
    """Of a run's metrics, the steps that it did not train because its drawings gained no more."""
    return int(metrics.get("steps_saved", 0))


@dataclass(frozen=True)
class CampaignRow:
    """What is on record of a campaign. Times are seconds since the epoch."""

    name: str
    storage_uri: str
    state: str
    reason: Reason | None
    manifest: Mapping[str, Any]
    """Prompts, budget, settings: all but the runs."""
    created_at: float
    finished_at: float | None
    worker_seconds: float
    """That workers of its gangs were there; those of CPU cores and GPUs that they held likewise."""
    cpu_seconds: float
    gpu_seconds: float
    mlflow_run_id: str | None
    owner: Mapping[str, Any] | None
    """The controller that holds it, as `cluster.owner` has it; it may have ended without letting go."""
    heartbeat_at: float | None


@dataclass(frozen=True)
class Enrolled:
    """What an enrolment did: names of runs, each list in the manifest's order."""

    added: list[str]
    changed: list[str]
    """Another recipe than before, or none that can be used: they start anew."""
    kept: list[str]
    dropped: list[str]
    """No longer listed; they stay as they are."""


@dataclass(frozen=True)
class Change:
    """Fields of a `RunRow` to record."""

    run_id: int
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Moment:
    """A state that a run came into."""

    run_id: int
    at: float
    state: str
    phase: str | None
    attempt: int
    reason: Reason | None


@dataclass(frozen=True)
class Wish:
    """What somebody asks of the controller: `cancel`, or to look again at runs that are queued anew (`requeue`)."""

    id: int
    wish: str
    run_ids: Sequence[int] | None
    """`None` means all, the campaign itself."""


@dataclass(frozen=True)
class Asked:
    """What came of a wish."""

    names: list[str]
    """The runs that it is about."""
    holder: str | None
    """The controller that will see to it, for people; `None` when there is none and it is done already."""


def state_of(rows: Sequence[RunRow]) -> str:
    """The state of a campaign of which every run has ended."""
    states = {row.state for row in rows}
    if states <= {"succeeded"}:
        return "succeeded"
    return "cancelled" if states <= {"succeeded", "cancelled"} else "failed"
