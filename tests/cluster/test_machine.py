"""What this machine says of its memory, inside and outside of containers."""

import os
from pathlib import Path

import pytest

from cluster.machine import memory_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GIB = 2**30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {}, MACHINE),
        ("0::/\n", {"memory.max": "max"}, MACHINE),
        ("0::/\n", {"memory.max": str(GIB)}, GIB),
        ("0::/pod/box\n", {"pod/memory.max": str(GIB), "pod/box/memory.max": "max"}, GIB),
        ("4:memory:/box\n", {"memory/box/memory.limit_in_bytes": str(GIB)}, GIB),
        ("4:memory:/host/box\n", {"memory/memory.limit_in_bytes": str(GIB)}, GIB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, MACHINE),
        ("3:cpu:/box\n", {"cpu/box/memory.limit_in_bytes": str(GIB)}, MACHINE),
    ],
    ids=[
        "none",
        "v2 max",
        "v2",
        "v2 of a parent",
        "v1",
        "v1 in a container",
        "v1 none",
        "another controller",
    ],
)
def test_the_limit_of_a_cgroup_is_honoured(
    membership: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    write(tmp_path / "self", membership)
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    assert memory_bytes(tmp_path / "cgroup", tmp_path / "self") == expected
