"""This file is where what users point at is looked at and read, in a folder or in an object store.

Pyarrow is imported only for what has a URI.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.errors import UserError

# What an object store answers when the mistake is the user's; any other error may go away by itself.
_REFUSALS = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "INVALID_ACCESS_KEY",
    "SIGNATURE_DOES_NOT_MATCH",
    "HTTP status 403",
)


@dataclass(frozen=True)
class Entry:
    """A file or a folder."""

    place: str
    """Its path as given, or its URI."""
    is_folder: bool
    size: int
    """Bytes of a file."""

    @property
    def name(self) -> str:
        """The last part of its place."""
        return PurePosixPath(self.place).name

    @property
    def suffix(self) -> str:
        """The end of its name in lower case, with the dot."""
        return PurePosixPath(self.place).suffix.lower()


def find(place: str) -> Entry:
    """What is at a path or a URI.

    Raises:
        UserError: Nothing is there, or it cannot be reached.
        StorageError: The object store fails.
    """
    place = _plain(place)
    with _reading(place):
        if _is_remote(place):
            from cluster.remote import remote_info

            return Entry(place, *remote_info(place))
        path = Path(place).expanduser()
        size = path.stat().st_size
        return Entry(str(path), True, 0) if path.is_dir() else Entry(str(path), False, size)


def entries(folder: str) -> list[Entry]:
    """What is directly in a folder, sorted by name; raises as `find` does."""
    folder = _plain(folder)
    with _reading(folder):
        if _is_remote(folder):
            from cluster.remote import remote_names

            listed = remote_names(folder)
            found = [Entry(f"{folder}/{name}", is_folder, size) for name, is_folder, size in listed]
        else:
            found = [find(str(path)) for path in Path(folder).expanduser().iterdir() if path.exists()]
    return sorted(found, key=lambda entry: (entry.name, entry.place))


def read(place: str) -> bytes:
    """The bytes of a file; raises as `find` does."""
    place = _plain(place)
    with _reading(place):
        if _is_remote(place):
            from cluster.remote import remote_read

            return remote_read(place)
        return Path(place).expanduser().read_bytes()


def read_text(place: str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; raises as `find` does."""
    try:
        return read(place).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} cannot be read", str(error), "save it as UTF-8") from error


def _is_remote(place: str) -> bool:
    return "://" in place


def _plain(place: str) -> str:
    plain = place.removeprefix("file://")
    return plain.rstrip("/") if _is_remote(plain) else plain


@contextmanager
def _reading(place: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{place} does not exist", "", "check the path") from error
    except (OSError, ValueError) as error:
        seen = str(error).splitlines()[0] if str(error) else type(error).__name__
        if _is_remote(place) and isinstance(error, OSError) and not any(word in seen for word in _REFUSALS):
            from cluster.objects import StorageError

            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{place} cannot be read", seen) from error
        do = "check the address and the credentials" if _is_remote(place) else "check its permissions"
        raise UserError(f"{place} cannot be read", seen, do) from error
