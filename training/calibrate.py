"""This file is where it is measured how many runs of a kind are best trained together: by speed, within a memory."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from training.bank import Bank, stack
from training.bank_adam import BankAdam
from training.batches import Batches
from training.heap import keep_freed_memory
from training.lease import Lease
from training.loop import ResidentBase
from training.memory import FRAGMENTED, Live

WIDTHS = (1, 2, 4, 8)
STEPS = 3  # measured at each width, the fastest counts; those before it are for caches and allocators
GAIN = 0.03  # a wider bank has to be faster by so much: it also waits longer for its slowest run


@dataclass(frozen=True)
class Calibration:
    """What was measured, by width."""

    width: int
    """The best one."""
    seconds: dict[int, float]
    """Of one step of one run."""
    bytes: dict[int, int]
    """That a bank takes besides the base."""


def choose_width(
    lease: Lease, base: ResidentBase, room_bytes: int | None, most: int = WIDTHS[-1]
) -> Calibration:
    """Measure some steps of a run at growing widths, until a wider bank would not fit or is no faster.

    Args:
        lease: A run of the kind; nothing of it is reported or written.
        base: The base it starts from.
        room_bytes: What a bank may take besides the base; `None` is unknown, and no limit.
        most: No wider than this.
    """
    keep_freed_memory()
    width = 1
    seconds: dict[int, float] = {}
    taken: dict[int, int] = {}
    for slots in (w for w in WIDTHS if w <= most):
        if room_bytes is not None and seconds and _foretold(taken, slots) > room_bytes:
            break
        try:
            seconds[slots], taken[slots] = _measured(lease, base, slots)
        except torch.OutOfMemoryError:
            break
        if slots > 1 and seconds[slots] > seconds[width] * (1 - GAIN):
            break
        width = slots
    return Calibration(width, seconds, taken)


def _foretold(taken: Mapping[int, int], slots: int) -> int:
    """Bytes of a bank so wide: as many for each slot more as the last ones took."""
    last = max(taken)
    each = (taken[last] - taken[last // 2]) / (last - last // 2) if last > 1 else taken[last]
    return int(taken[last] + each * (slots - last))


def _measured(lease: Lease, base: ResidentBase, slots: int) -> tuple[float, int]:
    """Seconds of a step of one run in a bank so wide, and the bytes that the bank takes."""
    run, cuda = lease.recipe, base.device.type == "cuda"
    before = torch.cuda.memory_allocated(base.device) if cuda else 0
    bank = Bank(base, run, slots)
    adam = BankAdam(bank.adapters)
    batches = Batches.of(lease, base.info, torch.device("cpu"), rank=0, world=1)
    for slot in range(slots):
        bank.take(slot, run, lease.prompts)
        bank.adapters.start(slot, run.train.seed)

    def step(number: int) -> float:
        began = time.perf_counter()
        rows = next(batches.of_step(number % run.train.steps))
        losses = bank(stack([rows] * slots, len(rows.role)).to(base.device))
        losses.loss.sum().backward()
        norms = adam.step(dict.fromkeys(range(slots), (run.train, 0)))
        norms.sum().item()  # waits for the device
        return time.perf_counter() - began

    if cuda:
        torch.cuda.reset_peak_memory_stats(base.device)
        step(0)
        taken = torch.cuda.max_memory_allocated(base.device) - before
    else:  # not what the process grows by: it may have room left from other runs
        with Live([*bank.parameters(), *bank.adapters.rows]) as live:
            step(0)
        heap = 1 + FRAGMENTED[run.engine.gradient_checkpointing]
        taken = int(live.peak * heap) + sum(rows.nbytes for rows in bank.adapters.rows)
    return min(step(1 + number) for number in range(STEPS)) / slots, taken
