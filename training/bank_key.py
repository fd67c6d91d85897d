"""This file is where it is told which runs can be trained together in one bank."""

import json

from cluster.storage import Storage, sha256
from training.objective_settings import Objective
from training.optimizer_settings import Optimizer
from training.part_settings import ATTENTION, OF_TEXT
from training.recipe import Run

# Ends of the names of a denoiser's layers that are linear in every base: a bank adapts no others
LINEAR = tuple(
    f".{name}"
    for name in (
        *(*ATTENTION, *OF_TEXT),
        *("ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1", "linear_2"),
    )
)
_MULTIRES = {"multires_noise_iterations", "multires_noise_discount"}
_DENSITY = {"timesteps", "logit_mean", "logit_std"}


def bankable(run: Run, world: int) -> str | None:
    """What keeps a run of `world` workers out of a bank, as the setting that does; `None` when nothing does."""
    train, engine, every = run.train, run.engine, run.validate_.every
    reasons = {
        "train.method": train.method != "lora",
        "train.text_encoder.train": train.text_encoder.train,
        "train.new_tokens.count": train.new_tokens.count > 0,
        "train.objective.mask": train.objective.mask != "none",
        "data.buckets": run.data.buckets,
        "prior.target": run.prior.weight > 0 and run.prior.target == "base",
        "train.lora.kind": train.lora.kind != "lora",
        "train.lora.dora": train.lora.dora,
        "train.optimizer": train.optimizer != Optimizer(),
        "train.ema_decay": train.ema_decay is not None,
        "train.load_best_at_end": train.load_best_at_end,
        "train.stop": train.stop is not None,
        "train.changes": bool(train.changes),
        "train.accumulation": train.accumulation > 1,
        "train.lora.targets": not all(f".{target}".endswith(LINEAR) for target in train.lora.targets),
        "engine.zero_stage": engine.zero_stage not in ("auto", 0),
        "engine.offload": engine.offload,
        "cluster.workers": world > 1,
        "validate.every": 0 < every < train.steps and bool(run.validate_.prompts),
    }
    return next((setting for setting, holds in reasons.items() if holds), None)


def bank_key(run: Run, base_revision: str) -> str | None:
    """Runs of the same key can be trained together; `None` is trained alone.

    Learning rate, steps, seed, clipping, decay, warm-up and the weight of the prior may differ in a bank.
    """
    if bankable(run, run.cluster.workers):
        return None
    train, lora, engine = run.train, run.train.lora, run.engine
    parts = [
        base_revision,
        [lora.rank, list(lora.targets)],
        train.pairs_per_step,
        run.prior.weight > 0,
        [engine.precision, engine.gradient_checkpointing],
        [run.cluster.cpus_per_worker, run.cluster.gpus_per_worker],
    ]
    if train.objective != Objective():  # the keys of all others are what they were
        # a setting that came later changes no key where it is at its default
        off = set() if train.objective.multires_noise_iterations else _MULTIRES
        off |= set() if train.objective.timesteps != "auto" else _DENSITY
        parts.append(train.objective.model_dump(exclude=off))
    return sha256(json.dumps(parts).encode())[:16]


def calibration_path(key: str) -> str:
    """Where it is kept how many runs of a key are best trained together."""
    return f"calibration/{key}.json"


def calibrated_width(storage: Storage, key: str) -> int | None:
    """How many runs of a key are best trained together; `None` when that was not measured yet."""
    try:
        return int(storage.read_json(calibration_path(key))["width"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
