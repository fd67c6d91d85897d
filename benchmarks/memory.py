"""This file is where the estimate of a worker's memory is held against what workers really take.

`python -m benchmarks.memory [--only WORD...] [--json]`

Every case is a few steps and a checkpoint of the engine of a gang's rank, in processes of their own: the peak of a
process is kept until it ends. The base is pocket, or pocket with a UNet so wide that the libraries matter little.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from training.batches import Batches
from training.dataplan import DataPlan
from training.engine import TrainingEngine, zero_stage
from training.figures import peak_memory_mb
from training.lease import LatentTable, Lease
from training.loop import ResidentBase, build_module
from training.memory import estimate
from training.pipeline import empty_unet, load_text_encoder, open_base
from training.pipeline_files import save_pipeline
from training.recipe import Run
from training.section import merge

STEPS = 3  # moments are there from the second one on
SUBJECT_ROWS, CLASS_ROWS = 4, 8
WIDE = (256, 448)  # channels of the wide UNet: 55 million parameters


@dataclass(frozen=True)
class Case:
    """A run that is measured."""

    name: str
    base: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1


FULL = {"train": {"method": "full", "pairs_per_step": 4, "text_encoder": {"train": True}}}
CHECKPOINTING = {"engine": {"gradient_checkpointing": True}}


def _zero(stage: int, **engine: Any) -> dict[str, Any]:
    return merge(FULL, {"engine": {"zero_stage": stage, **engine}})


CASES = (
    Case("pocket lora", "pocket", {"train": {"pairs_per_step": 4}}),
    Case("pocket full", "pocket", FULL),
    Case("pocket full, 64 pairs", "pocket", merge(FULL, {"train": {"pairs_per_step": 64}})),
    Case(
        "pocket full, 64 pairs in 4",
        "pocket",
        merge(FULL, {"train": {"pairs_per_step": 64, "accumulation": 4}}),
    ),
    Case(
        "pocket full, 64 pairs, checkpointing",
        "pocket",
        merge(merge(FULL, CHECKPOINTING), {"train": {"pairs_per_step": 64}}),
    ),
    Case("wide lora", "wide", {"train": {"pairs_per_step": 4}}),
    Case("wide full", "wide", FULL),
    Case("wide full, ZeRO-0, 2 workers", "wide", _zero(0), 2),
    Case("wide full, ZeRO-1, 2 workers", "wide", _zero(1), 2),
    Case("wide full, ZeRO-2, 2 workers", "wide", _zero(2), 2),
    Case("wide full, ZeRO-3, 2 workers", "wide", _zero(3), 2),
    Case("wide full, ZeRO-2, offload", "wide", _zero(2, offload=True), 2),
)


def run_of(case: Case, base: str) -> Run:
    """The recipe of a case."""
    spec = {
        "base": {"model": base},
        "subject": {"name": "bench", "class": "backpack", "images": ["x"]},
        "train": {"steps": STEPS},
        "engine": {"precision": "fp32"},
        "checkpoint": {"every": STEPS - 1},
    }
    return Run.model_validate(merge(spec, case.settings))


def widen(folder: Path) -> Path:
    """Write pocket with a wide UNet of random weights."""
    base = open_base("pocket")
    unet: Any = type(empty_unet(base)).from_config(  # type: ignore[attr-defined]
        {**empty_unet(base).config, "block_out_channels": WIDE}  # type: ignore[dict-item]
    )
    unet.save_config(folder / "unet")
    save_pipeline(base, unet, load_text_encoder(base), folder)
    unet.save_config(folder / "unet")
    return folder


def measure(case: Case, base: str) -> float:
    """The largest peak of the workers of a case, in MB."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    run = run_of(case, base).model_dump_json(by_alias=True)
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            [sys.executable, "-m", "benchmarks.memory", "--work", run, str(rank), str(case.workers), folder]
            for rank in range(case.workers)
        ]
        workers = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=environment) for c in commands]
        said = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"{case.name} failed")
    return max(float(text.splitlines()[-1]) for text in said)


def work(run: Run, rank: int, world: int, folder: Path) -> None:
    """Be one worker of a case, and say the peak at its end."""
    import training.gang  # noqa: F401  (Ray is part of what a worker holds)

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    device = torch.device("cpu")
    base = ResidentBase.load(run.base.model, open_base(run.base.model).revision, device)
    ids = [[0] * (base.info.token_limit - 1) + [last] for last in (0, 1)]
    dumped = run.model_dump(mode="json", by_alias=True)
    lease = Lease(dumped, "bench", "v1", base.info.model, base.info.revision, "", [], [], ids[0], ids[1], {})
    stage = zero_stage(run.engine, run.train, world)
    module = build_module(base, run, lease, stage)
    size = base.info.latent_size
    tables = [
        LatentTable(
            *np.random.default_rng(0).random((2, rows, base.info.latent_channels, size, size), np.float32)
        )
        for rows in (SUBJECT_ROWS, CLASS_ROWS)
    ]
    plan = DataPlan(0, SUBJECT_ROWS, CLASS_ROWS, run.train.pairs_per_step, 1000, run.prior.weight)
    scale = base.info.scaling_factor
    batches = Batches(plan, tables, torch.tensor(ids), scale, rank, world, run.train.accumulation, device)
    engine = TrainingEngine(module, run.train, stage, batches.per_step, offload=run.engine.offload)
    for step in range(STEPS):
        engine.step(step, list(batches.of_step(step)))
    engine.state(STEPS)
    print(peak_memory_mb(device))


def main() -> None:
    """Measure every case, or be a worker of one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name holds one of these")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", nargs=4, metavar=("RUN", "RANK", "WORLD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        run, rank, world, folder = options.work
        work(Run.model_validate_json(run), int(rank), int(world), Path(folder))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        wide = str(widen(Path(folder)))
        for case in CASES:
            if not any(word in case.name for word in options.only):
                continue
            base = wide if case.base == "wide" else case.base
            run = run_of(case, base)
            foretold = estimate(open_base(base), run, "cpu", case.workers).peak / 1e6
            rows.append({"case": case.name, "measured_mb": measure(case, base), "estimated_mb": foretold})
            if not options.json:
                print("| {case} | {measured_mb:.0f} | {estimated_mb:.0f} |".format(**rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
