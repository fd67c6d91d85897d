"""This file is where figures leave for trackers such as MLflow. The record is ours; what is here mirrors it."""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import UserError
from cluster.storage import Storage
from training.recipe import Track

PREFIXES = {"step": "", "validation": "validation_", "score": "drawn_"}
"""What the figures of an event have before their names, by event."""


def refuse_missing(track: Track) -> None:
    """Refuse a tracker whose package is not installed; nothing is imported.

    Raises:
        UserError: It is not.
    """
    for name, wanted in (("tensorboard", track.tensorboard), ("wandb", track.wandb)):
        if wanted and importlib.util.find_spec(name) is None:
            raise UserError(
                f"track.{name} is set, but {name} is not installed",
                f"No module named {name!r}",
                f"pip install 'raybooth[{name}]'",
            )


class Tracker(Protocol):
    """Takes the figures of one run."""

    def metrics(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        """Figures of steps; every row has a `step`."""
        ...

    def image(self, name: str, png: bytes, step: int) -> None:
        """A picture, such as a sample grid."""
        ...

    def register(self, name: str, version: str, storage: Storage, path: str, alias: str) -> str | None:
        """Take a published artifact as a version of a model, with an alias; its number, if it keeps models."""
        ...

    def finish(self, state: str, reason: str | None = None) -> None:
        """Nothing more comes; `state` is the run's last one, and `reason` what ended it."""
        ...


class Mirrors:
    """Every tracker of a run. One that fails is a note for people and never the end of the run.

    Args:
        trackers: All of them; they are told in this order.
        note: Told of a failure, once per tracker.
    """

    def __init__(self, trackers: Sequence[Tracker], note: Callable[[str], None]) -> None:
        self.trackers = trackers
        self._note = note
        self._failed: set[int] = set()

    def metrics(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        """Figures of steps, to every tracker."""
        self.each(lambda tracker: tracker.metrics(rows))

    def image(self, name: str, png: bytes, step: int) -> None:
        """A picture, to every tracker."""
        self.each(lambda tracker: tracker.image(name, png, step))

    def finish(self, state: str, reason: str | None = None) -> None:
        """The run's last state, to every tracker."""
        self.each(lambda tracker: tracker.finish(state, reason))

    def register(self, name: str, version: str, storage: Storage, path: str, alias: str) -> str | None:
        """The number of the registered version; `None` when no tracker keeps models, or it failed."""
        numbers: list[str | None] = []
        self.each(lambda tracker: numbers.append(tracker.register(name, version, storage, path, alias)))
        return next((number for number in numbers if number), None)

    def each(self, act: Callable[[Tracker], None]) -> None:
        """Do something with every tracker."""
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
    prefix = PREFIXES.get(entry["event"])
    if prefix is None:
        return {}
    said = {key: value for key, value in entry.items() if key not in ("event", "time", "step")}
    return {"step": entry["step"]} | {prefix + key: value for key, value in said.items()}


def tracking_uri(storage: Storage, setting: str | None) -> str:
    """The MLflow URI of a run: the setting, else MLFLOW_TRACKING_URI, else SQLite in the storage root.

    A remote root cannot hold a SQLite file, so there the file lies in the working folder.
    """
    folder = Path(storage.uri) if storage.is_local else Path.cwd()
    return setting or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"


class TensorBoardTracker:
    """TensorBoard event files in `folder`.

    Args:
        folder: A local folder.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # a run that goes on is written again from its first step, in place of what is there
        self.writer = SummaryWriter(str(folder), purge_step=0)

    def metrics(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        for row in rows:
            for key, value in figures(row):
                self.writer.add_scalar(key, value, int(row["step"] or 0))

    def image(self, name: str, png: bytes, step: int) -> None:
        from training.png import decode_png

        self.writer.add_image(name, decode_png(png), step, dataformats="HWC")

    def register(self, name: str, version: str, storage: Storage, path: str, alias: str) -> None:
        return None

    def finish(self, state: str, reason: str | None = None) -> None:
        self.writer.close()


def figures(row: Mapping[str, float | None]) -> Iterator[tuple[str, float]]:
    """The figures of a step; one that does not exist, such as the lr of a frozen part, is left out."""
    return ((key, float(value)) for key, value in row.items() if key != "step" and value is not None)


def discreet(text: str) -> str:
    """A text without who signs in at the URIs in it: `s3://key:secret@bucket` becomes `s3://***@bucket`."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c` keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat
