"""This file is where training several runs in a bank is measured beside training them one after another.

`python -m benchmarks.bank [--steps 100] [--pairs 1] [--rounds 3] [--latents 16] [--widths 1 2 4 8] [--json]`

Both sides train LoRA subjects of `pocket` with its recipe, fp32, prior preservation, at one thread, from a lease to a
published artifact, in a process each that has its base and its libraries loaded, as a warm gang has. In turn, so that
a busy neighbour hits both alike; CPU time, because it does not depend on what else the machine does; medians.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from training import lease as lease_module
from training.bank_run import train_bank
from training.defaults import with_defaults
from training.lease import Lease
from training.loop import ResidentBase, train_run
from training.pipeline import load_tokenizer, open_base, token_ids
from training.recipe import Run

PHOTOS, CLASS_IMAGES = 4, 32
WARM_UP = 3  # steps of a run that is not measured


def silent(*_: Any) -> None:
    """Take an event."""


def table(seed: int, rows: int, side: int) -> dict[str, Any]:
    """Latents: what they are makes no difference to the time."""
    mean = np.random.default_rng(seed).standard_normal((rows, 16, side, side), dtype=np.float32)
    return {"mean": mean, "std": np.full_like(mean, 0.1)}


class Trainer:
    """A warm worker.

    Args:
        folder: For checkpoints and artifacts.
        pairs: Pairs per step.
        side: Latents along a side.
    """

    def __init__(self, folder: Path, pairs: int, side: int) -> None:
        torch.set_num_threads(1)
        lease_module.fetch = list  # type: ignore[attr-defined]  # the latents lie in the lease itself
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self.folder, self.pairs, self.side, self.numbers = folder, pairs, side, count()
        base = open_base("pocket")
        self.base = ResidentBase.load("pocket", base.revision, torch.device("cpu"))
        prompts = ["a photo of a zwx dog", "a photo of a dog"]
        self.ids = token_ids(load_tokenizer(base), prompts, base.token_limit).tolist()

    def lease(self, steps: int) -> Lease:
        """A run like every other but for its name and its seed."""
        number, base = next(self.numbers), self.base.info
        spec = {
            "subject": {"name": f"bench{number}", "class": "dog", "images": ["."]},
            "train": {"steps": steps, "pairs_per_step": self.pairs, "seed": number},
            "engine": {"precision": "fp32"},
            "checkpoint": {"every": 1_000_000},
            "validate": {"every": 0},
        }
        return Lease(
            run=Run.model_validate(with_defaults(spec)).model_dump(mode="json", by_alias=True),
            name=f"bench{number}",
            version="v1",
            base_model=base.model,
            base_revision=base.revision,
            storage_uri=str(self.folder),
            subject_latents=[table(number, PHOTOS, self.side)],
            class_latents=[table(0, CLASS_IMAGES, self.side)],
            subject_ids=self.ids[0],
            class_ids=self.ids[1],
            identity={"identifier": "zwx", "class_noun": "dog", "template": "", "token_ids": [1]},
            meta={"fingerprint": str(number)},
        )

    def cpu_s(self, width: int | None, steps: int) -> float:
        """CPU seconds of a bank of `width` runs, or with `None` of a run alone."""
        leases = [self.lease(steps) for _ in range(width or 1)]
        began = time.process_time()
        if width is None:
            train_run(leases[0], self.base, 0, 1, silent)
        else:
            train_bank(leases, self.base, silent)
        return time.process_time() - began


def serve(connection: Connection, folder: Path, pairs: int, side: int) -> None:
    """Train what is asked for until the other side hangs up."""
    trainer = Trainer(folder, pairs, side)
    while (asked := connection.recv()) is not None:
        connection.send(trainer.cpu_s(*asked))


def run(steps: int, pairs: int, rounds: int, side: int, widths: list[int]) -> dict[str, Any]:
    """All figures."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    context = get_context(
        "spawn"
    )  # each side a process: what a bank asks of the C library is not to help the other
    alone: list[float] = []
    together: dict[int, list[float]] = {width: [] for width in widths}
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for side_name in ("alone", "together"):
            ours, theirs = context.Pipe()
            arguments = (theirs, Path(folder) / side_name, pairs, side)
            context.Process(target=serve, args=arguments, daemon=True).start()
            sides[side_name] = ours

        def ask(side_name: str, width: int | None, steps: int = steps) -> float:
            sides[side_name].send((width, steps))
            return float(sides[side_name].recv())

        ask("alone", None, WARM_UP)
        for number in range(rounds):
            for width in widths:
                ask("together", width, WARM_UP)
                alone.append(ask("alone", None))
                together[width].append(ask("together", width))
            print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
        for connection in sides.values():
            connection.send(None)
    one = median(alone)
    return {
        "steps": steps,
        "pairs_per_step": pairs,
        "latents": side,
        "rounds": rounds,
        "load": os.getloadavg(),
        "alone_s": round(one, 2),
        "together_s": {width: round(median(took) / width, 2) for width, took in together.items()},
        "ratio": {width: round(one * width / median(took), 2) for width, took in together.items()},
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = run(options.steps, options.pairs, options.rounds, options.latents, options.widths)
    if options.json:
        print(json.dumps(figures))
        return
    print(f"a run of {figures['steps']} steps alone: {figures['alone_s']} CPU s")
    print(f"{'K':>3}{'CPU s per run':>16}{'times cheaper':>16}")
    for width, seconds in figures["together_s"].items():
        print(f"{width:>3}{seconds:>16}{figures['ratio'][width]:>16}")
    print(f"load average {figures['load'][0]:.1f}")


if __name__ == "__main__":
    main()
