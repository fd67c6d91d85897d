"""This file is where a machine is examined before it disappoints somebody: versions, memory, storage, base, Ray."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.errors import RayboothError
from cluster.session import cpu_count, gpu_count, session
from cluster.storage import Storage
from training.pipeline import open_base

# Below these a known hole or a known break is open: an image decoder that overflows, pickles that run, a Ray job
# API without a key.
FLOORS = {
    "ray": "2.56",
    "torch": "2.10",
    "pillow": "13.0",
    "diffusers": "0.38",
    "mlflow": "3.17",
    "deepspeed": "0.19",
}
MIN_MEMORY_GIB, MIN_DISK_GIB = 6, 5


@dataclass(frozen=True)
class Finding:
    """One thing that was examined."""

    name: str
    ok: bool
    seen: str
    do: str = ""

    def as_json(self) -> dict[str, object]:
        """The finding as plain values."""
        return asdict(self)


def examine(storage_uri: str, base: str, start_ray: bool) -> Iterator[Finding]:
    """Findings, one after the other, as they are made.

    Args:
        storage_uri: The storage root to try.
        base: The base to open.
        start_ray: Also start a private Ray.
    """
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", sys.version_info >= (3, 11), python, "raybooth needs Python 3.11 or newer")
    for name, floor in FLOORS.items():
        yield _package(name, floor)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding(
        "memory",
        memory_gib >= MIN_MEMORY_GIB,
        f"{memory_gib:.0f} GiB, {os.cpu_count()} cores",
        "use a larger machine",
    )
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding("disk", free_gib >= MIN_DISK_GIB, f"{free_gib:.0f} GiB free here", "make room")
    yield _tried("storage", lambda: _storage(storage_uri))
    yield _tried("base", lambda: _base(base))
    if start_ray:
        yield _tried("ray", lambda: _ray(storage_uri))


def _package(name: str, floor: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, False, "not installed", "install with the constraints file")
    numbers = [tuple(int(n) for n in v.split("+")[0].split(".")[:2]) for v in (found, floor)]
    return Finding(name, numbers[0] >= numbers[1], found, f"install {name}>={floor}")


def _tried(name: str, trial: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, trial())
    except RayboothError as error:
        return Finding(name, False, f"{error.what} {error.seen}".strip(), error.do)


def _storage(uri: str) -> str:
    storage = Storage(uri)
    storage.check_writable()
    return f"{storage.uri}: what is written is what is read"


def _base(model: str) -> str:
    base = open_base(model)
    return f"{model}: {base.image_size} px, {base.prediction_type}, revision {base.revision[:12]}"


def _ray(storage_uri: str) -> str:
    began = time.monotonic()
    with session("local", 1, Storage(storage_uri)):
        return (
            f"starts in {time.monotonic() - began:.0f} s, sees {gpu_count()} GPUs, {cpu_count()} logical CPU"
        )
