"""This file is where it is settled what a campaign asks of Kubernetes: how many pods, and how large each is."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

from cluster.errors import UserError
from orchestrator.manifest import CampaignSpec
from orchestrator.order import WIDTHS
from orchestrator.site import STREAM_CPUS
from training.recipe import Run

GIB = 2**30
MOST_GANGS = 4  # that `auto` asks for; more are the user's to pay for
POD_CPUS = 4  # of a pod without a GPU, or as many as one worker asks for
OBJECT_STORE = 0.3  # of a pod's memory, which Ray takes for its object store; it lies in /dev/shm and counts
ASSUMED_GIB = 32  # of a base that is not on this machine
CUDA_HOST = 3 * GIB  # memory of the CPU that a process with CUDA takes (not measured: taken from experience)
HEAD_CPUS, HEAD_GIB = 2, 4  # the driver, Ray's own processes and the dashboard
MAILBOX_BYTES = 80_000_000  # of a gang, on the head
NOTICE_S = 30.0  # least notice of a spot node, in which a gang saves and leaves
SAVED_PER_S = 50_000_000  # bytes of a checkpoint into an object store (assumed, on the low side)

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class JobSize:
    """What a campaign asks for. All worker pods are alike."""

    device: str
    """`cpu` or `cuda`."""
    gangs: int
    """Gangs at a time."""
    pods: int
    """Worker pods."""
    pods_per_gang: int
    """Worker pods that the first gang needs, and where an autoscaled cluster starts."""
    cpus: int
    """CPU cores of each."""
    gpus: int
    """GPUs of each."""
    memory_gib: int
    """Memory of each."""
    head_memory_gib: int
    """Memory of the head."""
    grace_s: int
    """Seconds that a worker pod has to save and leave."""
    assumed: bool
    """The memory is a guess: the base is not on this machine, so that nothing could be estimated."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def line(self) -> str:
        """The same for people."""
        gpus = f", {self.gpus} GPU" if self.gpus else ""
        guess = " (assumed; --memory sets it)" if self.assumed else ""
        return (
            f"{self.gangs} gangs on {self.pods} worker pods of {self.cpus} CPUs{gpus}, "
            f"{self.memory_gib} GiB{guess}; a head of {HEAD_CPUS} CPUs, {self.head_memory_gib} GiB"
        )


def job_size(
    spec: CampaignSpec, device: Device = "auto", gangs: int | None = None, memory_gib: int | None = None
) -> JobSize:
    """What to ask for.

    Args:
        spec: The campaign.
        device: What its gangs train on; `auto` is a GPU, except for `pocket` and runs that ask for none.
        gangs: At a time; `None` takes `schedule.gangs`, and of `auto` as many as there are groups, up to 4.
        memory_gib: Of a worker pod; `None` estimates it where the bases are on this machine.

    Raises:
        UserError: No subject can be trained, or the runs and the device contradict each other.
    """
    runs = [row.run for row in spec.rows if row.run]
    if not runs:
        reason = next(row.error for row in spec.rows if row.error)
        raise UserError(f"none of the {len(spec.rows)} subjects can be trained", str(reason), "correct them")
    on = _device(runs, device)
    workers = max(run.cluster.workers for run in runs)
    cores = max(run.cluster.cpus_per_worker for run in runs)
    groups = ceil(len(runs) / max(WIDTHS)) if spec.settings.schedule.bank == "auto" else len(runs)
    asked = spec.settings.schedule.gangs
    number = gangs or (min(groups, MOST_GANGS) if asked == "auto" else asked)
    if on == "cuda":
        share = max(_gpus(run) for run in runs)
        gpus = max(1, ceil(share))
        seats = max(1, int(gpus // share))  # workers on one pod
        cpus = seats * cores + STREAM_CPUS
        wanted, first = number * workers, workers
    else:
        gpus, seats = 0, ceil(POD_CPUS / cores)
        cpus = seats * cores
        stream = ceil(STREAM_CPUS / cores)  # seats that reading, encoding and drawing take
        wanted, first = number * workers + stream, workers + stream
    needs = _needs(runs, on, spec.settings.schedule.bank)
    taken = seats * max((need.memory for need in needs), default=0)
    estimated = ceil(taken / (1 - OBJECT_STORE) / GIB) + 1
    return JobSize(
        device=on,
        gangs=number,
        pods=ceil(wanted / seats),
        pods_per_gang=ceil(first / seats),
        cpus=cpus,
        gpus=gpus,
        memory_gib=memory_gib or (estimated if needs else ASSUMED_GIB),
        head_memory_gib=HEAD_GIB + ceil(number * MAILBOX_BYTES / GIB),
        grace_s=_grace(max((need.checkpoint for need in needs), default=0)),
        assumed=memory_gib is None and not needs,
    )


def _device(runs: Sequence[Run], wanted: Device) -> str:
    asking = [run for run in runs if run.cluster.gpus_per_worker not in ("auto", 0)]
    if wanted == "cpu" and asking:
        raise UserError(
            "the campaign asks for GPUs and is submitted without",
            f"cluster.gpus_per_worker is {asking[0].cluster.gpus_per_worker} for {asking[0].subject.name}",
            "leave --device cpu out, or set cluster.gpus_per_worker to 0",
        )
    if wanted == "cuda" and all(run.cluster.gpus_per_worker == 0 for run in runs):
        raise UserError(
            "the campaign asks for no GPU and is submitted with",
            "cluster.gpus_per_worker is 0",
            "set it to auto",
        )
    if wanted != "auto":
        return wanted
    auto = any(run.cluster.gpus_per_worker == "auto" and run.base.model != "pocket" for run in runs)
    return "cuda" if asking or auto else "cpu"


def _gpus(run: Run) -> float:
    """GPUs that each of its workers takes where there are some; never 0, as all pods are alike."""
    wanted = run.cluster.gpus_per_worker
    return 1.0 if wanted == "auto" else float(wanted) or 1.0


@dataclass(frozen=True)
class _Need:
    """Of one worker, in bytes."""

    memory: int
    checkpoint: int


def _needs(runs: Sequence[Run], device: str, bank: str | int) -> list[_Need]:
    """What the runs need whose base is on this machine; those that need the same are estimated once."""
    alike: dict[str, Run] = {}
    for run in runs:
        if run.base.model == "pocket" or Path(run.base.model).is_dir():
            said = run.model_dump(
                mode="json", include={"base", "train", "engine", "cluster", "validate_", "prior"}
            )
            for setting in ("steps", "lr", "seed", "prompt"):
                said["train"].pop(setting, None)
            alike.setdefault(json.dumps(said, sort_keys=True), run)
    return [_need(run, device, bank) for run in alike.values()]


def _need(run: Run, device: str, bank: str | int) -> _Need:
    from training.bank_key import bankable
    from training.memory import LIBRARIES, estimate
    from training.pipeline import open_base

    found = estimate(open_base(run.base.model, run.base.revision), run, device, run.cluster.workers)
    saved = 3 * found.weights  # weights and two moments
    if device == "cuda":  # the base passes through the CPU, checkpoints are put together there
        host = LIBRARIES["cpu"] + CUDA_HOST + 2 * found.base + found.weights + saved + found.offloaded
        return _Need(host, saved)
    width = 1
    if bankable(run, run.cluster.workers) is None:
        width = max(WIDTHS) if bank == "auto" else int(bank)
    trains = found.libraries + found.base + width * (found.weights + found.optimizer + found.step)
    draws = found.libraries + 3 * found.base  # the whole pipeline, and what decoding takes
    return _Need(max(trains, draws), saved * width)


def _grace(checkpoint_bytes: int) -> int:
    """Seconds above the time that a checkpoint takes."""
    return max(60, ceil(NOTICE_S + checkpoint_bytes / SAVED_PER_S))
