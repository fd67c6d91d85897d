"""This file is where the control path of a campaign is measured alone: 10,000 subjects, and works that do nothing.

python -m benchmarks.control [--subjects 10000] [--ledger URI]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.idle_works import IdleWorks
from cluster.storage import Storage
from orchestrator.controller import Controller
from orchestrator.ledger import Ledger
from orchestrator.manifest import load_campaign
from orchestrator.records import RunRow
from orchestrator.submission import enroll


def main() -> None:
    """Write a manifest, load and enroll it, run its controller, and ask for its status."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--subjects", type=int, default=10_000)
    options.add_argument("--ledger", help="postgresql://...; a SQLite file by default")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), asked.subjects, asked.ledger)
    print(json.dumps(figures))


def measure(folder: Path, subjects: int, uri: str | None) -> dict[str, float]:
    """Seconds of each part, and megabytes at a tenth of the way and at the end."""
    figures: dict[str, float] = {"subjects": subjects, "load_average": round(os.getloadavg()[0], 1)}
    rows = "".join(f"s{i},dog,photos/s{i}\n" for i in range(subjects))
    manifest = folder / "night.csv"
    manifest.write_text("name,class,images\n" + rows)
    storage, uri = Storage(str(folder / "root")), uri or f"sqlite:///{folder / 'root' / 'campaigns.db'}"
    began = time.monotonic()
    spec = load_campaign(str(manifest))
    figures["load_s"] = time.monotonic() - began
    memory: list[float] = []

    def look(rows: Sequence[RunRow]) -> None:
        done = len(rows) - len(controller.roster.unfinished)
        if not memory and done > len(rows) / 10:
            memory.append(_memory_mb())

    with Ledger(uri) as ledger:
        began = time.monotonic()
        enroll(spec, ledger, storage)
        figures["enroll_s"] = time.monotonic() - began
        began, cpu = time.monotonic(), time.process_time()
        with ledger.claim(spec.name) as claim:
            settings = spec.settings
            works = IdleWorks(gangs=16)
            controller = Controller(
                ledger,
                claim,
                ledger.campaign(spec.name),
                settings.schedule,
                settings.budget,
                works,
                look,
                print,
            )
            state = controller.run()
        figures["control_s"], figures["control_cpu_s"] = time.monotonic() - began, time.process_time() - cpu
        assert state == "succeeded" and len(works.leases) == subjects
    figures["memory_at_a_tenth_mb"], figures["memory_at_the_end_mb"] = memory[0], _memory_mb()
    command = [
        sys.executable,
        "-m",
        "orchestrator",
        "campaign",
        "status",
        spec.name,
        "--storage",
        storage.uri,
    ]
    times = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "RAYBOOTH_LEDGER": uri})
        times.append(time.monotonic() - began)
    figures["status_command_s"] = sorted(times)[1]
    return {key: round(value, 3) for key, value in figures.items()}


def _memory_mb() -> float:
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmRSS")]
    return int(line.split()[1]) / 1000


if __name__ == "__main__":
    main()
