"""This file is where drawing many subjects is measured beside diffusers, which draws one request at a time.

    python -m benchmarks.serving [--subjects 8] [--images 16] [--steps 6] [--rank 4] [--rounds 3] [--json]

Both sides hold pocket and every subject's LoRA in memory, and are asked for the same images, subject after subject in
turn, guided, on one thread. Theirs is stock `StableDiffusionPipeline`: `set_adapters`, then one image. Ours is the
engine. CPU time, variants in turn, medians; `no_lora` is the engine drawing the pristine base, its upper bound. A
subject that is not in memory is measured by wall time: to its image, less that of one that is.
"""

import argparse
import json
import os
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import nn

from cluster.registry import Registry
from cluster.storage import Storage
from serving.engine import Engine
from serving.protocol import PRISTINE, Drawn, ImageOrder
from training.artifact import Identity, artifact_meta, artifact_path, write_weights
from training.lora import attach
from training.part_settings import ATTENTION
from training.pipeline import BaseInfo, load_text_encoder, load_unet, open_base
from training.recipe import Run
from training.request import DrawRequest

WORDS = "a photo of a zwx backpack on the beach"
GUIDANCE = 4.0


def publish(storage: Storage, base: BaseInfo, scratch: Path, name: str, rank: int, seed: int) -> None:
    """A subject whose adapters say something."""
    run = Run.model_validate(
        {
            "base": {"model": "pocket"},
            "subject": {"name": name, "class": "backpack", "images": ["photos"]},
            "train": {"method": "lora", "lora": {"rank": rank, "alpha": rank, "targets": ATTENTION}},
        }
    )
    unet, text_encoder = load_unet(base), load_text_encoder(base)
    attach(unet, text_encoder, run.train.lora, False, seed)
    torch.manual_seed(seed)
    for p in (p for p in unet.parameters() if p.requires_grad):
        nn.init.normal_(p, std=0.02)
    write_weights(base, run, unet, text_encoder, scratch)
    identity = Identity("zwx", "backpack", "a {identifier} {class}", (0,))
    storage.publish(scratch, artifact_path(name, "v1"), artifact_meta(base, run, identity, "f", None, {}))
    Registry(storage).add(name, "v1", {"artifact": artifact_path(name, "v1"), "fingerprint": "f"})


def ours(engine: Engine, subjects: Sequence[str], images: int, steps: int) -> None:
    """Ask the engine for everything at once, and wait."""
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for i in range(images):
        name = subjects[i % len(subjects)]
        request = DrawRequest(WORDS, i, steps=steps, guidance=GUIDANCE)
        engine.submit(
            ImageOrder(f"{time.monotonic()}-{i}", name, "" if name == PRISTINE else "v1", request), said.put
        )
    left = images
    while left:
        event = said.get()
        if isinstance(event, Exception):
            raise event
        left -= isinstance(event, Drawn)


def theirs(pipe: Any, subjects: Sequence[str], images: int, steps: int) -> None:
    """Ask diffusers, one image after the other."""
    for i in range(images):
        pipe.set_adapters(subjects[i % len(subjects)])
        generator = torch.Generator("cpu").manual_seed(i)
        pipe(WORDS, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator)


def cpu_of(work: Callable[[], None]) -> float:
    """CPU seconds of this process, all threads."""
    began = time.process_time()
    work()
    return time.process_time() - began


def wall_of(work: Callable[[], None]) -> float:
    """Wall seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    names = [f"s{i}" for i in range(asked.subjects)]
    base = open_base("pocket")
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(f"{folder}/root")
        for seed, name in enumerate(names):
            publish(storage, base, Path(folder) / name, name, asked.rank, seed)
        engine = Engine(base, storage, "cpu")
        pipe = StableDiffusionPipeline.from_pretrained(base.path, local_files_only=True)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        for name in names:
            pipe.load_lora_weights(Path(folder) / name, adapter_name=name)
        load = os.getloadavg()[0]
        variants: dict[str, Callable[[], None]] = {
            "diffusers": lambda: theirs(pipe, names, asked.images, asked.steps),
            "engine": lambda: ours(engine, names, asked.images, asked.steps),
            "no_lora": lambda: ours(engine, [PRISTINE], asked.images, asked.steps),
        }
        for warm in variants.values():
            warm()
        spent: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(asked.rounds):
            for name, variant in variants.items():
                spent[name].append(cpu_of(variant))
            print(f"round {number + 1} of {asked.rounds}", file=sys.stderr, flush=True)
        added = []
        for i in range(4 * asked.rounds):
            name = names[i % len(names)]
            engine._wardrobe.cache.forget((name, "v1"))
            cold = wall_of(lambda name=name: ours(engine, [name], 1, asked.steps))  # type: ignore[misc]
            warm_s = wall_of(lambda name=name: ours(engine, [name], 1, asked.steps))  # type: ignore[misc]
            added.append(cold - warm_s)
        engine.close()
    each = {name: median(seconds) / asked.images for name, seconds in spent.items()}
    told = {
        **{key: getattr(asked, key) for key in ("subjects", "images", "steps", "rank", "rounds")},
        "load": round(load, 1),
        "cpu_ms_per_image": {name: round(1000 * seconds, 1) for name, seconds in each.items()},
        "ratio": round(each["diffusers"] / each["engine"], 2),
        "lora_cost_percent": round(100 * (each["engine"] / each["no_lora"] - 1), 1),
        "cold_subject_adds_ms": round(1000 * median(added), 1),
    }
    if asked.json:
        print(json.dumps(told))
        return
    print(f"{asked.subjects} subjects, rank {asked.rank}, {asked.steps} steps, load {load:.1f}")
    for name, seconds in each.items():
        print(f"  {name:<10} {1000 * seconds:8.1f} CPU ms an image")
    print(f"  {told['ratio']} times the images of diffusers (goal 1.7)")
    print(f"  adapters cost {told['lora_cost_percent']} % over none (goal at most 15)")
    print(f"  a subject not in memory adds {told['cold_subject_adds_ms']} ms (goal at most 100)")


if __name__ == "__main__":
    main()
