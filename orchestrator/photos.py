"""This file is where the photos that a version was trained on are read back."""

from typing import Any

from cluster.errors import SystemFailure
from cluster.storage import Storage
from orchestrator.prepare import record_path
from training.artifact import artifact_path
from training.intake import TABLE


def photo_pngs(storage: Storage, name: str, version: str) -> list[bytes]:
    """The photos of a version as PNG bytes, in order, those it was trained on and not those that were held back.

    Raises:
        SystemFailure: They are not there any more, or it is not known which they are.
    """
    sets, key = storage.names(f"subjects/{name}"), None
    if storage.exists(record_path(name, version)):
        key = storage.read_json(record_path(name, version)).get("photos")
    if key not in sets:
        if len(sets) != 1:
            raise SystemFailure(
                f"the photos of {name} {version} are not known",
                f"{storage.full(f'subjects/{name}')} has {len(sets)} sets of photos, and its run names {key}",
                "train it again",
            )
        [key] = sets
    folder = f"subjects/{name}/{key}"
    manifest = storage.manifest(folder)
    if manifest is None:
        raise SystemFailure(f"{storage.full(folder)} was not finished", "", "train it again")
    rows: dict[str, list[Any]] = storage.read_rows(f"{folder}/{TABLE}", manifest["files"][TABLE]["sha256"])
    artifact = storage.manifest(artifact_path(name, version)) or {}
    held = int(artifact.get("recipe", {}).get("data", {}).get("holdout", 0))
    pngs: list[bytes] = rows["png"]
    return pngs[: len(pngs) - held]
