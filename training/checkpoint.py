"""This file is where a run's state is saved and found again: what a restart goes on from.

One safetensors of the trained parameters (`p/NAME`), their moments (`m/NAME`, `v/NAME`) and their average (`e/NAME`,
when there is one), whole and fp32, whatever the number of workers and the ZeRO stage were. An optimizer that remembers
anything else has that under `o/`. The rest (lr, order of images, noise) is a function of the step and not saved.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cluster.errors import SystemFailure
from cluster.storage import Storage

FILE = "state.safetensors"
ROWS = "figures.jsonl"  # beside the checkpoints: the figures of the steps that they have behind them
FORMAT = 1
_PREFIX = "step_"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class State:
    """Trained parameters and their moments by parameter name, fp32, whole, after `step` steps."""

    step: int
    parameters: Tensors
    first_moments: Tensors
    second_moments: Tensors
    average: Tensors | None = None
    """Of the parameters; `None` when none is kept."""
    optimizer: Tensors = field(default_factory=dict)
    """All of an optimizer without such moments, as `training/optimizers.py` names it."""

    @property
    def weights(self) -> Tensors:
        """What would be published: the average, when there is one."""
        return self.parameters if self.average is None else self.average


def checkpoints_path(run_path: str) -> str:
    """Where a run keeps its checkpoints."""
    return f"{run_path}/checkpoints"


def steps_saved(storage: Storage, run_path: str) -> list[int]:
    """Steps that have a checkpoint with a manifest, oldest first."""
    folder = checkpoints_path(run_path)
    names = (n for n in storage.names(folder) if n.startswith(_PREFIX) and n[len(_PREFIX) :].isdigit())
    return sorted(int(n[len(_PREFIX) :]) for n in names if storage.manifest(f"{folder}/{n}") is not None)


def save(
    storage: Storage,
    run_path: str,
    state: State,
    fingerprint: str,
    keep: int,
    keep_best: bool = True,
    facts: Mapping[str, Any] | None = None,
    spare: int | None = None,
) -> None:
    """Publish `state`, then delete all but the newest `keep` checkpoints and the best. Only one rank calls this.

    Args:
        storage: Root that holds the run.
        run_path: `runs/NAME/VERSION`.
        state: What to save.
        fingerprint: Of the recipe that trains.
        keep: Newest checkpoints to keep.
        keep_best: Whether to keep the one with the lowest validation loss besides.
        facts: Further keys of the manifest: `validation_loss` (`None` where it is no candidate), `world`, `zero_stage`,
            `looks`.
        spare: The step of another one to keep.

    Raises:
        SystemFailure: It cannot be written; nothing of it is visible.
    """
    groups = {"p": state.parameters, "m": state.first_moments, "v": state.second_moments}
    groups |= {"e": state.average} if state.average is not None else {}
    groups |= {"o": state.optimizer}
    tensors = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
    meta = {
        "kind": "raybooth-checkpoint",
        "format": FORMAT,
        "step": state.step,
        "fingerprint": fingerprint,
        **(facts or {}),
    }
    path = _at(run_path, state.step)
    try:
        with tempfile.TemporaryDirectory(prefix="raybooth-") as scratch:
            save_file(tensors, Path(scratch) / FILE)
            storage.publish(Path(scratch), path, meta)
    except (OSError, SafetensorError) as error:
        raise SystemFailure(
            f"the checkpoint {storage.full(path)} could not be written", str(error)
        ) from error
    spared = {step for _, step in ranked(storage, run_path, fingerprint)[:1]} if keep_best else set()
    for step in steps_saved(storage, run_path)[:-keep]:
        if step not in spared and step != spare:
            storage.remove(_at(run_path, step))


def ranked(storage: Storage, run_path: str, fingerprint: str) -> list[tuple[float, int]]:
    """Validation loss and step of the checkpoints that have one, the lowest first; of equal ones the earliest."""
    steps = steps_saved(storage, run_path)
    manifests = [(step, storage.manifest(_at(run_path, step)) or {}) for step in steps]
    return sorted(
        (float(manifest["validation_loss"]), step)
        for step, manifest in manifests
        if manifest.get("fingerprint") == fingerprint and manifest.get("validation_loss") is not None
    )


def best(
    storage: Storage, run_path: str, fingerprint: str, below: float, note: Callable[[str], None]
) -> tuple[float, State] | None:
    """The whole checkpoint with the lowest validation loss, and that loss, if it is less than `below`.

    `note` is told of each one that had to be skipped.
    """
    for loss, step in ranked(storage, run_path, fingerprint):
        if loss < below and (state := _whole(storage, run_path, step, fingerprint, note)):
            return loss, state
    return None


def looks(storage: Storage, run_path: str, step: int) -> list[Mapping[str, Any]]:
    """What was found of the run's drawings up to the checkpoint of `step`."""
    return list((storage.manifest(_at(run_path, step)) or {}).get("looks", ()))


def load(storage: Storage, run_path: str, step: int, fingerprint: str) -> State:
    """The checkpoint of `step`, checked against its manifest.

    Raises:
        SystemFailure: It is missing or damaged, or belongs to another recipe.
    """
    path = _at(run_path, step)
    manifest = storage.manifest(path) or {}
    if (manifest.get("format"), manifest.get("fingerprint")) != (FORMAT, fingerprint):
        raise SystemFailure(f"{storage.full(path)} is missing or was made with other settings")
    with storage.verified(path) as folder:
        try:
            tensors = load_file(folder / FILE)
        except (OSError, SafetensorError) as error:
            raise SystemFailure(f"{storage.full(path)}/{FILE} cannot be read", str(error)) from error
    split = {
        group: {name[2:]: t for name, t in tensors.items() if name.startswith(f"{group}/")}
        for group in "pmveo"
    }
    return State(step, split["p"], split["m"], split["v"], split["e"] or None, split["o"])


def latest(storage: Storage, run_path: str, fingerprint: str, note: Callable[[str], None]) -> State | None:
    """The newest checkpoint that is whole; `None` when there is none.

    Args:
        storage: Root that holds the run.
        run_path: `runs/NAME/VERSION`.
        fingerprint: Of the recipe that trains.
        note: Told, for people, of each one that had to be skipped.
    """
    steps = reversed(steps_saved(storage, run_path))
    found = (_whole(storage, run_path, step, fingerprint, note) for step in steps)
    return next((state for state in found if state is not None), None)


def adopt(
    storage: Storage, run_path: str, fingerprint: str, donor: str, donors_fingerprint: str, step: int
) -> bool:
    """Have a run go on from a checkpoint of another one, whose recipe is the same up to there; a copy of it.

    Args:
        storage: Root that holds both.
        run_path: `runs/NAME/VERSION` of the run that is to go on.
        fingerprint: Of its recipe.
        donor: `runs/NAME/VERSION` of the other.
        donors_fingerprint: Of the other's recipe.
        step: Of the checkpoint.

    Returns:
        Whether there is such a checkpoint, and it is whole.

    Raises:
        StorageError: It cannot be read, or the copy not be written.
    """
    manifest = storage.manifest(_at(donor, step)) or {}
    if (manifest.get("format"), manifest.get("fingerprint")) != (FORMAT, donors_fingerprint):
        return False
    facts = {key: value for key, value in manifest.items() if key != "files"}
    try:
        with storage.verified(_at(donor, step)) as folder:
            storage.publish(folder, _at(run_path, step), {**facts, "fingerprint": fingerprint})
    except SystemFailure:  # it is damaged
        return False
    if storage.exists(f"{donor}/{ROWS}"):
        storage.write(f"{run_path}/{ROWS}", storage.read(f"{donor}/{ROWS}"))
    return True


def delete(storage: Storage, run_path: str) -> None:
    """Delete what a run would go on from: every checkpoint, and the figures that the log has by now."""
    storage.remove(checkpoints_path(run_path))
    storage.remove(f"{run_path}/{ROWS}")


def _at(run_path: str, step: int) -> str:
    return f"{checkpoints_path(run_path)}/{_PREFIX}{step:06d}"


def _whole(
    storage: Storage, run_path: str, step: int, fingerprint: str, note: Callable[[str], None]
) -> State | None:
    try:
        return load(storage, run_path, step, fingerprint)
    except SystemFailure as error:
        note(f"the checkpoint of step {step} is skipped: {error}")
        return None
