"""This file is where single objects under a storage root are read and written, in a folder or an object store.

An object is written aside and renamed, or put, which is atomic already: it is there whole or not at all.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from cluster.disk import TEMPORARY, append_whole, write_whole
from cluster.errors import RayboothError, SystemFailure, UserError
from cluster.remote import open_remote, read_whole

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


def failure_about(what: str, error: Exception, do: str = "ask again") -> RayboothError:
    """The error for people that anything which was raised becomes; one that is for people stays as it is.

    Args:
        what: What could not be done.
        error: What was raised.
        do: What to do about one that nobody foresaw.
    """
    if isinstance(error, RayboothError):
        return error
    if isinstance(error, StorageError):
        return error.failure()
    seen = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return SystemFailure(what, f"{type(error).__name__}: {seen}", do)


class Objects:
    """The objects under a root. Every path is relative to it, with `/`, and cannot leave it.

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
                self._fs, self._root = open_remote(self.uri)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"the storage root {self.uri} cannot be used", str(error), "name another with --storage"
            ) from error

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
        return list(self.times(path))

    def times(self, path: str) -> dict[str, float]:
        """By each of `names` when it was last written, in seconds by the store's own clock; 0 of a folder."""
        with self._trying("listed", path):
            infos = self._fs.get_file_info(pafs.FileSelector(self._at(path), allow_not_found=True))
        found = ((info.base_name, (info.mtime_ns or 0) / 1e9) for info in infos)
        return dict(sorted(each for each in found if not each[0].startswith(TEMPORARY)))

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: There is none.
        """
        with self._trying("read", path):
            return (
                Path(self._at(path)).read_bytes() if self.is_local else read_whole(self._fs, self._at(path))
            )

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

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file unless one is there; whether it was written.

        Of two processes at the same moment, both may write to an object store, which has the later one's bytes then:
        `data` should be a function of `path`.

        Raises:
            StorageError: It cannot be written.
        """
        if self.is_local:
            with self._trying("written", path, len(data)):
                return write_whole(Path(self._at(path)), data, replace=False)
        if self.exists(path):
            return False
        self.write(path, data)
        return True

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
