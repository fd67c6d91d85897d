"""This file is where a run is trained: from a lease to a published artifact."""

import copy
import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from cluster.errors import SystemFailure
from cluster.storage import Storage
from training import checkpoint
from training.artifact import Identity, artifact_path
from training.batches import Batches
from training.checkpoint import ROWS
from training.conditioning import leave_unread, never_trained
from training.dataplan import Role
from training.engine import TrainingEngine, compute_type, zero_stage
from training.figures import Figures, Report, rows_kept
from training.jury import Jury
from training.lease import Lease
from training.lora import attach
from training.module import DreamBoothModule
from training.new_tokens import grow, started
from training.noise import noise_process, trained_scheduler
from training.patience import Patience
from training.pipeline import BaseInfo, end_id, load_text_encoder, load_tokenizer, load_unet, open_base
from training.recipe import Run
from training.services import Services
from training.teacher import Teacher
from training.wish import Dropped, Wish, Wishes, no_wish


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

    def fresh(self, share: bool, whole: bool = False) -> tuple[nn.Module, nn.Module]:
        """A UNet and a text encoder to train.

        Args:
            share: New modules around the same frozen parameters.
            whole: Copy also what is never trained (a T5); else that is shared in any case.
        """
        parts = (self.unet, self.text_encoder)
        kept = [p for part in parts for p in part.parameters()] if share else never_trained(self.text_encoder)
        unet, text_encoder = copy.deepcopy(parts, {} if whole else {id(p): p for p in kept})
        return unet, text_encoder


def train_run(
    lease: Lease, base: ResidentBase, rank: int, world: int, report: Report, wish: Wishes = no_wish
) -> dict[str, float] | None:
    """Train a leased run and publish its artifact. Every rank of the gang calls this together.

    Args:
        lease: The run.
        base: The pristine base it starts from; left as it is.
        rank: This rank.
        world: Ranks.
        report: Takes kind and payload of events: `started {from_step, pid, workers, zero_stage}`, `steps [row...]`,
            `validation {step, loss, loss_subject, loss_class}`, `sample {step, path}`,
            `score {step, score, dino, clip_t, drift}`, `checkpoint {step, why, seconds}`, `note {text}`. Those of
            rank 0 are the run's.
        wish: What this rank wishes; polled once per step.

    Returns:
        The final losses, those of the artifact's manifest, or those so far of a lease with `until`; `None` when a rank
        wished to leave: the run goes on from the checkpoint that was saved.

    Raises:
        UserError: The run diverges.
        SystemFailure: It cannot be computed as asked, or its artifact cannot be written.
        Dropped: A rank wished so.
    """
    run, storage = lease.recipe, Storage(lease.storage_uri)
    if metrics := published_before(lease, storage, report):
        return metrics
    state = _agreed_state(storage, lease, rank, report)
    start, stage = state.step if state else 0, zero_stage(run.engine, run.train, world)
    module = build_module(base, run, lease, stage)
    batches = Batches.of(lease, base.info, base.device, rank, world)
    engine = TrainingEngine(module, run.train, stage, batches.per_step, state, run.engine.offload)
    del state  # the engine lets go of it after its first step
    images = partial(image_names, lease, batches)
    figures = Figures(report if rank == 0 else None, world, images, base.device)
    figures.go_on(rows_kept(storage, f"{lease.run_path}/{ROWS}", start))
    jury, patience = _judged(lease, storage, base, batches, start)
    services = Services(
        lease, storage, base.info, base.text_encoder, engine, batches, figures, stage, report, jury, patience
    )
    report("started", {"from_step": start, "pid": os.getpid(), "workers": world, "zero_stage": stage})
    last = run.train.steps if lease.until is None else min(lease.until, run.train.steps)
    try:
        services.catch_up(start)
        for step in range(start, last):
            if services.over:
                last = step
                break
            asked = figures.take(engine.step(step, list(batches.of_step(step)), wish()))
            if step + 1 < last:
                asked = services.after(step + 1, asked)
                if asked is Wish.DROP:
                    raise Dropped(step + 1)
                if asked is Wish.LEAVE:
                    return None
        return services.finish(last) if lease.until is None else services.pause(last, trained=start < last)
    finally:
        engine.close()


def published_before(lease: Lease, storage: Storage, report: Report) -> dict[str, float] | None:
    """The metrics of a run whose gang died between publishing and saying so, its figures told again; else `None`."""
    published = storage.manifest(artifact_path(lease.name, lease.version))
    if not published or published["fingerprint"] != lease.fingerprint:
        return None
    if told := rows_kept(storage, f"{lease.run_path}/{ROWS}", lease.recipe.train.steps):
        report("steps", told)
    return dict(published["metrics"])


def build_module(base: ResidentBase, run: Run, lease: Lease, stage: int) -> DreamBoothModule:
    """The module a run trains, from the pristine base and nothing else.

    ZeRO-3 shards frozen parameters too, so it cannot share those of the base.
    """
    is_lora, train = run.train.method == "lora", run.train
    unet, text_encoder = base.fresh(share=is_lora, whole=stage == 3)
    if is_lora:
        attach(unet, text_encoder, train.lora, train.text_encoder.train, train.seed)
    else:
        unet.requires_grad_(True)
        text_encoder.requires_grad_(train.text_encoder.train)
    leave_unread(text_encoder)
    pristine = base.text_encoder
    if train.new_tokens.count:
        identity = Identity.from_json(lease.identity)
        start = started(pristine, identity.identifier, identity.initializer_ids, train.new_tokens.count)
        end = end_id(load_tokenizer(base.info))
        grow(text_encoder, start, end)
        _, pristine = base.fresh(share=True)  # prompts name the subject, so what the base says wants them too
        grow(pristine, start, end)
    prompts = torch.tensor(lease.prompts, device=base.device)
    taught = run.prior.target == "base" and run.prior.weight > 0
    module = DreamBoothModule(
        unet.to(base.device),
        text_encoder.to(base.device),
        prompts,
        noise_process(trained_scheduler(base.info.scheduler, train.objective)),
        run.prior.weight,
        compute_type(run.engine, base.device),
        train.objective,
        Teacher.of(base.unet, pristine, prompts) if taught or train.objective.mask_prior else None,
        taught,
    ).train()
    if run.engine.gradient_checkpointing:
        module.recompute_activations()
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
        try:
            state = checkpoint.load(storage, path, chosen[0], fingerprint)
        except SystemFailure as error:
            # no end of the run, as rank 0 could read it: this worker dies and the gang starts again
            raise OSError(str(error)) from error
    return state


def _judged(
    lease: Lease, storage: Storage, base: ResidentBase, batches: Batches, start: int
) -> tuple[Jury | None, Patience | None]:
    """Who looks at the run's drawings, and what was found up to `start`; nobody where all steps are trained."""
    stop = lease.recipe.train.stop
    if stop is None:
        return None, None
    jury = Jury(lease, stop, base.info, base.unet, base.text_encoder, batches)
    return jury, Patience(stop, checkpoint.looks(storage, lease.run_path, start) if start else ())


def image_names(lease: Lease, batches: Batches, step: int) -> str:
    """The images of step `step` (from 1) for people, those of all ranks."""
    rows = batches.plan.rows(step - 1, rank=0, world=1)
    subject, of_class = ([row.table_row for row in rows if row.role is role] for role in Role)
    names = dict.fromkeys(map(lease.image_name, subject)) | dict.fromkeys(
        f"class image {n}" for n in of_class
    )
    return ", ".join(names)
