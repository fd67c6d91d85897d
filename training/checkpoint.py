"""This file is where a run's state is saved and found again: what a restart goes on from.

One safetensors of the trained parameters (`p/NAME`) and their Adam moments (`m/NAME`, `v/NAME`), whole and fp32,
whatever the number of workers and the ZeRO stage were. Everything else (lr, order of images, noise) is a function of
the step, so nothing else is saved.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cluster.errors import SystemFailure
from cluster.storage import Storage

FILE = "state.safetensors"
FORMAT = 1
_PREFIX = "step_"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class State:
    """Trained parameters and their Adam moments by parameter name, fp32, whole, after `step` steps."""

    step: int
    parameters: Tensors
    first_moments: Tensors
    second_moments: Tensors


def checkpoints_path(run_path: str) -> str:
    """Where a run keeps its checkpoints."""
    return f"{run_path}/checkpoints"


def steps_saved(storage: Storage, run_path: str) -> list[int]:
    """Steps that have a checkpoint with a manifest, oldest first."""
    folder = checkpoints_path(run_path)
    names = (n for n in storage.names(folder) if n.startswith(_PREFIX) and n[len(_PREFIX) :].isdigit())
    return sorted(int(n[len(_PREFIX) :]) for n in names if storage.manifest(f"{folder}/{n}") is not None)


def save(storage: Storage, run_path: str, state: State, fingerprint: str, keep: int) -> None:
    """Publish `state`, then delete all but the newest `keep` checkpoints. Only one rank calls this."""
    groups = {"p": state.parameters, "m": state.first_moments, "v": state.second_moments}
    tensors = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
    meta = {
        "kind": "raybooth-checkpoint",
        "format": FORMAT,
        "step": state.step,
        "fingerprint": fingerprint,
    }
    with tempfile.TemporaryDirectory(prefix="raybooth-") as scratch:
        save_file(tensors, Path(scratch) / FILE)
        storage.publish(Path(scratch), _at(run_path, state.step), meta)
    for step in steps_saved(storage, run_path)[:-keep]:
        storage.remove(_at(run_path, step))


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
        group: {name[2:]: t for name, t in tensors.items() if name.startswith(f"{group}/")} for group in "pmv"
    }
    return State(step, split["p"], split["m"], split["v"])


def latest(storage: Storage, run_path: str, fingerprint: str, note: Callable[[str], None]) -> State | None:
    """The newest checkpoint that is whole; `None` when there is none.

    Args:
        storage: Root that holds the run.
        run_path: `runs/NAME/VERSION`.
        fingerprint: Of the recipe that trains.
        note: Told, for people, of each one that had to be skipped.
    """
    for step in reversed(steps_saved(storage, run_path)):
        try:
            return load(storage, run_path, step, fingerprint)
        except SystemFailure as error:
            note(f"the checkpoint of step {step} is skipped: {error}")
    return None


def delete(storage: Storage, run_path: str) -> None:
    """Delete every checkpoint of a run."""
    storage.remove(checkpoints_path(run_path))


def _at(run_path: str, step: int) -> str:
    return f"{checkpoints_path(run_path)}/{_PREFIX}{step:06d}"
