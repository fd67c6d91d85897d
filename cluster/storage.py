"""This file is where bytes last: one storage root, local or remote, behind pyarrow.

Nothing half-written is ever visible: a single object is there whole or not at all, a folder is published with its
manifest last, and readers trust the manifest, not the folder.
"""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.claim import TTL_S, claimed
from cluster.disk import TEMPORARY, locked, publish_folder
from cluster.errors import SystemFailure, UserError
from cluster.objects import Objects
from cluster.remote import parquet_bytes, parquet_columns

MANIFEST = "manifest.json"


def sha256(data: bytes) -> str:
    """The sha256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of a local file in hex, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_manifest(folder: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a published folder holds: `meta` and, per file, its size in bytes and sha256."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    listed = {
        p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in files
    }
    return {**meta, "files": listed}


class Storage(Objects):
    """A storage root: its objects, tables, published folders and locks."""

    def check_writable(self) -> None:
        """Write, read back and delete a canary.

        Raises:
            UserError: The root cannot be written, or gives back other bytes than were written.
        """
        name, canary = f"{TEMPORARY}canary-{uuid.uuid4().hex}", os.urandom(1000)
        try:
            self.write(name, canary)
            back = self.read(name)
            self.remove(name)
        except OSError as error:
            raise UserError(
                f"the storage root {self.uri} is not writable",
                str(error),
                "make it writable or name another with --storage",
            ) from error
        if back != canary:
            raise UserError(
                f"the storage root {self.uri} corrupts what is written",
                f"wrote {len(canary)} bytes, read {len(back)}",
                "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required for a store that is not AWS",
            )

    # -- tables --------------------------------------------------------------------------------------------

    def write_rows(self, path: str, columns: Mapping[str, Sequence[Any]]) -> str:
        """Write columns as one Parquet file; returns its sha256."""
        data = parquet_bytes(columns)
        self.write(path, data)
        return sha256(data)

    def read_rows(self, path: str, digest: str) -> dict[str, list[Any]]:
        """The columns of a Parquet file as Python values.

        Raises:
            SystemFailure: Its bytes do not have the sha256 `digest`.
        """
        data = self.read(path)
        if sha256(data) != digest:
            raise SystemFailure(
                f"{self.full(path)} is damaged",
                f"its sha256 is not {digest[:12]}...",
                "delete its folder; it is made again",
            )
        return parquet_columns(data)

    # -- folders -------------------------------------------------------------------------------------------

    def publish(self, folder: Path, path: str, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Publish a local folder under `path` with a manifest, which is returned; visible whole or not at all.

        A folder that is there already is replaced.

        Raises:
            StorageError: It cannot be written; nothing of it is visible.
        """
        manifest = folder_manifest(folder, meta)
        text = json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n"
        if self.is_local:
            with self._trying("written", path, sum(file["size"] for file in manifest["files"].values())):
                publish_folder(folder, Path(self._at(path)), MANIFEST, text)
        else:
            self.remove(f"{path}/{MANIFEST}")  # first, so that what is half removed counts as not there
            self.remove(path)
            for name in manifest["files"]:
                self.write(f"{path}/{name}", (folder / name).read_bytes())
            self.write(f"{path}/{MANIFEST}", text)
        return manifest

    def manifest(self, path: str) -> dict[str, Any] | None:
        """The manifest of a published folder, or `None` when nothing whole is there."""
        try:
            value: dict[str, Any] = self.read_json(f"{path}/{MANIFEST}")
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return value

    @contextmanager
    def verified(self, path: str) -> Iterator[Path]:
        """A published folder as a local folder whose every file was checked against the manifest.

        Raises:
            SystemFailure: There is no manifest, or a file is missing or damaged.
        """
        manifest = self.manifest(path)
        if manifest is None:
            raise SystemFailure(f"{self.full(path)} is missing or was not finished")
        with tempfile.TemporaryDirectory(prefix="raybooth-") as scratch:
            folder = Path(self._at(path)) if self.is_local else Path(scratch)
            for name, expected in manifest["files"].items():
                file = folder / name
                if not self.is_local:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with suppress(FileNotFoundError):
                        file.write_bytes(self.read(f"{path}/{name}"))
                if not file.is_file() or sha256_file(file) != expected["sha256"]:
                    raise SystemFailure(
                        f"{self.full(path)}/{name} is damaged or missing", "its sha256 is not the manifest's"
                    )
            yield folder

    @contextmanager
    def lock(
        self, path: str, on_wait: Callable[[], None] = lambda: None, ttl_s: float = TTL_S
    ) -> Iterator[None]:
        """Hold `path` alone among all processes that use this root.

        On a local root the system lets go when the holder dies. On a remote one a claim does: that of a process which
        is gone ends `ttl_s` later, at once where this machine knows (see cluster/claim.py).

        Args:
            path: Of the lock.
            on_wait: Called when another process holds it, before waiting.
            ttl_s: Of the claim, the same for all who use the lock.

        Raises:
            SystemFailure: A claim was lost while it was held, because the root could not be reached.
        """
        if self.is_local:
            with locked(Path(self._at(path)), on_wait):
                yield
        else:
            with claimed(self, path, on_wait, ttl_s=ttl_s):
                yield

    @contextmanager
    def lock_or_refuse(self, path: str, refusal: UserError, ttl_s: float = TTL_S) -> Iterator[None]:
        """Like `lock`, but raises `refusal` when a process that lives holds it."""

        def refuse() -> None:
            raise refusal

        if self.is_local:
            with locked(Path(self._at(path)), refuse):
                yield
        else:
            with claimed(self, path, on_alive=refuse, ttl_s=ttl_s):
                yield
