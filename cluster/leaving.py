"""This file is where a pod that is taken away says so first, and waits until what runs in it has saved and left.

    python -m cluster.leaving node 55      # a worker: its gang saves, leaves, and goes on elsewhere
    python -m cluster.leaving driver 25    # the head: the driver of a campaign has everything saved, and ends

A preStop hook calls it: Kubernetes ends the container when it returns, or when its time is up. It does not matter
whether a spot node is reclaimed, a node drained, a pod evicted or a cluster deleted.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

LOOK_S = 0.5
CONNECT_S = 3.0
_IDLE = b"ray::IDLE"
_DRIVER = (b"campaign", b"run")


def announce(address: str, node_id: str, deadline_s: float) -> bool:
    """Tell Ray that a node is taken away: nothing new is put there, and gangs on it save and leave.

    Args:
        address: The cluster's GCS, `HOST:PORT`.
        node_id: Of the node, in hex.
        deadline_s: Seconds until it is gone.

    Returns:
        Whether Ray has accepted it.

    Raises:
        OSError: The GCS is not there.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S):
        pass  # Ray itself would try for most of a minute, and a finished job would hold its pods as long
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + deadline_s) * 1000)
    accepted, _ = GcsClient(address).drain_node(node_id, reason, "the pod is taken away", deadline_ms)
    return bool(accepted)


def leave_node(seconds: float, processes: Path = Path("/proc")) -> bool:
    """Announce this pod's node, and wait until no task or actor runs on it any more, for `seconds` at most.

    Args:
        seconds: How long there is.
        processes: The kernel's list of processes.

    Returns:
        Whether everything has left.
    """
    raylet = next((argv for _, argv in _processes(processes) if argv[0].endswith(b"/raylet")), None)
    if raylet is None:
        return True  # Ray has ended already
    until = time.monotonic() + seconds
    with suppress(
        Exception
    ):  # the head may be gone: then nobody can be told, and there is nothing to save for
        if not announce(_option(raylet, "gcs-address"), _option(raylet, "node_id"), seconds):
            return False
        return _wait(until, lambda: not any(_works(argv) for _, argv in _processes(processes)))
    return False


def leave_driver(seconds: float, processes: Path = Path("/proc")) -> bool:
    """Send SIGTERM to the campaign's driver in this pod, and wait until it has ended, for `seconds` at most."""
    drivers = [pid for pid, argv in _processes(processes) if _drives(argv)]
    for pid in drivers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + seconds
    return _wait(until, lambda: not any((processes / str(pid)).exists() for pid in drivers))


def _processes(folder: Path) -> Iterator[tuple[int, Sequence[bytes]]]:
    for process in folder.iterdir():
        if process.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                argv = (process / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                yield int(process.name), argv


def _option(argv: Sequence[bytes], name: str) -> str:
    start = f"--{name}=".encode()
    return next(word.removeprefix(start).decode() for word in argv if word.startswith(start))


def _works(argv: Sequence[bytes]) -> bool:
    """Whether it is a worker of Ray that has something to do."""
    return argv[0].startswith(b"ray::") and not argv[0].startswith(_IDLE)


def _drives(argv: Sequence[bytes]) -> bool:
    """Whether it is the program itself, not a shell that has started it."""
    names = [word.rpartition(b"/")[2] for word in argv[:3]]
    return b"raybooth" in names and all(word in argv for word in _DRIVER)


def _wait(until: float, done: Callable[[], bool]) -> bool:
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(LOOK_S)
    return True


if __name__ == "__main__":
    _leave = {"node": leave_node, "driver": leave_driver}[sys.argv[1]]
    _leave(float(sys.argv[2]))
