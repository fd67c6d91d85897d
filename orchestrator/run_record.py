"""This file is where a run is on record while it is trained: its state, log and mirrors, and in the end its version.

The record is written before the act, so that whoever comes after a driver that was killed can go on.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.mailbox import Event
from cluster.registry import CHAMPION, Registry
from cluster.storage import Storage
from orchestrator.events import EventLog
from orchestrator.mlflow_tracker import MlflowTracker
from orchestrator.prepare import Destination, Prepared, record_path, run_path
from orchestrator.tracking import (
    Mirrors,
    TensorBoardTracker,
    Tracker,
    flatten,
    mirror,
    tracking_uri,
)
from orchestrator.wandb_tracker import WandbTracker
from training import checkpoint
from training.artifact import artifact_path
from training.figures import rows_kept
from training.lease import Lease

MakeMlflow = Callable[[str, Mapping[str, Any], Mapping[str, str], str | None], Tracker | None]
"""The tracker of a run from its title, parameters, tags and the MLflow run to go on with; `None` when it failed."""


class RunRecord:
    """One run of one version.

    Args:
        storage: Root.
        prepared: The run.
        goal: Its version, and what is on record of it.
        note: Takes lines for people.
    """

    def __init__(
        self, storage: Storage, prepared: Prepared, goal: Destination, note: Callable[[str], None]
    ) -> None:
        self.storage, self.prepared, self.version, self._note = storage, prepared, goal.version, note
        self.path = run_path(prepared.name, goal.version)
        self.artifact = artifact_path(prepared.name, goal.version)
        self.mirrors = Mirrors([], note)
        self._log: EventLog | None = None
        self._record: dict[str, Any] = goal.record or {
            "fingerprint": prepared.fingerprint,
            "photos": prepared.photos.key,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": prepared.run.model_dump(mode="json", by_alias=True),
        }

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id of the run, once it is tracked."""
        found = self._record.get("mlflow", {}).get("run_id")
        return str(found) if found else None

    def becomes(self, state: str, reason: str | None = None) -> None:
        """Put a state on record, and what was said before it."""
        if self._log:
            self._log.flush()
        self._record |= {"state": state, "reason": reason}
        self.storage.write_json(record_path(self.prepared.name, self.version), self._record)

    def track(self, make: MakeMlflow | None = None) -> None:
        """Open its trackers; goes on with the MLflow run that is on record.

        Args:
            make: Makes the tracker for MLflow; `None` makes one of its own.

        Raises:
            UserError: MLflow cannot be reached.
        """
        run, prepared = self.prepared.run, self.prepared
        params = flatten(run.model_dump(mode="json", by_alias=True, exclude={"track"}))
        tags = {
            "raybooth.subject": prepared.name,
            "raybooth.version": self.version,
            "raybooth.fingerprint": prepared.fingerprint,
            "raybooth.base_revision": prepared.base.revision,
            "raybooth.photos": prepared.photos.key,
        }
        uri = tracking_uri(self.storage, run.track.mlflow)
        before = self._record.get("mlflow", {})
        run_id = before.get("run_id") if before.get("uri") == uri else None
        title = f"{prepared.name}-{self.version}"
        mlflow = (
            make(title, params, tags, run_id)
            if make
            else MlflowTracker(uri, run.track.experiment, self.storage, title, params, tags, run_id)
        )
        trackers: list[Tracker] = [mlflow] if mlflow else []
        self._record["mlflow"] = {"uri": uri, "run_id": getattr(mlflow, "run_id", None)}
        self.becomes(self._record.get("state", "preparing"))
        if run.track.tensorboard:
            root = Path(self.storage.uri) if self.storage.is_local else Path("raybooth-tensorboard")
            trackers.append(TensorBoardTracker(root / self.path / "tensorboard"))
        if run.track.wandb:
            trackers += self._wandb(title, params, tags)
        self.mirrors = Mirrors(trackers, self._note)

    def _wandb(self, title: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> list[Tracker]:
        """The tracker for W&B, whose run is on record; none when it failed."""
        track = self.prepared.run.track
        project = track.experiment if track.wandb is True else str(track.wandb)
        before = self._record.get("wandb", {})
        run_id = before.get("run_id") if before.get("project") == project else None
        root = Path(self.storage.uri) if self.storage.is_local else Path("raybooth-wandb")
        try:
            tracker = WandbTracker(project, root / self.path, title, params, tags, run_id, self._note)
        except Exception as error:  # of whatever kind: the record is ours
            said = [*str(error).strip().splitlines(), type(error).__name__][0]
            self._note(f"W&B cannot be used: {said}")
            return []
        if tracker.run_id:
            self._record["wandb"] = {"project": project, "run_id": tracker.run_id, "url": tracker.url}
            self.becomes(self._record.get("state", "preparing"))
        return [tracker]

    @property
    def log(self) -> EventLog:
        """Its `events.jsonl`; what is there already is mirrored again, as who wrote it may not have come to it."""
        if self._log is None:
            self._log = EventLog(self.storage, f"{self.path}/events.jsonl")
            mirror(self._log.before, self.mirrors, self.storage)
        return self._log

    def heard(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Write down and mirror what its gang said; returns what was not known before, as it is written."""
        said = self.log.add(events)
        mirror(said, self.mirrors, self.storage)
        return said

    def published(self) -> dict[str, float] | None:
        """The metrics of its artifact, should it be there already; its driver may have died before the last steps."""
        done = self.storage.manifest(self.artifact)
        if not done or done["fingerprint"] != self.prepared.fingerprint:
            return None
        kept = rows_kept(self.storage, f"{self.path}/{checkpoint.ROWS}", self.prepared.run.train.steps)
        self.heard([Event(0, 0, "step", row) for row in kept])
        return dict(done["metrics"])

    def lease(self, subject: Sequence[Any], of_class: Sequence[Any], prior_key: str | None) -> Lease:
        """The run as a gang takes it, with references to its latents and those of its class."""
        return self.prepared.lease(self.storage.uri, self.version, subject, of_class, prior_key)

    def register(self, metrics: Mapping[str, float], prior_key: str | None, alias: str = CHAMPION) -> None:
        """Register the artifact. Our record goes last: what is in it is done, and a restart repeats the rest."""
        prepared = self.prepared
        self.log.flush()  # the figures that the gang keeps are deleted when the run has succeeded
        number = self.mirrors.register(prepared.name, self.version, self.storage, self.artifact, alias)
        Registry(self.storage).add(
            prepared.name,
            self.version,
            {
                "artifact": self.artifact,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "fingerprint": prepared.fingerprint,
                "method": prepared.run.train.method,
                "base": prepared.base.model,
                "class": prepared.identity.class_noun,
                "identifier": prepared.identity.identifier,
                "metrics": {key: float(value) for key, value in metrics.items()},
                "prior_key": prior_key,
                "mlflow": {**self._record["mlflow"], "version": number},
            },
            alias,
        )

    def succeeded(self) -> None:
        """End the record; checkpoints are not needed any more."""
        self.mirrors.finish("succeeded")
        checkpoint.delete(self.storage, self.path)
        self.storage.remove(f"{self.path}/gang")
        self.becomes("succeeded")

    def ended(self, state: str, reason: str | None = None) -> None:
        """End the record without an artifact."""
        self.becomes(state, reason)
        self.mirrors.finish(state, reason)
