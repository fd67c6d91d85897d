"""This file is where a step's rows become tensors: the plan says which, the latent tables hold them.

B rows, C latent channels, h w latent size, L token ids of a prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import SystemFailure, UserError
from training.buckets import Rows
from training.changes import prior_course
from training.conditioning import whole_frame
from training.dataplan import DataPlan, PlanRow, Role
from training.lease import LatentTable, Lease, latent_table
from training.noise import NoiseProcess, noise_process
from training.objective import PairBatch
from training.objective_settings import Objective
from training.pipeline import BaseInfo

PLAIN = Objective()


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a rank, built from the latent tables by the plan."""

    plan: DataPlan
    tables: Sequence[LatentTable | None]
    """Of the subject and of the class."""
    token_ids: torch.Tensor
    """int64 [K, L], the lease's `prompts`."""
    scaling_factor: float
    rank: int
    world: int
    per_step: int
    """Micro-batches of a step."""
    device: torch.device
    objective: Objective = PLAIN
    captions: Sequence[int] = ()
    """Of each row of the subject's table, the number of its own prompt in `token_ids`; empty where all share one."""
    templates: int = 0
    """How many further prompts the subject has, the first of them after the class's."""
    masks: Rows | None = None
    """[N, h, w], of the rows of the subject's table, sizes as theirs."""
    sizes: Sequence[NDArray[np.float32]] | None = None
    """float32 [n, 6] of the rows of each table, of a base that is told sizes."""
    shift_factor: float = 0.0

    @classmethod
    def of(cls, lease: Lease, base: BaseInfo, device: torch.device, rank: int, world: int) -> "Batches":
        """The batches of a lease: its latents are fetched here, once.

        Raises:
            UserError: A worker has fewer pairs than micro-batches.
            SystemFailure: The lease has no latents of its subject.
        """
        run = lease.recipe
        subject, of_class = latent_table(lease.subject_latents), latent_table(lease.class_latents)
        if subject is None:
            raise SystemFailure(f"the lease of {lease.name} has no latents")
        held_out = run.data.holdout * run.data.images_per_photo
        sizes = _sizes(lease, base, subject, of_class) if base.kind.sized else None
        if run.prior.target == "base" and run.prior.weight > 0:
            # the class's rows are the subject's, with another prompt
            of_class = LatentTable(*(part[: len(subject) - held_out] for part in (subject.mean, subject.std)))
        numbers = _size_numbers(subject, of_class)
        process = noise_process(base.scheduler)
        plan = DataPlan(
            seed=run.train.seed,
            subject_rows=len(subject) - held_out,
            class_rows=len(of_class) if of_class else 0,
            pairs_per_step=run.train.pairs_per_step,
            num_timesteps=process.num_timesteps,
            prior_weight=run.prior.weight,
            subject_sizes=numbers[0],
            class_sizes=numbers[1],
            held_out=held_out,
            prior_course=prior_course(run.train, run.prior.weight) if run.train.changes else (),
            logit_normal=_density(run.train.objective, process),
        )
        pairs = plan.pairs_per_rank(world)
        if run.train.accumulation > pairs:
            raise UserError(
                f"a worker cannot split its pairs into train.accumulation = {run.train.accumulation} micro-batches",
                f"it has {pairs}: train.pairs_per_step = {run.train.pairs_per_step} over {world} workers",
                f"set train.accumulation to {pairs} or less, or raise train.pairs_per_step",
            )
        return cls(
            plan,
            (subject, of_class),
            torch.tensor(lease.prompts),
            base.scaling_factor,
            rank,
            world,
            run.train.accumulation,
            device,
            run.train.objective,
            [
                len(Role) + row // run.data.images_per_photo
                for row in range(len(subject) if run.train.captions == "files" else 0)
            ],
            len(run.train.templates),
            lease.masks,
            sizes,
            base.shift_factor,
        )

    def of_step(self, step: int) -> Iterator[PairBatch]:
        """This rank's micro-batches of a step, about equally large, none empty."""
        rows = self.plan.rows(step, self.rank, self.world)
        each, pairs = len(self.plan.roles), self.plan.pairs_per_rank(self.world)
        edges = [each * (pairs * number // self.per_step) for number in range(self.per_step + 1)]
        for start, end in pairwise(edges):
            yield self._batch(rows[start:end])

    def of_validation(self, samples: int) -> Iterator[PairBatch]:
        """This rank's batches of a validation of `samples` pairs, none larger than a micro-batch of a step."""
        rows = self.plan.validation_rows(samples, self.rank, self.world)
        each = len(self.plan.roles)
        if not self.plan.subject_sizes:  # else one pair may have another size than the next
            each *= max(1, self.plan.pairs_per_rank(self.world) // self.per_step)
        for start in range(0, len(rows), each):
            yield self._batch(rows[start : start + each], plain=True)

    def _batch(self, rows: Sequence[PlanRow], plain: bool = False) -> PairBatch:
        """The tensors of rows; `plain` ones have noise alone added and their own prompt."""
        plan, wanted, shape = self.plan, PLAIN if plain else self.objective, self._shape(rows[0])
        role = torch.tensor([int(row.role) for row in rows])
        noise = np.stack([self._noise(row.sample_index, shape, wanted) for row in rows])
        if wanted.offset_noise:
            offsets = np.stack([plan.offset(row.sample_index, shape[0]) for row in rows])
            noise = noise + np.float32(wanted.offset_noise) * offsets
        shown = None
        if wanted.input_perturbation:
            more = np.stack([plan.perturbation(row.sample_index, shape) for row in rows])
            shown = torch.from_numpy(noise + np.float32(wanted.input_perturbation) * more)
        prompt = torch.tensor([self._prompt(row, plain) for row in rows])
        return PairBatch(
            latents=torch.from_numpy(np.stack([self._latent(row) for row in rows])),
            noise=torch.from_numpy(noise),
            timesteps=torch.tensor([row.timestep for row in rows]),
            token_ids=self.token_ids[prompt],
            role=role,
            weight=torch.tensor([row.weight for row in rows]),
            sample_index=torch.tensor([row.sample_index for row in rows]),
            shown_noise=shown,
            mask=self._mask(rows),
            sizes=self._sizes(rows),
        ).to(self.device)

    def _noise(self, sample_index: int, shape: tuple[int, ...], wanted: Objective) -> NDArray[np.float32]:
        """A sample's noise, float32 [C, h, w], of one resolution or of several."""
        iterations = wanted.multires_noise_iterations
        if not iterations:
            return self.plan.noise(sample_index, shape)
        return self.plan.multires(sample_index, shape, iterations, wanted.multires_noise_discount)

    def _prompt(self, row: PlanRow, plain: bool) -> int:
        """The number of a row's prompt in `token_ids`."""
        dropout = self.objective.caption_dropout
        if dropout and not plain and self.plan.drops_caption(row.sample_index, dropout):
            return len(self.token_ids) - 1
        if row.role is Role.SUBJECT and self.captions:
            return self.captions[row.table_row]
        if row.role is Role.SUBJECT and self.templates and not plain:
            choice = self.plan.template(row.sample_index, 1 + self.templates)
            return len(Role) + choice - 1 if choice else int(Role.SUBJECT)
        return int(row.role)

    def _mask(self, rows: Sequence[PlanRow]) -> torch.Tensor | None:
        """Where rows show what is learnt, float32 [B, 1, h, w]: those of the class everywhere."""
        if self.masks is None:
            return None
        whole = np.ones(self._shape(rows[0])[1:], np.float32)
        found = [self.masks[row.table_row] if row.role is Role.SUBJECT else whole for row in rows]
        return torch.from_numpy(np.stack(found))[:, None]

    def _sizes(self, rows: Sequence[PlanRow]) -> torch.Tensor | None:
        """The sizes of rows, float32 [B, 6]."""
        if self.sizes is None:
            return None
        return torch.from_numpy(np.stack([self.sizes[row.role][row.table_row] for row in rows]))

    def _shape(self, row: PlanRow) -> tuple[int, ...]:
        """(C, h, w) of a row, and of all that are in a batch with it."""
        table = self.tables[row.role]
        assert table is not None
        return table.mean[row.table_row].shape

    def _latent(self, row: PlanRow) -> Any:
        """A sample of a row's posterior, scaled, float32 [C, h, w]."""
        table = self.tables[row.role]
        assert table is not None  # the plan has class rows only when there is a class table
        mean, std = table.mean[row.table_row], table.std[row.table_row]
        drawn = mean + std * self.plan.posterior_noise(row.sample_index, mean.shape)
        if self.shift_factor:
            drawn = drawn - np.float32(self.shift_factor)
        return drawn * np.float32(self.scaling_factor)


def _density(objective: Objective, process: NoiseProcess) -> tuple[float, float] | None:
    """`DataPlan.logit_normal` of an objective."""
    wanted = process.density if objective.timesteps == "auto" else objective.timesteps
    return (objective.logit_mean, objective.logit_std) if wanted == "logit_normal" else None


def _sizes(
    lease: Lease, base: BaseInfo, subject: LatentTable, of_class: LatentTable | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The sizes of the subject's and the class's rows, float32 [n, 6] each.

    Class images are all there, at the sizes that they were drawn at; without them, the class's rows are the subject's.
    """
    own = _whole_frames(subject, base) if lease.sizes is None else lease.sizes
    return own, own if of_class is None else _whole_frames(of_class, base)


def _whole_frames(table: LatentTable, base: BaseInfo) -> NDArray[np.float32]:
    frames = [whole_frame(*(side * base.vae_factor for side in mean.shape[1:])) for mean in table.mean]
    return np.asarray(frames, np.float32)


def _size_numbers(
    subject: LatentTable, of_class: LatentTable | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of the sizes of the rows of both tables; none where all have one.

    Raises:
        SystemFailure: The subject has a size that the class has not.
    """
    shapes = [[row.shape for row in table.mean] if table else [] for table in (subject, of_class)]
    known = sorted({shape for rows in shapes for shape in rows})
    if len(known) == 1:
        return (), ()
    lacking = set(shapes[0]) - set(shapes[1])
    if of_class and lacking:
        raise SystemFailure("the class's images lack a size of the subject's", f"latents of {min(lacking)}")
    ours, theirs = (tuple(known.index(shape) for shape in rows) for rows in shapes)
    return ours, theirs
