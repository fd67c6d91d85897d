"""This file is where a campaign is mirrored in MLflow: a run of its own, and one below it for every subject."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import UserError
from cluster.storage import Storage
from orchestrator.mlflow_tracker import MlflowTracker
from orchestrator.tracking import Mirrors, Tracker, flatten

COUNTS_EVERY_S = 10.0  # a curve of an hour has 360 points
REST_S = 60.0  # after a failure: each try of an MLflow that is gone waits for it
_ROWS = ("rows", "subjects")  # every subject has a run for what is its own


class CampaignMirror:
    """The parent run of a campaign in MLflow, and the door to the runs of its subjects.

    It alone samples what the machine is busy with. What MLflow misses once the campaign is on its way is a note for
    people and ends nothing.

    Args:
        uri: Tracking URI.
        experiment: Experiment name, made when missing.
        storage: Root of the campaign.
        name: Of the campaign.
        manifest: As the ledger keeps it; its settings become parameters.
        created_at: Epoch seconds that the curves of counts begin at.
        run_id: The run to go on with.
        note: Told of a failure.

    Raises:
        UserError: MLflow cannot be reached there.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        storage: Storage,
        name: str,
        manifest: Mapping[str, Any],
        created_at: float,
        run_id: str | None,
        note: Callable[[str], None],
    ) -> None:
        self._uri, self._experiment, self._storage = uri, experiment, storage
        self._name, self._created_at, self._note = name, created_at, note
        settings = flatten({key: value for key, value in manifest.items() if key not in _ROWS})
        tags = {"raybooth.campaign": name}
        self._run = MlflowTracker(uri, experiment, storage, f"campaign {name}", settings, tags, run_id)
        self._mirrors = Mirrors([self._run], note)
        self._counted_at: float | None = None
        self._rests_until = 0.0

    @property
    def run_id(self) -> str:
        """MLflow's id of the campaign's run."""
        return self._run.run_id

    def of_run(
        self, title: str, params: Mapping[str, Any], tags: Mapping[str, str], run_id: str | None
    ) -> MlflowTracker | None:
        """The run of one subject, below the campaign's; `None` when MLflow failed.

        Args:
            title: Name of the run in MLflow, such as `rex-v1`.
            params: Flat parameters.
            tags: Lineage.
            run_id: The run to go on with.
        """
        now, labels = time.monotonic(), {**tags, "raybooth.campaign": self._name}
        if now < self._rests_until:
            return None
        try:
            return MlflowTracker(
                self._uri,
                self._experiment,
                self._storage,
                title,
                params,
                labels,
                run_id,
                parent=self.run_id,
                system_metrics=False,
            )
        except UserError as error:
            if not self._rests_until:
                self._note(f"{error.what}: some runs are not mirrored there ({error.seen})")
            self._rests_until = now + REST_S
            return None

    def counts(self, states: Mapping[str, int], worker_seconds: float, at_once: bool = False) -> None:
        """Log how many runs are in which state; at most every `COUNTS_EVERY_S` seconds unless `at_once`."""
        now = time.monotonic()
        if not at_once and self._counted_at is not None and now - self._counted_at < COUNTS_EVERY_S:
            return
        self._counted_at = now
        age_s = max(int(time.time() - self._created_at), 0)
        values = {f"runs/{state}": float(count) for state, count in states.items()}
        values |= {"succeeded": float(states.get("succeeded", 0)), "failed": float(states.get("failed", 0))}
        values["worker_seconds"] = worker_seconds
        self._mirrors.each(lambda _: self._run.measure(age_s, values))

    def report(self, folder: str) -> None:
        """Keep the campaign's report, a folder in storage, with its run."""

        def keep(_: Tracker) -> None:
            for name in self._storage.names(folder):
                self._run.document("report", name, self._storage.read(f"{folder}/{name}"))

        self._mirrors.each(keep)

    def finish(self, state: str, reason: str | None = None) -> None:
        """Nothing more comes; `state` is the campaign's last one."""
        self._mirrors.finish(state, reason)
