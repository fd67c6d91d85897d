"""This file is where it is measured what HTTP and Ray cost the service a request, in CPU time, process by process.

    python -m benchmarks.overhead [--requests 100] [--rounds 5] [--steps 1] [--json]

Images of the pristine pocket base, as small as they get, are asked for over HTTP with a key by a process of its own:
one after the other, then four at a time. What counts is the CPU time of every process of Ray and Serve beyond what they
take while nobody asks. The two threads of a replica that would be there without HTTP and Ray are told apart: the one
that draws, and the one that makes PNGs with their watermark.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from ray import serve

from benchmarks.descendants import role
from cluster.session import session
from cluster.storage import Storage
from serving.app import service, start, stop
from serving.handle_artist import NAME, REPLICA
from serving.ingress import create_app
from serving.keys import Keys
from serving.replicas import Replicas
from serving.settings import ServingSettings

WORDS = "a photo of a backpack on the beach"
WARM = 20  # requests before any is counted
IDLE_S = 10.0
AT_A_TIME = (1, 4)
CPUS = 4
DRAWING = {"engine": "drawing", "png_0": "PNG and watermark"}  # threads of a replica, by what they do
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Watch:
    """CPU seconds of the processes of a Ray that runs here, by role; those of a replica's threads that draw apart.

    Args:
        replicas: What `Replica.threads` says.
    """

    def __init__(self, replicas: list[Mapping[str, int]]) -> None:
        self._threads = {
            native: DRAWING[name] for one in replicas for name, native in one.items() if name in DRAWING
        }
        self._at = self._look()

    def _look(self) -> tuple[Counter[str], float]:
        spent: Counter[str] = Counter()
        for process in psutil.Process().children(recursive=True):
            try:
                line, times = " ".join(process.cmdline()), process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            if "spawn" in line:  # the process that asks
                continue
            name = role([line])
            spent[name] += times.user + times.system
            for native, what in self._threads.items():
                if (stat := Path(f"/proc/{process.pid}/task/{native}/stat")).exists():
                    fields = stat.read_text().rpartition(")")[2].split()
                    seconds = (int(fields[11]) + int(fields[12])) * TICK_S
                    spent[what] += seconds
                    spent[name] -= seconds
        return spent, time.monotonic()

    def since(self) -> tuple[Counter[str], float]:
        """CPU seconds by role, and seconds, since the last look."""
        (before, began), self._at = self._at, self._look()
        spent, now = self._at
        return Counter({name: seconds - before[name] for name, seconds in spent.items()}), now - began


def threads_of_replicas() -> list[Mapping[str, int]]:
    """What the replicas of the service that runs here say of their threads."""
    handle = serve.get_deployment_handle(REPLICA, NAME)
    handle._init(_run_router_in_separate_loop=True)  # also where Serve's own processes are told not to
    found: list[Mapping[str, int]] = handle.broadcast("threads").results()
    return found


def ask(port: int, token: str, number: int, at_a_time: int, steps: int) -> None:
    """Ask for so many images, each client over one connection; for a process of its own."""

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for seed in range(first, number, at_a_time):
            body = {"model": "base", "prompt": WORDS, "steps": steps, "guidance_scale": 1, "seed": seed}
            headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
            connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status == 200, said

    with ThreadPoolExecutor(at_a_time) as clients:
        for done in [clients.submit(client, i) for i in range(at_a_time)]:
            done.result()


def measure(asked: argparse.Namespace, port: int, token: str, workers: ProcessPoolExecutor) -> dict[str, Any]:
    """CPU ms a request by role, and what idling costs, in CPU ms a second."""
    workers.submit(ask, port, token, WARM, max(AT_A_TIME), asked.steps).result()
    watch = Watch(threads_of_replicas())
    time.sleep(IDLE_S)
    idle, idle_s = watch.since()
    found: dict[int, list[Counter[str]]] = {number: [] for number in AT_A_TIME}
    for number in range(asked.rounds):
        for at_a_time, rounds in found.items():
            watch.since()
            workers.submit(ask, port, token, asked.requests, at_a_time, asked.steps).result()
            spent, seconds = watch.since()
            rounds.append(
                Counter(
                    {
                        who: 1000 * (spent[who] - idle[who] * seconds / idle_s) / asked.requests
                        for who in spent
                    }
                )
            )
        print(f"round {number + 1} of {asked.rounds}", file=sys.stderr, flush=True)
    told: dict[str, Any] = {
        "idle_ms_a_second": {who: round(1000 * s / idle_s, 1) for who, s in idle.items() if s}
    }
    for at_a_time, rounds in found.items():
        whom = {who: round(median(each[who] for each in rounds), 1) for who in sorted(set().union(*rounds))}
        apart = [sum(ms for who, ms in each.items() if who not in DRAWING.values()) for each in rounds]
        told[f"{at_a_time} at a time"] = {
            "overhead_ms": round(median(apart), 1),
            "lowest_ms": round(min(apart), 1),
            "highest_ms": round(max(apart), 1),
            "by_role_ms": {who: ms for who, ms in whom.items() if abs(ms) > 0.05},
        }
    return told


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of an image")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = ServingSettings.model_validate(
        {
            "base": "pocket",
            "sizes": ["64x64"],
            "rates": {"per_minute": 1_000_000, "burst": 100_000, "at_once": 1000},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(f"{folder}/root")
        token = Keys(storage, time.time).create("first", "default")[1]
        workers = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with workers, session(None, CPUS, storage):
            start(
                service(settings, Replicas(exact=False), storage, create_app),
                "127.0.0.1",
                asked.port,
            )
            told = measure(asked, asked.port, token, workers)
            stop()
    if asked.json:
        print(json.dumps(told))
        return
    for name, figures in told.items():
        if name == "idle_ms_a_second":
            print("idle, CPU ms a second:")
            roles = figures
        else:
            print(f"{name}: HTTP and Ray {figures['overhead_ms']} CPU ms a request (goal under 10), of which")
            roles = figures["by_role_ms"]
        for who, ms in roles.items():
            print(f"  {ms:6.1f} {who}{' (not counted)' if who in DRAWING.values() else ''}")


if __name__ == "__main__":
    main()
