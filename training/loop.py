"""This file is where a run is trained: from a lease to a published artifact."""

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from cluster.storage import Storage
from training import checkpoint
from training.artifact import Identity, artifact_meta, artifact_path, write_weights
from training.batches import Batches
from training.engine import TrainingEngine, compute_type, zero_stage
from training.figures import Figures, Report
from training.lease import Lease
from training.lora import attach
from training.module import DreamBoothModule
from training.pipeline import BaseInfo, load_text_encoder, load_unet, open_base
from training.recipe import Run
from training.schedule import NoiseSchedule


@dataclass(frozen=True)
class ResidentBase:
    """A pristine base that a gang keeps on its device, one run after another."""

    info: BaseInfo
    unet: nn.Module
    text_encoder: nn.Module

    @classmethod
    def load(cls, model: str, revision: str, device: torch.device) -> "ResidentBase":
        """Load a base; its revision must be the one the lease names."""
        info = open_base(model, revision)
        return cls(info, load_unet(info).to(device), load_text_encoder(info).to(device))

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.unet.parameters()).device

    def fresh(self, share: bool) -> tuple[nn.Module, nn.Module]:
        """A UNet and a text encoder to train; with `share` new modules around the same frozen parameters."""
        shared = {id(p): p for part in (self.unet, self.text_encoder) for p in part.parameters() if share}
        unet, text_encoder = copy.deepcopy((self.unet, self.text_encoder), shared)
        return unet, text_encoder


def train_run(lease: Lease, base: ResidentBase, rank: int, world: int, report: Report) -> dict[str, float]:
    """Train a leased run and publish its artifact. Every rank of the gang calls this together.

    Args:
        lease: The run.
        base: The pristine base it starts from; left as it is.
        rank: This rank.
        world: Ranks.
        report: Takes kind and payload of events: `started`, `steps`, `checkpoint`, `note`.

    Returns:
        The final losses, those of the artifact's manifest.

    Raises:
        UserError: The run diverges.
        SystemFailure: It cannot be computed as asked.
    """
    run, storage = lease.recipe, Storage(lease.storage_uri)
    published = storage.manifest(artifact_path(lease.name, lease.version))
    if published and published["fingerprint"] == lease.fingerprint:
        return dict(published["metrics"])  # the gang died between publishing and saying so
    state = _agreed_state(storage, lease, rank, report)
    stage = zero_stage(run.engine, run.train, world)
    module = build_module(base, run, lease, stage)
    batches = Batches.of(lease, base.info, base.device, rank, world)
    engine = TrainingEngine(module, run.train, stage, batches.per_step, state)
    figures = Figures(report if rank == 0 else None)
    start = state.step if state else 0
    report("started", {"from_step": start, "pid": os.getpid()})
    try:
        for step in range(start, run.train.steps):
            figures.add(engine.step(step, list(batches.of_step(step))))
            done = step + 1
            if done % run.checkpoint.every == 0 and done < run.train.steps:
                figures.check_finite()
                _save(engine, storage, lease, run, done, rank, report)
        figures.check_finite()
        metrics = figures.final()
        _publish(engine, storage, lease, run, base, metrics, rank)
    finally:
        engine.close()
    return metrics


def build_module(base: ResidentBase, run: Run, lease: Lease, stage: int) -> DreamBoothModule:
    """The module a run trains, from the pristine base and nothing else.

    ZeRO-3 shards frozen parameters too, so it cannot share those of the base.
    """
    is_lora, train = run.train.method == "lora", run.train
    unet, text_encoder = base.fresh(share=is_lora and stage < 3)
    if is_lora:
        attach(unet, text_encoder, train.lora, train.text_encoder.train, train.seed)
    else:
        unet.requires_grad_(True)
        text_encoder.requires_grad_(train.text_encoder.train)
    module = DreamBoothModule(
        unet.to(base.device),
        text_encoder.to(base.device),
        torch.tensor(lease.prompts, device=base.device),
        NoiseSchedule.from_config(base.info.scheduler),
        run.prior.weight,
        compute_type(run.engine, base.device),
    ).train()
    if run.engine.gradient_checkpointing:
        unet.enable_gradient_checkpointing()  # type: ignore[operator]
        if module.text_encoder is not None:
            text_encoder.activation_checkpointing_enable()  # type: ignore[operator]
    return module


def _agreed_state(storage: Storage, lease: Lease, rank: int, report: Report) -> checkpoint.State | None:
    """The checkpoint to go on from: rank 0 finds it, the others read the same one."""
    path, fingerprint = lease.run_path, lease.fingerprint
    state = None
    if rank == 0:
        state = checkpoint.latest(storage, path, fingerprint, lambda text: report("note", {"text": text}))
    chosen = [state.step if state else 0]
    dist.broadcast_object_list(chosen, src=0)
    if rank and chosen[0]:
        state = checkpoint.load(storage, path, chosen[0], fingerprint)
    return state


def _save(
    engine: TrainingEngine, storage: Storage, lease: Lease, run: Run, step: int, rank: int, report: Report
) -> None:
    state = engine.state(step)  # all ranks: it gathers
    if rank == 0:
        checkpoint.save(storage, lease.run_path, state, lease.fingerprint, run.checkpoint.keep)
        report("checkpoint", {"step": step})


def _publish(
    engine: TrainingEngine,
    storage: Storage,
    lease: Lease,
    run: Run,
    base: ResidentBase,
    metrics: dict[str, float],
    rank: int,
) -> None:
    """Write the artifact (rank 0) while every rank holds the weights whole."""
    with engine.gathered():
        if rank:
            return
        meta = artifact_meta(
            base.info,
            run,
            Identity.from_json(lease.identity),
            lease.fingerprint,
            lease.meta.get("prior_key"),
            metrics,
        )
        with tempfile.TemporaryDirectory(prefix="raybooth-") as folder:
            module = engine.module
            text_encoder = base.text_encoder if module.text_encoder is None else module.text_encoder
            write_weights(base.info, run, module.unet, text_encoder, Path(folder))
            storage.publish(Path(folder), artifact_path(lease.name, lease.version), meta)
