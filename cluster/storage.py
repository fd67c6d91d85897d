"""This file is where bytes last: one storage root, local or remote, behind pyarrow.

Nothing half-written is ever visible: a single object is written aside and renamed (an object store's put is
atomic already), a folder is published with its manifest last, and readers trust the manifest, not the folder.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cluster.disk import TEMPORARY, append_whole, locked, publish_folder, write_whole
from cluster.errors import SystemFailure, UserError

MANIFEST = "manifest.json"
S3_ATTEMPTS = 10  # of a call, with growing pauses: about half a minute
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StorageError(OSError):
    """Storage that is full, gone or not allowed, after all attempts.

    No `RayboothError`, because what it means is for its catcher to decide: the run goes on without a checkpoint, but
    not without its artifact.

    Args:
        what: Which path, and what was tried.
        seen: What the system said.
        full: There is no room.
    """

    def __init__(self, what: str, seen: str, full: bool = False) -> None:
        super().__init__(what, seen, full)
        self.what, self.seen, self.full = what, seen, full

    def __str__(self) -> str:
        return f"{self.what}: {self.seen}"

    def failure(self) -> SystemFailure:
        """The end of a command that cannot go on without it."""
        do = "make room there" if self.full else "see that it can be reached and written"
        return SystemFailure(self.what, self.seen, f"{do} and run the same command again to go on")


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


class Storage:
    """A storage root. Every path is relative to it, with `/`, and cannot leave it.

    Args:
        uri: A folder, or a URI that pyarrow knows (`file://`, `s3://`, `gs://`).

    Raises:
        UserError: The root cannot be reached or is not writable.
    """

    def __init__(self, uri: str) -> None:
        self.is_local = "://" not in uri or uri.startswith("file://")
        plain = uri.removeprefix("file://")
        self.uri = str(Path(plain).expanduser().resolve()) if self.is_local else uri.rstrip("/")
        try:
            if self.is_local:
                Path(self.uri).mkdir(parents=True, exist_ok=True)
                self._fs, self._root = pafs.LocalFileSystem(), self.uri
            else:
                self._fs, self._root = _remote(self.uri)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"the storage root {self.uri} cannot be used", str(error), "name another with --storage"
            ) from error

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

    # -- paths ---------------------------------------------------------------------------------------------

    def _at(self, path: str) -> str:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\0" in path:
            raise UserError(f"the path {path!r} leaves the storage root", "", "use a plain name")
        return f"{self._root}/{pure}" if str(pure) != "." else self._root

    def full(self, path: str) -> str:
        """`path` as a user would open it: an absolute folder, or a URI."""
        return f"{self.uri}/{path}"

    @contextmanager
    def _trying(self, act: str, path: str, size: int = 0) -> Iterator[None]:
        """Say of an error which path it is about and, when there is no room, how much `size` bytes want."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, StorageError):
            raise
        except OSError as error:
            full, seen = error.errno in _FULL, error.strerror or str(error).splitlines()[0]
            if full and self.is_local:
                free = shutil.disk_usage(self.uri).free
                seen = f"{seen}: {size / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free"
            raise StorageError(f"{self.full(path)} cannot be {act}", seen, full) from error

    def exists(self, path: str) -> bool:
        """Whether a file or a folder is there."""
        with self._trying("looked for", path):
            return bool(self._fs.get_file_info(self._at(path)).type != pafs.FileType.NotFound)

    def names(self, path: str) -> list[str]:
        """Names directly under a folder, sorted, without temporary ones; empty when there is no folder."""
        with self._trying("listed", path):
            infos = self._fs.get_file_info(pafs.FileSelector(self._at(path), allow_not_found=True))
        return sorted(i.base_name for i in infos if not i.base_name.startswith(TEMPORARY))

    # -- single objects ------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: There is none.
        """
        with self._trying("read", path), self._fs.open_input_stream(self._at(path)) as stream:
            return bytes(stream.read())

    def write(self, path: str, data: bytes) -> None:
        """Write a file so that it is there whole or not at all; an older one is replaced.

        Raises:
            StorageError: It cannot be written.
        """
        at = self._at(path)
        with self._trying("written", path, len(data)):
            if self.is_local:
                write_whole(Path(at), data)
            else:
                with self._fs.open_output_stream(at) as stream:
                    stream.write(data)

    def append(self, path: str, data: bytes) -> None:
        """Append to a file, for logs; all of it or nothing, but for a crash.

        On a remote root the whole object is read and written again, so that n calls move n^2 / 2 times the bytes of
        one: callers gather lines first.

        Raises:
            StorageError: It cannot be written.
        """
        if self.is_local:
            with self._trying("written", path, len(data)):
                append_whole(Path(self._at(path)), data)
        else:
            self.write(path, (self.read(path) if self.exists(path) else b"") + data)

    def read_json(self, path: str) -> Any:
        """The parsed JSON of a file."""
        return json.loads(self.read(path))

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as indented JSON."""
        self.write(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def remove(self, path: str) -> None:
        """Remove a file or a whole folder; nothing there is no error."""
        at = self._at(path)
        with self._trying("removed", path):
            kind = self._fs.get_file_info(at).type
            if kind == pafs.FileType.Directory:
                self._fs.delete_dir(at)
            elif kind == pafs.FileType.File:
                self._fs.delete_file(at)

    # -- tables --------------------------------------------------------------------------------------------

    def write_rows(self, path: str, columns: Mapping[str, Sequence[Any]]) -> str:
        """Write columns as one Parquet file; returns its sha256."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
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
        columns: dict[str, list[Any]] = pq.read_table(pa.BufferReader(data)).to_pydict()
        return columns

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
    def lock(self, path: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold `path` alone among the processes of this machine; let go by the system when its holder dies.

        A remote root has no locks, and this holds nothing there. Photos, latents and artifacts are addressed by content
        or by version, so two writers of one only repeat work. What is read, changed and written back is not protected:
        of two changes to a subject's registry entry or to a manifest of shards at the same moment, one is lost. A
        lost shard is made again, but a lost version stays in its folder and unknown to the registry: let one machine
        at a time train a subject.

        Args:
            path: Of the lock file.
            on_wait: Called when another process holds it, before waiting.
        """
        if not self.is_local:
            yield
            return
        with locked(Path(self._at(path)), on_wait):
            yield

    @contextmanager
    def lock_or_refuse(self, path: str, refusal: UserError) -> Iterator[None]:
        """Like `lock`, but raises `refusal` when another process holds it."""

        def refuse() -> None:
            raise refusal

        with self.lock(path, refuse):
            yield


def _remote(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI, and the root in it. Calls of S3 that fail are tried again; those of GCS anyway."""
    found, root = pafs.FileSystem.from_uri(uri)
    if not isinstance(found, pafs.S3FileSystem):
        return found, root
    if "@" in uri or "?" in uri:  # the URI is written into manifests and shown to people
        raise UserError(
            "the storage URI carries settings or credentials",
            "it has a @ or a ?",
            "give s3://BUCKET/PREFIX, and AWS_ENDPOINT_URL, AWS_REGION and the credentials in the environment",
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = endpoint.rstrip("/").rpartition("://")
    patient = pafs.S3FileSystem(
        region=found.region,
        endpoint_override=host or None,
        scheme=scheme or None,
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=S3_ATTEMPTS),
    )
    return patient, root
