"""This file is where the CPU seconds of a command are added up, over every process that it starts, by role."""

import ctypes
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOOK_S = 0.1
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux: what outlives its parent becomes ours, to be waited for
IDLE = "ray::IDLE"
# What a command line shows, first match first. Ray's workers set theirs to `ray::` and what they do.
_ROLES = (
    (r"^ray::IDLE_Spill|^ray::IDLE_Rest", "ray: I/O worker"),
    (r"^ray::IDLE", "ray: worker never used"),
    (r"^ray::(\S+?)(\.|$|\(|\s)", r"ray: \1"),
    (r"raylet/raylet", "ray: raylet"),
    (r"gcs_server", "ray: gcs"),
    (r"dashboard/agent", "ray: dashboard agent"),
    (r"runtime_env/agent", "ray: runtime env agent"),
    (r"log_monitor", "ray: log monitor"),
    (r"monitor\.py", "ray: autoscaler"),
    (r"dashboard/dashboard", "ray: dashboard"),
    (r"default_worker", "ray: worker never used"),
    (r"-m orchestrator", "driver"),
)


@dataclass(frozen=True)
class Spent:
    """What a command cost, from its start to the end of its last process."""

    cpu_s: float
    """Of all processes."""
    wall_s: float
    """To the end of the command itself."""
    roles: dict[str, tuple[int, float]]
    """Processes and their CPU seconds, by what they were there for; the dearest first."""


def role(lines: Sequence[str]) -> str:
    """What a process was there for: `lines` are the command lines it showed, of which a later one says more."""
    told = [line for line in lines if not line.startswith(IDLE) and "default_worker" not in line]
    shown = (told or lines or [""])[-1]
    for pattern, name in _ROLES:
        if found := re.search(pattern, shown):
            return found.expand(name)
    return Path(shown.split(" ")[0]).name or "ended at once"


class Descendants(threading.Thread):
    """Adds up the CPU seconds of all processes below this one, by looking often: Ray's raylet does not wait for its
    workers, so what the system adds up by itself lacks them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ticks: dict[tuple[int, str], int] = {}  # by process and when it began
        self._lines: dict[tuple[int, str], list[str]] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(LOOK_S):
            self._look()

    def stop(self) -> dict[str, tuple[int, float]]:
        """Processes and CPU seconds by role."""
        self._over.set()
        self.join()
        number: Counter[str] = Counter()
        ticks: Counter[str] = Counter()
        for process, spent in self._ticks.items():
            name = role(self._lines[process])
            number[name] += 1
            ticks[name] += spent
        rate = os.sysconf("SC_CLK_TCK")
        return {name: (number[name], spent / rate) for name, spent in ticks.most_common()}

    def _look(self) -> None:
        parents: dict[int, int] = {}
        spent: dict[int, tuple[str, int]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            pid = int(folder.name)
            parents[pid] = int(fields[1])
            spent[pid] = fields[19], int(fields[11]) + int(fields[12])
        for pid, (began, ticks) in spent.items():
            ancestor = parents[pid]
            while ancestor in parents and ancestor != os.getpid():
                ancestor = parents[ancestor]
            if ancestor == os.getpid():
                self._ticks[pid, began] = ticks
                self._read_line(pid, self._lines.setdefault((pid, began), []))

    @staticmethod
    def _read_line(pid: int, lines: list[str]) -> None:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (FileNotFoundError, ProcessLookupError):
            return
        if line and line not in lines[-1:]:
            lines.append(line)


def spent_by(command: Sequence[str], log: Path, folder: Path | None = None) -> Spent:
    """What a command costs, with every process that it starts, to the last one's end."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    began, watch = time.monotonic(), Descendants()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("ab") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=folder)
        watch.start()
        code = process.wait()
        took = time.monotonic() - began
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-3000:]}")
    roles = watch.stop()
    return Spent(sum(cpu for _, cpu in roles.values()), took, roles)
