"""This file is where bytes reach a local disk: whole or not at all."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"  # how the names of what is not whole yet begin


def write_whole(target: Path, data: bytes, replace: bool = True) -> bool:
    """Write a file aside and rename it to its place; whether it was.

    Args:
        target: Its place.
        data: Its bytes.
        replace: What is there already is replaced, else left alone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            aside.replace(target)
            return True
        return _linked(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _linked(aside: Path, target: Path) -> bool:
    try:
        target.hardlink_to(aside)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if target.exists():
            return False
        aside.replace(target)
    return True


def append_whole(target: Path, data: bytes) -> None:
    """Append to a file; when there is no room for all of `data`, nothing of it stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab", buffering=0) as file:
        size, rest = file.tell(), memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def publish_folder(folder: Path, target: Path, manifest_name: str, manifest: bytes) -> None:
    """Copy a folder aside, with its manifest, and rename it to its place; an older one is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, before = _aside(target), _aside(target)
    try:
        aside.mkdir()
        for source in (path for path in folder.rglob("*") if not path.is_dir()):
            copy = aside / source.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            with copy.open("rb") as file:
                os.fsync(file.fileno())
        write_whole(aside / manifest_name, manifest)
        if target.exists():
            target.rename(before)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def locked(target: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file alone among the processes of this machine; `on_wait` is called before waiting for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _aside(target: Path) -> Path:
    return target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
