"""This file is where a process says who it is, and where it is found out whether another one is gone."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Who this process is: no other one on any machine, before or after, is the same."""
    return {**_place(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether a process is known to have ended. Of one elsewhere, nothing is known."""
    here = _place()
    if here["boot"] is None or any(owner.get(key) != value for key, value in here.items()):
        return False
    return _started(int(owner["pid"])) != owner.get("started")


def shown(owner: Mapping[str, Any]) -> str:
    """A process for people."""
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _place() -> dict[str, Any]:
    """Where process ids have the same meaning: a host that was not restarted, and one container on it."""
    boot = namespace = None
    with suppress(OSError):  # no Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the boot; `None` when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else rest[18]
