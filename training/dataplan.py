"""This file is where it is decided which image, which noise and which timestep a training step uses.

Everything is a function of the run's seed and a global index, computed by a counter-based generator: nothing depends
on the number of workers, on restarts or on what was drawn before.

n rows of a latent table, P pairs per step, g global index of a pair: g = step * P + place in the step. Pair g uses
sample 2g (subject) and sample 2g + 1 (class).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from training.changes import Course, in_force

Array = NDArray[np.float32]

# Pairs from here on are those of the validation: no training comes so far, 10^6 steps of 4096 pairs are 2^32
VALIDATION = 2**40


class Role(IntEnum):
    """What a row teaches: the subject, or that the class stays what it was."""

    SUBJECT = 0
    CLASS = 1


class _Stream(IntEnum):
    """Independent streams of random numbers; the values are part of what a seed means, so they never change."""

    SUBJECT_ORDER = 0
    CLASS_ORDER = 1
    TIMESTEP = 2
    NOISE = 3
    POSTERIOR = 4
    OFFSET = 5
    PERTURBATION = 6
    CAPTION = 7
    TEMPLATE = 8
    MULTIRES = 9
    SIZE = 10


@dataclass(frozen=True)
class PlanRow:
    """One row of a batch before its tensors are made."""

    role: Role
    table_row: int
    """Row of the subject's or the class's latent table."""
    sample_index: int
    """Global index that noise and timestep are drawn from."""
    weight: float
    """Its share of the global loss; 0 for a row that only fills up a rank short of pairs."""
    timestep: int


def _generator(seed: int, stream: _Stream, index: int) -> np.random.Generator:
    """The generator of one index of one stream; the low half of the counter is left to the draws."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, index, 0]))


def enlarged(image: Array, size: tuple[int, ...]) -> Array:
    """A picture [C, h, w] at another size, linear between its pixels' middles and flat beyond the outermost."""
    for axis, side in ((1, size[0]), (2, size[1])):
        have = image.shape[axis]
        at = ((np.arange(side) + 0.5) * have / side - 0.5).clip(0, have - 1)
        low = at.astype(int)
        share = (at - low).astype(np.float32).reshape((-1, 1) if axis == 1 else (-1,))
        first, second = (np.take(image, np.minimum(low + n, have - 1), axis) for n in (0, 1))
        image = first + share * (second - first)
    return image


@lru_cache(maxsize=4)
def _order(seed: int, stream: _Stream, epoch: int, rows: int) -> NDArray[np.int64]:
    """The order of a table's rows in one epoch."""
    return _generator(seed, stream, epoch).permutation(rows)


@lru_cache(maxsize=4)
def _step_of_size(seed: int, sizes: tuple[int, ...], step: int) -> tuple[int, int]:
    """The size of a step's rows, and how many steps before it had that size.

    Of as many steps as there are photos each photo decides one, so that all photos have the same share.
    """
    epoch, number = divmod(step, len(sizes))
    order = [sizes[row] for row in _order(seed, _Stream.SIZE, epoch, len(sizes))]
    size = order[number]
    return size, epoch * sizes.count(size) + order[:number].count(size)


@lru_cache(maxsize=64)
def _rows_of(sizes: tuple[int, ...], size: int) -> list[int]:
    """The rows that have a size."""
    return [row for row, other in enumerate(sizes) if other == size]


@dataclass(frozen=True)
class DataPlan:
    """The plan of a whole run."""

    seed: int
    subject_rows: int
    """Rows of the subject's latent table that are trained, the first ones."""
    class_rows: int
    """Rows of the class's latent table; 0 trains without prior preservation."""
    pairs_per_step: int
    """Pairs in a step, over all ranks together."""
    num_timesteps: int
    prior_weight: float
    """At first, and of the validation, whose loss is comparable between steps."""
    subject_sizes: tuple[int, ...] = ()
    """Of each row of the subject's table the number of its size; empty where all have one. A step is of one size."""
    class_sizes: tuple[int, ...] = ()
    """Of each row of the class's table likewise; every size of the subject is among them."""
    held_out: int = 0
    """Rows of the subject's latent table after those: the validation has them. 0 has it use the trained ones."""
    prior_course: Course[float] = ()
    """What the weight becomes after how many steps, if it does; the first is `prior_weight`, after none."""
    logit_normal: tuple[float, float] | None = None
    """Mean and standard deviation of the logit of a timestep's place in the schedule; `None` has all alike."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The rows of a pair: both roles, or only the subject without prior preservation."""
        preserve = self.class_rows > 0 and self.prior_weight > 0
        return (Role.SUBJECT, Role.CLASS) if preserve else (Role.SUBJECT,)

    def pairs_per_rank(self, world: int) -> int:
        """Pairs that each of `world` ranks computes in a step, fill included; the same on every rank."""
        return -(-self.pairs_per_step // world)

    def rows(self, step: int, rank: int, world: int) -> list[PlanRow]:
        """This rank's rows of a step, pair by pair.

        The weights of all ranks' rows together sum to 1 for the subject and to the step's prior weight for the class.
        A rank short of pairs repeats the step's first pair with weight 0.
        """
        places = range(rank, self.pairs_per_rank(world) * world, world)
        return [row for place in places for row in self._pair(step, place)]

    def _pair(self, step: int, place: int) -> Iterator[PlanRow]:
        real = place < self.pairs_per_step
        pair = step * self.pairs_per_step + (place if real else 0)
        prior_weight = in_force(self.prior_course, step) if self.prior_course else self.prior_weight
        for role in self.roles:
            subject = role is Role.SUBJECT
            count = self.subject_rows if subject else self.class_rows
            stream = _Stream.SUBJECT_ORDER if subject else _Stream.CLASS_ORDER
            share = (1.0 if subject else prior_weight) / self.pairs_per_step
            sample = 2 * pair + role
            if self.subject_sizes:
                row = self._row_of_size(role, step, place if real else 0)
            else:
                row = int(_order(self.seed, stream, pair // count, count)[pair % count])
            yield PlanRow(
                role=role,
                table_row=row,
                sample_index=sample,
                weight=share if real else 0.0,
                timestep=self._timestep(sample),
            )

    def _timestep(self, sample_index: int) -> int:
        """Source of the logit-normal density: Stable Diffusion 3 (arXiv 2403.03206) eq. 19."""
        generator = _generator(self.seed, _Stream.TIMESTEP, sample_index)
        if self.logit_normal is None:
            return int(generator.integers(self.num_timesteps))
        mean, std = self.logit_normal
        place = 1 / (1 + math.exp(-(mean + std * generator.standard_normal())))
        return min(int(place * self.num_timesteps), self.num_timesteps - 1)

    def _row_of_size(self, role: Role, step: int, place: int) -> int:
        """The table row of a place of a step: the pairs of the steps of a size go through its rows, round by round."""
        size, before = _step_of_size(self.seed, self.subject_sizes[: self.subject_rows], step)
        pair, subject = before * self.pairs_per_step + place, role is Role.SUBJECT
        stream = _Stream.SUBJECT_ORDER if subject else _Stream.CLASS_ORDER
        rows = _rows_of(self.subject_sizes[: self.subject_rows] if subject else self.class_sizes, size)
        # the times that rows of a size were gone through, told apart from those of other sizes
        turn = pair // len(rows) * len(self.subject_sizes) + size
        return rows[int(_order(self.seed, stream, turn, len(rows))[pair % len(rows)])]

    def validation_rows(self, samples: int, rank: int, world: int) -> list[PlanRow]:
        """This rank's rows of a validation of `samples` pairs, pair by pair: always the same, whatever the step is.

        Images take turns, timesteps are the middles of `samples` equal parts of the schedule. Weights are as in a step,
        and every rank gets as many rows.
        """
        places = range(rank, -(-samples // world) * world, world)
        return [row for place in places for row in self._validation_pair(place, samples)]

    def _validation_pair(self, place: int, samples: int) -> Iterator[PlanRow]:
        real = place < samples
        number = place if real else 0
        for role in self.roles:
            subject = role is Role.SUBJECT
            first = self.subject_rows if subject and self.held_out else 0
            count = (self.held_out or self.subject_rows) if subject else self.class_rows
            share = (1.0 if subject else self.prior_weight) / samples
            row = first + number % count
            if subject:
                photo = row
            elif self.subject_sizes:
                size = self.subject_sizes[photo]
                rows = _rows_of(self.class_sizes, size)
                row = rows[number % len(rows)]
            yield PlanRow(
                role=role,
                table_row=row,
                sample_index=2 * (VALIDATION + number) + role,
                weight=share if real else 0.0,
                timestep=(2 * number + 1) * self.num_timesteps // (2 * samples),
            )

    def noise(self, sample_index: int, shape: tuple[int, ...]) -> Array:
        """The noise that is added to a sample: float32, standard normal."""
        return self._normal(_Stream.NOISE, sample_index, shape)

    def posterior_noise(self, sample_index: int, shape: tuple[int, ...]) -> Array:
        """The noise that picks a sample's latent from the VAE's posterior: float32, standard normal."""
        return self._normal(_Stream.POSTERIOR, sample_index, shape)

    def offset(self, sample_index: int, channels: int) -> Array:
        """What is one number for each channel of a sample's noise: float32 [channels, 1, 1], standard normal."""
        return self._normal(_Stream.OFFSET, sample_index, (channels, 1, 1))

    def perturbation(self, sample_index: int, shape: tuple[int, ...]) -> Array:
        """The noise that a sample is shown and not asked for: float32, standard normal."""
        return self._normal(_Stream.PERTURBATION, sample_index, shape)

    def multires(self, sample_index: int, shape: tuple[int, ...], iterations: int, discount: float) -> Array:
        """A sample's noise [C, h, w] with that of coarser resolutions added, brought to variance 1 again: float32.

        Each resolution is 2 to 4 times as coarse as the one before, by chance, and `discount` times as strong.

        Source:
            wandb.ai/johnowhitaker/multires_noise.
        """
        generator = _generator(self.seed, _Stream.MULTIRES, sample_index)
        noise, sides = self.noise(sample_index, shape), shape[1:]
        for number in range(1, iterations + 1):
            coarser = generator.uniform(2.0, 4.0)
            sides = tuple(max(1, int(side / coarser)) for side in sides)
            coarse = generator.standard_normal((shape[0], *sides), dtype=np.float32)
            noise = noise + np.float32(discount**number) * enlarged(coarse, shape[1:])
            if 1 in sides:
                break
        whole: Array = noise / noise.std()
        return whole

    def drops_caption(self, sample_index: int, rate: float) -> bool:
        """Whether a sample is trained with the empty prompt."""
        return bool(_generator(self.seed, _Stream.CAPTION, sample_index).random() < rate)

    def template(self, sample_index: int, count: int) -> int:
        """Which of `count` prompts a sample is trained with."""
        return int(_generator(self.seed, _Stream.TEMPLATE, sample_index).integers(count))

    def _normal(self, stream: _Stream, sample_index: int, shape: tuple[int, ...]) -> Array:
        return _generator(self.seed, stream, sample_index).standard_normal(shape, dtype=np.float32)
