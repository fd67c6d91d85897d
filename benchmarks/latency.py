"""This file is where the latency of the service is measured beside static batches.

    python -m benchmarks.latency [--share 0.7] [--seconds 60] [--steps 4-12] [--rounds 3] [--exact]
        [--json]

Both draw the pristine pocket base by the same code on one thread, four guided images at a time, behind Ray Serve; a
process of its own asks for images at moments of a Poisson process, the same for both, in turn. Theirs collects requests
with `@serve.batch` and draws them as one batch; ours lets images join and leave at every step. The rate is a share of
what the slower of the two draws when it is asked for everything at once.
"""

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

from ray import serve

from benchmarks.load import Ask, arrivals, drive_apart, percentile, steps_range
from cluster.session import session
from cluster.storage import Storage
from serving.app import service, start, stop
from serving.ingress import create_app
from serving.replicas import Replicas
from serving.settings import ServingSettings

WORDS = "a photo of a backpack on the beach"
AT_A_TIME = 4  # guided images, of two rows each
WAIT_S = 0.05  # for a batch to fill
BURST = 32
CPUS = 4


@serve.deployment(max_ongoing_requests=1000)
class Static:
    """Static batches: a batch is drawn when it is full, or when it has waited; who comes later waits for all of it."""

    def __init__(self, base: str) -> None:
        import torch

        from training.draw import Drawer
        from training.pipeline import open_base

        torch.set_num_threads(1)
        # of the batch's own size: a batch that is not full does not pay for one that is
        self._drawers = [Drawer(open_base(base), device="cpu", width=2 * (i + 1)) for i in range(AT_A_TIME)]

    @serve.batch(max_batch_size=AT_A_TIME, batch_wait_timeout_s=WAIT_S)
    async def draw(self, bodies: list[dict[str, Any]]) -> list[bytes]:
        """PNGs."""
        from training.png import encode_png
        from training.request import DrawRequest

        asked = [DrawRequest(body["prompt"], body["seed"], steps=body["steps"]) for body in bodies]
        images = await asyncio.to_thread(self._drawers[len(asked) - 1].draw, asked)
        return [encode_png(image, None) for image in images]

    async def __call__(self, request: Any) -> dict[str, Any]:
        png = await self.draw(await request.json())
        return {"data": [{"b64_json": base64.b64encode(png).decode()}]}


def saturated(ask: Any, url: str, steps: tuple[int, int]) -> float:
    """Images a second when it is asked for many at once."""
    asks = arrivals(["base"], WORDS, steps, rate=1.0, seconds=BURST, seed=0)
    answers = ask(url, [Ask(0.0, one.body) for one in asks])
    return len(asks) / max(latencies(answers))


def latencies(answers: Sequence[Any]) -> list[float]:
    """In seconds, of answers that are all good."""
    assert all(answer.status == 200 for answer in answers), [a for a in answers if a.status != 200]
    return [answer.latency_s for answer in answers]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.7, help="of saturation")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=steps_range, default=(4, 12))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exact", action="store_true", help="passes of ours that are always full")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = ServingSettings.model_validate(
        {
            "base": "pocket",
            "sizes": ["64x64"],
            "auth": "off",
            "rates": {"per_minute": 100_000, "burst": 1000, "at_once": 1000},
            "limits": {"deadline_s": 300},
        }
    )
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        storage = Storage(f"{folder}/root")
        workers = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with workers, session(None, CPUS, storage):
            start(
                service(settings, Replicas(width=2 * AT_A_TIME, exact=asked.exact), storage, create_app),
                "127.0.0.1",
                port,
            )
            serve.run(Static.bind("pocket"), name="static", route_prefix="/static")
            urls = {
                "engine": f"http://127.0.0.1:{port}/v1/images/generations",
                "static": f"http://127.0.0.1:{port}/static",
            }

            def ask(url: str, asks: Sequence[Ask]) -> Any:
                return workers.submit(drive_apart, url, asks).result()

            told = measure(asked, urls, ask)
            stop()
    if asked.json:
        print(json.dumps(told))
        return
    print(f"steps {asked.steps}, {told['rate']} requests a second, load {told['load']}")
    for name in urls:
        print(f"  {name:<8} {told['saturated'][name]:6.2f} images/s at most, p95 {told['p95_s'][name]:.2f} s")
    print(f"  p95 is {told['ratio']} times that of static batches (goal at most 0.6)")


def measure(asked: argparse.Namespace, urls: dict[str, str], ask: Any) -> dict[str, Any]:
    """Everything of one start of the service."""
    for url in urls.values():
        saturated(ask, url, asked.steps)
    most = {name: median(saturated(ask, url, asked.steps) for _ in range(3)) for name, url in urls.items()}
    rate = asked.share * min(most.values())
    load = os.getloadavg()[0]
    p95: dict[str, list[float]] = {name: [] for name in urls}
    for number in range(asked.rounds):
        plan = arrivals(["base"], WORDS, asked.steps, rate, asked.seconds, seed=number)
        for name, url in urls.items():
            p95[name].append(percentile(latencies(ask(url, plan)), 95))
        print(f"round {number + 1} of {asked.rounds}", file=sys.stderr, flush=True)
    return {
        "steps": asked.steps,
        "share": asked.share,
        "rate": round(rate, 2),
        "load": round(load, 1),
        "saturated": {name: round(value, 2) for name, value in most.items()},
        "p95_s": {name: round(median(values), 3) for name, values in p95.items()},
        "ratio": round(median(a / b for a, b in zip(p95["engine"], p95["static"], strict=True)), 2),
    }


if __name__ == "__main__":
    main()
