"""This file is where a running service is asked for images as people ask: at moments of their own, answered or not.

    python -m benchmarks.load http://127.0.0.1:8000 --models rex,blue [--token T] [--rate 2] [--seconds 60]
        [--steps 4-12] [--prompt "a photo of {subject}"] [--seed 0] [--json]

Arrivals are a Poisson process, drawn before the first request is sent (an open loop): a service that is slow is asked
no less. What it prints counts every request: answered, refused with a word that says when to try again, or failed.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

import httpx2

PATIENCE_S = 300.0


@dataclass(frozen=True)
class Ask:
    """One request."""

    at_s: float
    """When it is sent, from the start."""
    body: dict[str, Any]
    """Of `POST /v1/images/generations`."""


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    status: int
    """Of HTTP; 0 without an answer."""
    latency_s: float
    """From the moment it was to be sent to the last byte of its answer."""
    retry: bool
    """Whether an answer that is not 200 says when to try again."""
    said: str = ""
    """The error's code and message."""


def arrivals(
    models: Sequence[str], prompt: str, steps: tuple[int, int], rate: float, seconds: float, seed: int
) -> list[Ask]:
    """Requests of a Poisson process, `rate` a second for so many seconds, of random models and numbers of steps."""
    chance = random.Random(seed)
    asks: list[Ask] = []
    now = chance.expovariate(rate)
    while now < seconds:
        body = {
            "model": chance.choice(models),
            "prompt": prompt,
            "steps": chance.randint(*steps),
            "seed": len(asks),
        }
        asks.append(Ask(now, body))
        now += chance.expovariate(rate)
    return asks


async def drive(url: str, asks: Sequence[Ask], token: str = "") -> list[Answer]:
    """Send every request at its moment; the answers, in the order of the requests.

    Args:
        url: Of the images route.
        asks: What is sent, and when.
        token: Of a key.
    """
    headers = {"authorization": f"Bearer {token}"} if token else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=PATIENCE_S, headers=headers, limits=limits) as client:
        began = time.monotonic()

        async def one(ask: Ask) -> Answer:
            await asyncio.sleep(ask.at_s - (time.monotonic() - began))
            try:
                answer = await client.post(url, json=ask.body)
            except httpx2.HTTPError as error:
                return Answer(0, time.monotonic() - began - ask.at_s, False, repr(error))
            latency_s = time.monotonic() - began - ask.at_s
            said = "" if answer.status_code == 200 else answer.text[:300]
            return Answer(answer.status_code, latency_s, "retry-after" in answer.headers, said)

        return await asyncio.gather(*(one(ask) for ask in asks))


def drive_apart(url: str, asks: Sequence[Ask], token: str = "") -> list[Answer]:
    """`drive`, for a process of its own."""
    return asyncio.run(drive(url, asks, token))


def percentile(latencies_s: Sequence[float], percent: int) -> float:
    """A percentile of at least two latencies, in seconds."""
    return quantiles(latencies_s, n=100, method="inclusive")[percent - 1]


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts by what became of them, and latencies of those that were answered, in seconds."""
    good = [answer.latency_s for answer in answers if answer.status == 200]
    bad = [answer for answer in answers if answer.status != 200]
    return {
        "requests": len(answers),
        "answered": len(good),
        "retry": sum(answer.retry for answer in bad),
        "failed": sum(not answer.retry for answer in bad),
        "statuses": dict(Counter(str(answer.status) for answer in answers)),
        "p50_s": round(percentile(good, 50), 3) if len(good) > 1 else None,
        "p95_s": round(percentile(good, 95), 3) if len(good) > 1 else None,
        "max_s": round(max(good), 3) if good else None,
    }


def steps_range(text: str) -> tuple[int, int]:
    """`4-12`, or `8` for always the same."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def main() -> None:
    """Load a service and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the service")
    parser.add_argument("--models", default="base", help="comma-separated")
    parser.add_argument("--prompt", default="a photo of {subject}")
    parser.add_argument("--token", default="")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=steps_range, default=(4, 12))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    asks = arrivals(asked.models.split(","), asked.prompt, asked.steps, asked.rate, asked.seconds, asked.seed)
    answers = drive_apart(f"{asked.url.rstrip('/')}/v1/images/generations", asks, asked.token)
    told = summary(answers)
    if asked.json:
        print(json.dumps({**told, "bad": [asdict(a) for a in answers if a.status != 200][:20]}))
        return
    print(f"{told['requests']} requests in {asked.seconds:.0f} s, {asked.rate} a second:")
    print(f"  {told['answered']} answered, {told['retry']} told to try again, {told['failed']} failed")
    if told["p50_s"] is not None:
        print(
            f"  latency: {told['p50_s']} s in the middle, {told['p95_s']} s for 95 %, {told['max_s']} s at most"
        )
    for answer in [answer for answer in answers if answer.status != 200][:5]:
        print(f"  {answer.status}: {answer.said}")


if __name__ == "__main__":
    main()
