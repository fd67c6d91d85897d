"""This file is where a registered subject is read for drawing: what it wears, and what its words mean."""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.objects import StorageError
from cluster.storage import Storage
from serving.cache import Cache
from serving.protocol import PRISTINE
from training.artifact import Identity, artifact_hash, artifact_path, open_artifact
from training.outfit import PLAIN, Outfit
from training.prompt import render_prompt

Key = tuple[str, str]
"""Name and version."""
LOOK_S = 2.0  # how often subjects that were deleted are looked for


@dataclass(frozen=True, eq=False)
class Subject:
    """Who is drawn."""

    label: str
    """What the PNG says it shows: `NAME-VERSION`, or `base`."""
    identity: Identity | None
    """`None` is the pristine base."""
    outfit: Outfit
    artifact: str = ""
    """The artifact's hash."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.outfit.nbytes

    def words(self, prompt: str) -> str:
        """The prompt with its slots filled.

        Raises:
            UserError: It has slots that mean nothing here.
        """
        if self.identity:
            return render_prompt(
                prompt, self.identity.class_noun, self.identity.identifier, self.identity.template
            )
        if "{class}" in prompt:
            raise UserError("the pristine base has no class", repr(prompt), "say the noun instead of {class}")
        return render_prompt(prompt, "", None)


NOBODY = Subject(PRISTINE, None, PLAIN)
Reader = Callable[[Path, Mapping[str, Any]], Outfit]


class Wardrobe:
    """Subjects in memory, by name and version.

    Args:
        storage: Root that holds their artifacts; `None` has none.
        budget_bytes: What they may take.
        read: Reads the weights of an artifact.
    """

    def __init__(self, storage: Storage | None, budget_bytes: int, read: Reader) -> None:
        self._storage, self._read = storage, read
        self.cache: Cache[Key, Subject] = Cache(budget_bytes, self._load, self._size)
        self._closed = threading.Event()
        if storage is not None:
            threading.Thread(target=self._look, name="deleted", daemon=True).start()

    def close(self) -> None:
        """End its threads."""
        self._closed.set()
        self.cache.close()

    def _load(self, key: Key) -> Subject:
        if self._storage is None:
            raise UserError("there are no subjects", "nothing is stored", f"ask for {PRISTINE!r}")
        return read_subject(self._storage, *key, self._read)

    def _size(self, key: Key) -> int:
        return subject_size(self._storage, *key) if self._storage else 0

    def _look(self) -> None:
        """Forget subjects that were deleted."""
        while not self._closed.wait(LOOK_S):
            for key in self.cache.resident():
                with suppress(StorageError):  # a store that does not answer will
                    if not self._size(key):
                        self.cache.forget(key)


def read_subject(storage: Storage, name: str, version: str, read: Reader) -> Subject:
    """A published version, every file of it checked; `read` reads its weights."""
    with open_artifact(storage, name, version) as artifact:
        outfit = read(artifact.folder, artifact.manifest)
        return Subject(f"{name}-{version}", artifact.identity, outfit, artifact_hash(artifact.manifest))


def subject_size(storage: Storage, name: str, version: str) -> int:
    """Bytes of a version's files; 0 when it is not there."""
    manifest = storage.manifest(artifact_path(name, version))
    return sum(int(file["size"]) for file in manifest["files"].values()) if manifest else 0
