"""This file is where a run is mirrored in MLflow: its settings, figures, pictures, artifact and end."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.registry import CHAMPION
from cluster.storage import Storage
from orchestrator.tracking import discreet, figures

_CLOCKS = (
    "loss_subject",
    "validation_loss_subject",
    "drawn_score",
)  # one of them is in every row, and tells its step
_STATUS = {"succeeded": "FINISHED", "cancelled": "KILLED", "interrupted": "KILLED", "stopped": "KILLED"}
MIRROR_LIMIT_MIB = 64  # a larger artifact is named in MLflow, not copied there
PARENT_TAG, NOTE_TAG = "mlflow.parentRunId", "mlflow.note.content"  # MLflow's page shows these two


class MlflowTracker:
    """One MLflow run; goes on with `run_id` when there is one, so a restart does not make a second.

    Figures of a step that the run has already are not logged again.

    Args:
        uri: Tracking URI.
        experiment: Experiment name, made when missing.
        storage: Where artifacts go when the experiment is made here on local files.
        run_name: Name of the run in MLflow.
        params: Flat parameters.
        tags: Lineage.
        run_id: The run to go on with.
        parent: The run that this one is shown under, such as its campaign's.
        system_metrics: Whether MLflow's own thread logs what the machine of this process is busy with
            (`system/...`); of several runs at once in one process, one is enough.

    Raises:
        UserError: MLflow cannot be reached there.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        storage: Storage,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None,
        parent: str | None = None,
        system_metrics: bool = True,
    ) -> None:
        # Heavy, and only a run needs it. The run environment would otherwise be asked for git and a progress bar.
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it creates
        self._metric = Metric
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its own 7 take minutes to give up
        try:
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            below = {PARENT_TAG: parent} if parent else {}
            self._went_on = run_id is not None and self._goes_on(run_id, below)
            if self._went_on:
                self._last = {metric: self._last_step(metric) for metric in _CLOCKS}
            else:
                self.run_id = self._create(uri, experiment, storage, run_name, {**tags, **below})
                self._last = dict.fromkeys(_CLOCKS, 0)
                told = [Param(key, discreet(str(value))[:6000]) for key, value in params.items()]
                for start in range(0, len(told), 100):  # MLflow's limit per call
                    self.client.log_batch(self.run_id, params=told[start : start + 100])
            self._system = None
            if system_metrics:
                self._system = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=uri)
                self._system.start()
        except MlflowException as error:
            raise UserError(
                f"MLflow at {discreet(uri)} cannot be used",
                discreet(str(error).splitlines()[0]),
                "check track.mlflow",
            ) from error

    def _goes_on(self, run_id: str, tags: Mapping[str, str]) -> bool:
        """Whether the run is still there, and open again."""
        from mlflow.exceptions import MlflowException

        self.run_id = run_id
        try:
            self.client.update_run(run_id, status="RUNNING")
            for key, value in tags.items():
                self.client.set_tag(run_id, key, value)
        except MlflowException:
            return False
        return True

    def _create(
        self, uri: str, experiment: str, storage: Storage, run_name: str, tags: Mapping[str, str]
    ) -> str:
        """A new run in an experiment, which is made when missing; returns its id."""
        from mlflow.exceptions import MlflowException

        location = f"file://{storage.uri}/mlflow" if uri.startswith("sqlite:") and storage.is_local else None
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            try:
                self.client.create_experiment(experiment, location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process may be faster
                    raise
            found = self.client.get_experiment_by_name(experiment)
        run = self.client.create_run(found.experiment_id, tags=dict(tags), run_name=run_name)
        return str(run.info.run_id)

    def _last_step(self, metric: str) -> int:
        """The last step that the run has a metric of."""
        return max((m.step for m in self.client.get_metric_history(self.run_id, metric)), default=0)

    def metrics(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        now_ms = int(time.time() * 1000)
        values: list[Any] = []
        for row in rows:
            [clock], step = [key for key in _CLOCKS if key in row], int(row["step"] or 0)
            if step > self._last[clock]:
                # the clock last: should a call be cut off, the step it belongs to comes again
                ordered = sorted(figures(row), key=lambda figure: figure[0] == clock)
                values += [self._metric(key, value, now_ms, step) for key, value in ordered]
                self._last[clock] = step
        for start in range(0, len(values), 1000):  # MLflow's limit per call
            self.client.log_batch(self.run_id, metrics=values[start : start + 1000])

    def measure(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures that belong to no step of training, such as how many runs of a campaign are where."""
        now_ms = int(time.time() * 1000)
        told = [self._metric(key, float(value), now_ms, step) for key, value in values.items()]
        self.client.log_batch(self.run_id, metrics=told)

    def document(self, folder: str, name: str, data: bytes) -> None:
        """Keep a file with the run, in a folder of its artifacts; one of that name is replaced."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / name
            file.write_bytes(data)
            self.client.log_artifact(self.run_id, str(file), folder)

    def image(self, name: str, png: bytes, step: int) -> None:
        self.document("samples", f"{name}_{step:06d}.png", png)

    def finish(self, state: str, reason: str | None = None) -> None:
        if self._system is not None:
            self._system.finish()
        if reason or self._went_on:  # which may have failed before, for a reason that is no longer true
            self.client.set_tag(self.run_id, NOTE_TAG, (reason or "")[:5000])
        self.client.set_terminated(self.run_id, _STATUS.get(state, "FAILED"))

    def register(self, name: str, version: str, storage: Storage, path: str, alias: str) -> str:
        """Register a published artifact as a model version with an alias.

        Returns:
            MLflow's number of the version.
        """
        from mlflow.exceptions import MlflowException

        manifest = storage.manifest(path) or {"files": {}}
        small = sum(f["size"] for f in manifest["files"].values()) <= MIRROR_LIMIT_MIB * 2**20
        with storage.verified(path) if small else _manifest_alone(storage, path) as folder:
            self.client.log_artifacts(self.run_id, str(folder), "artifact")
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self.client.get_run(self.run_id).info.artifact_uri}/artifact"
        tags = {"raybooth.version": version, "raybooth.artifact": storage.full(path)}
        before = self.client.search_model_versions(f"run_id='{self.run_id}'")
        made = before[0] if before else self.client.create_model_version(name, source, self.run_id, tags=tags)
        number = str(made.version)
        self.client.set_registered_model_alias(name, alias, number)
        return number


@contextmanager
def _manifest_alone(storage: Storage, path: str) -> Iterator[Path]:
    """A folder that holds the manifest of an artifact too large to copy."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(storage.read(f"{path}/manifest.json"))
        yield Path(folder)


def erase(uri: str, subject: str) -> list[str]:
    """Remove a subject's runs with their files, and its registered model; what was removed, for people.

    MLflow keeps rows of deleted runs until `mlflow gc`; their files go at once.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return []
    client, removed = MlflowClient(tracking_uri=uri, registry_uri=uri), []
    experiments = [each.experiment_id for each in client.search_experiments()]
    tagged = f"tags.`raybooth.subject` = '{subject}'"
    while runs := client.search_runs(experiments, tagged):
        for run in runs:
            with suppress(FileNotFoundError):
                get_artifact_repository(run.info.artifact_uri).delete_artifacts()
            client.delete_run(run.info.run_id)
            removed.append(f"MLflow's run {run.info.run_id}")
    try:
        client.delete_registered_model(subject)
        removed.append(f"MLflow's model {subject}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    return removed


def keep_evaluation(
    uri: str, run_id: str, figures: Mapping[str, float], documents: Mapping[str, bytes]
) -> None:
    """Log the scores of an evaluation (`eval/...`) and its documents, by file name, with the run of a version."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client, now_ms = MlflowClient(tracking_uri=uri, registry_uri=uri), int(time.time() * 1000)
    client.log_batch(
        run_id, metrics=[Metric(f"eval/{key}", value, now_ms, 0) for key, value in figures.items()]
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in documents.items():
            (Path(scratch) / name).write_bytes(data)
        client.log_artifacts(run_id, scratch, "evaluation")


def mirror_alias(uri: str, name: str, number: str) -> None:
    """Move MLflow's alias `champion` of a subject to a version number."""
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=uri, registry_uri=uri).set_registered_model_alias(name, CHAMPION, number)
