"""This file is where this machine is asked how much memory it has, and whether it has a GPU; no torch, no Ray."""

import os
import subprocess
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes a huge number where there is no limit


def memory_bytes(cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Memory that processes here may use together: the machine's, or less where a cgroup of ours is limited.

    Args:
        cgroups: Where cgroups are mounted.
        membership: The kernel's list of our cgroups.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(cgroups, membership)])


def gpu_memory_bytes() -> int | None:
    """Memory of the smallest GPU here; `None` when the driver's own tool does not say. Takes no memory of the GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(int(line) for line in said.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _limits(cgroups: Path, membership: Path) -> list[int]:
    """The memory limits of our cgroups and of those they are in, of either version."""
    found = []
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        # a container sees its own cgroup as the root, under whatever path the host knows it by
        inner = root / path.lstrip("/")
        for folder in {root, inner, *(parent for parent in inner.parents if parent.is_relative_to(root))}:
            limit = (folder / name).read_text().strip() if (folder / name).is_file() else "max"
            if limit.isdigit() and int(limit) < _UNLIMITED:
                found.append(int(limit))
    return found


def sees_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU and CUDA_VISIBLE_DEVICES does not hide it, without importing torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and Path("/dev/nvidiactl").exists()
