"""This file is where a Ray of our own is started on this machine, with as few processes as it can.

Some of it is done to internals of the one version of Ray that we pin, which has no settings for it.
"""

import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from ray._private import services
from ray._private.node import Node

from cluster.errors import SystemFailure
from cluster.machine import sees_gpu

OBJECT_STORE_BYTES = 512 * 1024**2  # of a private Ray: latents and photos are small, /dev/shm often is too
START_S = 120  # for Ray's own processes; Ray itself gives up after 30 s, which a busy machine may need
LODGER_S = 3.0  # for a thread to see that Ray ends
LONGEST_TEMPORARY = 40  # characters: a socket's path ends at 107, and Ray appends about 60 of its own

# Of a private Ray, which nobody drains and nobody watches: each of these is a process or work for one.
PRIVATE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # the driver's own log is ours
}
# Where there is no GPU: DeepSpeed would compile kernels nobody calls (91 s), and imports inductor (2-3 s).
WITHOUT_GPU = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}


@contextmanager
def private_ray(cpus: int, common: Mapping[str, Any]) -> Iterator[None]:
    """A Ray of our own on this machine, for the time of a `with`.

    Args:
        cpus: Logical CPUs.
        common: What `ray.init` takes for every Ray.

    Raises:
        SystemFailure: It does not start.
    """
    # Other users of this machine must not run code in it; the secret ends with this process. Ray turns token mode
    # on for a local cluster by itself; set here, it would come too late, because Ray reads the mode when it is
    # imported.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Its processes inherit ours. As a runtime environment of the job, Ray would start every worker for it anew.
    with _environ(PRIVATE if sees_gpu() else PRIVATE | WITHOUT_GPU), _temporary_folder() as folder:
        try:
            with _nothing_on_stderr(), _few_processes(), _patience():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(folder),
                    **common,
                )
        except Exception as error:  # Ray raises that very class when its processes do not come up
            raise SystemFailure(
                "Ray does not start on this machine", str(error), "run `raybooth doctor`"
            ) from error
        try:
            yield
        finally:
            try:
                _lodgings.end()
            finally:
                ray.shutdown()


class _Lodgings:
    """The threads that work with a private Ray until it ends."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self.threads: set[threading.Thread] = set()

    def end(self) -> None:
        """Tell them that it ends, and wait a moment for them. The next Ray has others."""
        ending, self.ending = self.ending, threading.Event()
        ending.set()
        until = time.monotonic() + LODGER_S
        for thread in list(self.threads):
            thread.join(max(0.0, until - time.monotonic()))


_lodgings = _Lodgings()


@contextmanager
def lodging() -> Iterator[threading.Event]:
    """For a thread that works with the private Ray until it ends: an event that says so. It is waited for a moment, as
    Ray's end takes away what it stands on."""
    me = threading.current_thread()
    _lodgings.threads.add(me)
    try:
        yield _lodgings.ending
    finally:
        _lodgings.threads.discard(me)


@contextmanager
def _environ(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables, where they are not set, for the time of a `with`: no cluster joined later sees them."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _few_processes() -> Iterator[None]:
    """Have Ray start without those of its processes that a private one has no use for.

    They are what follows logs for drivers that show them, what asks a cloud for nodes, the modules of a dashboard that
    is not shown, and its server, which would tell Ray's makers of this cluster: 6 CPU seconds, and a start that waits
    for one after the other. Ray has no setting for it; the version that we pin has these three places.
    """
    few = partial(ray._private.parameter.RayParams, include_log_monitor=False, no_monitor=True)
    wanting = "get_dashboard_dependency_error"
    with (
        patch.object(ray._private.parameter, "RayParams", few),
        patch.object(ray._private.utils, wanting, lambda: ImportError("not wanted")),
        patch.object(Node, "start_api_server", _no_server),
    ):
        yield


def _no_server(node: Any, **settings: Any) -> None:
    node._webui_url = None


@contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """Ray's core announces its log level on the terminal; what goes wrong in here is raised, not written."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _patience() -> Iterator[None]:
    """Wait for a node that starts, where Ray would ask in a loop for 30 s."""
    get_node = services.get_node

    def patiently(*wanted: Any) -> Any:
        until = time.monotonic() + START_S
        while True:
            try:
                return get_node(*wanted)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.05)

    services.get_node = patiently
    try:
        yield
    finally:
        services.get_node = get_node


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for Ray's sockets and logs, with a short path; kept, for its logs, after a `SystemFailure`."""
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="rb-", dir=parent if len(parent) <= LONGEST_TEMPORARY else "/tmp"))
    kept = False
    try:
        yield folder
    except SystemFailure as error:
        kept = True
        error.do = "; ".join(part for part in (error.do, f"Ray's logs are in {folder}") if part)
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
