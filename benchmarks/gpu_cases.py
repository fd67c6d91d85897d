"""This file is where one case of `benchmarks.gpu` is measured, in a process of its own: the memory is then its own.

`python -m benchmarks.gpu_cases CASE BASE_FOLDER '{"device": "cuda", "steps": 20, ...}'`; the last line is JSON rows.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.serving import ours as draw_all
from cluster.storage import Storage
from serving.engine import Engine
from serving.protocol import PRISTINE
from training import lease as lease_module
from training.batches import Batches
from training.calibrate import _measured
from training.draw import Drawer
from training.engine import TrainingEngine
from training.figures import peak_memory_mb
from training.lease import Lease
from training.loop import ResidentBase, build_module
from training.pipeline import BaseInfo, load_tokenizer, open_base, token_ids
from training.recipe import Run
from training.request import DrawRequest

PHOTOS, CLASS_IMAGES = 4, 8
WARM_UP = 3  # steps: moments are made in the first, allocators settle in the next
PROMPTS = ("a photo of a zwx dog", "a photo of a dog")
TERA = 1e12

Row = dict[str, Any]


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[int], object], times: int, device: torch.device) -> float:
    """Wall seconds of one of `times` calls, after some that do not count."""
    for number in range(WARM_UP):
        work(number)
    wait(device)
    began = time.perf_counter()
    for number in range(WARM_UP, WARM_UP + times):
        work(number)
    wait(device)
    return (time.perf_counter() - began) / times


def flops_of(work: Callable[[], object]) -> int:
    """Floating point operations of convolutions, products and attention, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a product of two large bfloat16 matrices: what a share is a share of."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / min(seconds_of(lambda _: a @ b, 10, device) for _ in range(3))


class Bench:
    """A resident base, and runs that train it on latents whose content makes no difference."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        lease_module.fetch = list  # type: ignore[attr-defined]  # the latents lie in the lease itself
        self.device = torch.device(options["device"])
        self.steps, self.pairs, self.rank = options["steps"], options["pairs"], options["rank"]
        info = open_base(folder)
        self.base = ResidentBase.load(folder, info.revision, self.device)

    def lease(self, method: str, stage: int | str) -> Lease:
        """A run: bf16, prior preservation, cached latents; `full` trains the text encoder too, `lora` the attention."""
        info = self.base.info
        train: Row = {"method": method, "steps": 10_000, "pairs_per_step": self.pairs}
        if method == "full":
            train["text_encoder"] = {"train": True}
        else:
            train["lora"] = {"rank": self.rank, "alpha": self.rank}
        run = Run.model_validate(
            {
                "subject": {"name": "bench", "class": "dog", "images": ["."]},
                "train": train,
                "engine": {"precision": "bf16", "zero_stage": stage},
                "validate": {"every": 0},
            }
        )
        side, channels = info.latent_size, info.latent_channels
        latents = np.random.default_rng(0).standard_normal((CLASS_IMAGES, channels, side, side), np.float32)
        tables = [{"mean": latents[:rows], "std": latents[:rows] ** 2} for rows in (PHOTOS, CLASS_IMAGES)]
        ids = token_ids(load_tokenizer(info), list(PROMPTS), info.token_limit).tolist()
        dumped = run.model_dump(mode="json", by_alias=True)
        revision = info.revision
        return Lease(dumped, "bench", "v1", info.model, revision, "", tables[:1], tables[1:], *ids, {})

    def train(self, method: str, stage: int) -> list[Row]:
        """Steps of one run."""
        lease = self.lease(method, stage)
        module = build_module(self.base, lease.recipe, lease, stage)
        batches = Batches.of(lease, self.base.info, self.device, rank=0, world=1)
        engine = TrainingEngine(module, lease.recipe.train, stage, batches.per_step)

        def step(number: int) -> None:
            engine.step(number, list(batches.of_step(number)))

        took = seconds_of(step, self.steps, self.device)
        row = {
            "step_ms": 1000 * took,
            "images_per_s": 2 * self.pairs / took,
            "peak_mb": peak_memory_mb(self.device),
        }
        work = flops_of(lambda: step(WARM_UP + self.steps))
        return [{**row, "tflop": work / TERA, "tflop_per_s": work / took / TERA}]

    def bank(self, widths: Sequence[int]) -> list[Row]:
        """Steps of banks of runs; a width that has no room is said, and ends it."""
        lease, rows = self.lease("lora", "auto"), list[Row]()
        for width in widths:
            try:
                each, _ = _measured(lease, self.base, width)
            except torch.OutOfMemoryError as error:
                rows.append({"width": width, "error": str(error).splitlines()[0]})
                break
            told = {"width": width, "step_ms": 1000 * each * width, "images_per_s": 2 * self.pairs / each}
            rows.append({**told, "peak_mb": peak_memory_mb(self.device)})
        return rows


def flops_of_image(base: BaseInfo, device: str, steps: int) -> int:
    """The work of one guided image, from those of one and of two steps."""
    drawer = Drawer(base, device=device, width=2)

    def drawn(count: int) -> int:
        request = DrawRequest(PROMPTS[0], 0, steps=count, guidance=4.0)
        drawer.draw([request])  # what is made once is made
        return flops_of(lambda: drawer.draw([request]))

    return drawn(1) + (steps - 1) * (drawn(2) - drawn(1))


def serve(folder: str, options: dict[str, Any]) -> list[Row]:
    """Images of the pristine base, as many at once as each width says, guided, by the serving engine."""
    base, device, steps, rows = (
        open_base(folder),
        torch.device(options["device"]),
        options["draw_steps"],
        list[Row](),
    )
    work = flops_of_image(base, device.type, steps)
    for images in options["widths"]:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        with tempfile.TemporaryDirectory() as root:
            engine = Engine(base, Storage(root), device.type, width=2 * images)
            try:
                draw_all(engine, [PRISTINE], images, steps)
                began = time.perf_counter()
                draw_all(engine, [PRISTINE], 2 * images, steps)
                took = (time.perf_counter() - began) / (2 * images)
            finally:
                engine.close()
        told = {"width": images, "step_ms": 1000 * took * images / steps, "images_per_s": 1 / took}
        rows.append(
            {
                **told,
                "peak_mb": peak_memory_mb(device),
                "tflop": work / TERA,
                "tflop_per_s": work / took / TERA,
            }
        )
    return rows


def measure(case: str, folder: str, options: dict[str, Any]) -> list[Row]:
    """The rows of a case: `rate`, `full-0`, `full-2`, `lora-0`, `lora-2`, `bank` or `serve`."""
    if case == "rate":
        return [{"tflop_per_s": matrix_rate(torch.device(options["device"])) / TERA}]
    if case == "serve":
        return serve(folder, options)
    with tempfile.TemporaryDirectory() as group:
        backend = "nccl" if options["device"].startswith("cuda") else "gloo"
        dist.init_process_group(backend, init_method=f"file://{group}/group", rank=0, world_size=1)
        try:
            bench = Bench(folder, options)
            if case == "bank":
                return bench.bank(options["bank"])
            method, _, stage = case.partition("-")
            return bench.train(method, int(stage))
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
