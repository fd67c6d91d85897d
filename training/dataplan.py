"""This file is where it is decided which image, which noise and which timestep a training step uses.

Everything is a function of the run's seed and a global index, computed by a counter-based generator: nothing depends
on the number of workers, on restarts or on what was drawn before.

n rows of a latent table, P pairs per step, g global index of a pair: g = step * P + place in the step. Pair g uses
sample 2g (subject) and sample 2g + 1 (class).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


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


@lru_cache(maxsize=4)
def _order(seed: int, stream: _Stream, epoch: int, rows: int) -> NDArray[np.int64]:
    """The order of a table's rows in one epoch."""
    return _generator(seed, stream, epoch).permutation(rows)


@dataclass(frozen=True)
class DataPlan:
    """The plan of a whole run."""

    seed: int
    subject_rows: int
    """Rows of the subject's latent table."""
    class_rows: int
    """Rows of the class's latent table; 0 trains without prior preservation."""
    pairs_per_step: int
    """Pairs in a step, over all ranks together."""
    num_timesteps: int
    prior_weight: float

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

        The weights of all ranks' rows together sum to 1 for the subject and to the prior weight for the class. A rank
        short of pairs repeats the step's first pair with weight 0.
        """
        places = range(rank, self.pairs_per_rank(world) * world, world)
        return [row for place in places for row in self._pair(step, place)]

    def _pair(self, step: int, place: int) -> Iterator[PlanRow]:
        real = place < self.pairs_per_step
        pair = step * self.pairs_per_step + (place if real else 0)
        for role in self.roles:
            subject = role is Role.SUBJECT
            count = self.subject_rows if subject else self.class_rows
            stream = _Stream.SUBJECT_ORDER if subject else _Stream.CLASS_ORDER
            share = (1.0 if subject else self.prior_weight) / self.pairs_per_step
            sample = 2 * pair + role
            yield PlanRow(
                role=role,
                table_row=int(_order(self.seed, stream, pair // count, count)[pair % count]),
                sample_index=sample,
                weight=share if real else 0.0,
                timestep=int(_generator(self.seed, _Stream.TIMESTEP, sample).integers(self.num_timesteps)),
            )

    def noise(self, sample_index: int, shape: tuple[int, ...]) -> Array:
        """The noise that is added to a sample: float32, standard normal."""
        return self._normal(_Stream.NOISE, sample_index, shape)

    def posterior_noise(self, sample_index: int, shape: tuple[int, ...]) -> Array:
        """The noise that picks a sample's latent from the VAE's posterior: float32, standard normal."""
        return self._normal(_Stream.POSTERIOR, sample_index, shape)

    def _normal(self, stream: _Stream, sample_index: int, shape: tuple[int, ...]) -> Array:
        return _generator(self.seed, stream, sample_index).standard_normal(shape, dtype=np.float32)
