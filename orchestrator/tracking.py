"""This file is where figures leave for MLflow and TensorBoard. The record is ours; what is here mirrors it."""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import UserError
from cluster.registry import CHAMPION
from cluster.storage import Storage

_CLOCKS = ("loss_subject", "validation_loss_subject")  # one of them is in every row, and tells its step
MIRROR_LIMIT_MIB = 64  # a larger artifact is named in MLflow, not copied there


class Tracker(Protocol):
    """Takes the figures of one run."""

    def metrics(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        """Figures of steps; every row has a `step`."""
        ...

    def image(self, name: str, png: bytes, step: int) -> None:
        """A picture, such as a sample grid."""
        ...

    def finish(self, state: str) -> None:
        """Nothing more comes; `state` is the run's last one."""
        ...


class Mirrors:
    """Every tracker of a run. One that fails is a note for people and never the end of the run.

    Args:
        trackers: The first is MLflow's, if there is any.
        note: Told of a failure, once per tracker.
    """

    def __init__(self, trackers: Sequence[Tracker], note: Callable[[str], None]) -> None:
        self.trackers = trackers
        self._note = note
        self._failed: set[int] = set()

    def metrics(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        """Figures of steps, to every tracker."""
        self._each(lambda tracker: tracker.metrics(rows))

    def image(self, name: str, png: bytes, step: int) -> None:
        """A picture, to every tracker."""
        self._each(lambda tracker: tracker.image(name, png, step))

    def finish(self, state: str) -> None:
        """The run's last state, to every tracker."""
        self._each(lambda tracker: tracker.finish(state))

    def register(self, name: str, version: str, storage: Storage, path: str) -> str | None:
        """MLflow's number of the registered version; `None` when MLflow failed."""
        numbers: list[str] = []

        def tell(tracker: Tracker) -> None:
            if isinstance(tracker, MlflowTracker):
                numbers.append(tracker.register(name, version, storage, path))

        self._each(tell)
        return numbers[0] if numbers else None

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for number, tracker in enumerate(self.trackers):
            try:
                act(tracker)
            except Exception as error:
                if number not in self._failed:
                    self._note(f"{type(tracker).__name__} missed something: {str(error).splitlines()[0]}")
                self._failed.add(number)


def mirror(said: Sequence[Mapping[str, Any]], mirrors: Mirrors, storage: Storage) -> None:
    """Have mirrored what a run said, as its `events.jsonl` has it: figures of steps, validations, samples.

    What is mirrored already may come again.
    """
    rows = [row for row in map(_row, said) if row]
    if rows:
        mirrors.metrics(rows)
    for entry in said:
        if entry["event"] == "sample" and storage.exists(entry["path"]):
            mirrors.image("samples", storage.read(entry["path"]), entry["step"])


def _row(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures in an entry by the names that trackers show; empty where there are none."""
    prefix = {"step": "", "validation": "validation_"}.get(entry["event"])
    if prefix is None:
        return {}
    figures = {key: value for key, value in entry.items() if key not in ("event", "time", "step")}
    return {"step": entry["step"]} | {prefix + key: value for key, value in figures.items()}


def tracking_uri(storage: Storage, setting: str | None) -> str:
    """The MLflow URI of a run: the setting, else MLFLOW_TRACKING_URI, else SQLite in the storage root.

    A remote root cannot hold a SQLite file, so there the file lies in the working folder.
    """
    folder = Path(storage.uri) if storage.is_local else Path.cwd()
    return setting or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"


class MlflowTracker:
    """One MLflow run; goes on with `run_id` when there is one, so a restart does not make a second.

    Figures of a step that the run has already are not logged again. Meanwhile MLflow's own thread logs what the
    machine of this process is busy with (`system/...`).

    Args:
        uri: Tracking URI.
        experiment: Experiment name, made when missing.
        storage: Where artifacts go when the experiment is made here on local files.
        run_name: Name of the run in MLflow.
        params: Flat parameters.
        tags: Lineage.
        run_id: The run to go on with.

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
    ) -> None:
        # Heavy, and only a run needs it. The run environment would otherwise be asked for git and a progress bar.
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it creates
        self._metric = Metric
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its own 7 take minutes to give up
        try:
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            if not (run_id and self._goes_on(run_id)):
                self.run_id = self._create(uri, experiment, storage, run_name)
                self.client.log_batch(
                    self.run_id,
                    params=[Param(key, str(value)[:6000]) for key, value in params.items()],
                    tags=[RunTag(key, value) for key, value in tags.items()],
                )
            self._last = {metric: self._last_step(metric) for metric in _CLOCKS}
            self._system = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=uri)
            self._system.start()
        except MlflowException as error:
            raise UserError(
                f"MLflow at {uri} cannot be used", str(error).splitlines()[0], "check track.mlflow"
            ) from error

    def _goes_on(self, run_id: str) -> bool:
        """Whether the run is still there, and open again."""
        from mlflow.exceptions import MlflowException

        self.run_id = run_id
        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException:
            return False
        return True

    def _create(self, uri: str, experiment: str, storage: Storage, run_name: str) -> str:
        """A new run in an experiment, which is made when missing; returns its id."""
        found = self.client.get_experiment_by_name(experiment)
        location = f"file://{storage.uri}/mlflow" if uri.startswith("sqlite:") and storage.is_local else None
        made = found.experiment_id if found else self.client.create_experiment(experiment, location)
        return str(self.client.create_run(made, run_name=run_name).info.run_id)

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
                figures = sorted(_figures(row), key=lambda figure: figure[0] == clock)
                values += [self._metric(key, value, now_ms, step) for key, value in figures]
                self._last[clock] = step
        for start in range(0, len(values), 1000):  # MLflow's limit per call
            self.client.log_batch(self.run_id, metrics=values[start : start + 1000])

    def image(self, name: str, png: bytes, step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}_{step:06d}.png"
            file.write_bytes(png)
            self.client.log_artifact(self.run_id, str(file), "samples")

    def finish(self, state: str) -> None:
        status = {"succeeded": "FINISHED", "cancelled": "KILLED", "interrupted": "KILLED"}.get(
            state, "FAILED"
        )
        self._system.finish()
        self.client.set_terminated(self.run_id, status)

    def register(self, name: str, version: str, storage: Storage, path: str) -> str:
        """Register a published artifact as a model version with the alias `champion`.

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
        self.client.set_registered_model_alias(name, CHAMPION, number)
        return number


@contextmanager
def _manifest_alone(storage: Storage, path: str) -> Iterator[Path]:
    """A folder that holds the manifest of an artifact too large to copy."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(storage.read(f"{path}/manifest.json"))
        yield Path(folder)


def mirror_alias(uri: str, name: str, number: str) -> None:
    """Move MLflow's alias `champion` of a subject to a version number."""
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=uri, registry_uri=uri).set_registered_model_alias(name, CHAMPION, number)


class TensorBoardTracker:
    """TensorBoard event files in `folder`.

    Args:
        folder: A local folder.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise UserError(
                "track.tensorboard is true, but TensorBoard is not installed",
                str(error),
                "pip install 'raybooth[tensorboard]'",
            ) from error

        # a run that goes on is written again from its first step, in place of what is there
        self.writer = SummaryWriter(str(folder), purge_step=0)

    def metrics(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        for row in rows:
            for key, value in _figures(row):
                self.writer.add_scalar(key, value, int(row["step"] or 0))

    def image(self, name: str, png: bytes, step: int) -> None:
        from training.png import decode_png

        self.writer.add_image(name, decode_png(png), step, dataformats="HWC")

    def finish(self, state: str) -> None:
        self.writer.close()


def _figures(row: Mapping[str, float | None]) -> Iterator[tuple[str, float]]:
    """The figures of a step; one that does not exist, such as the lr of a frozen part, is left out."""
    return ((key, float(value)) for key, value in row.items() if key != "step" and value is not None)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c` keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat
