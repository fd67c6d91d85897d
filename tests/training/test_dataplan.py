"""Which image, noise and timestep a step uses."""

from collections import Counter

import numpy as np
import pytest

from training.dataplan import DataPlan, Role


def plan(**changes: object) -> DataPlan:
    values = {"seed": 3, "subject_rows": 5, "class_rows": 7, "pairs_per_step": 4, "num_timesteps": 1000}
    return DataPlan(**{"prior_weight": 0.5, **values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_the_rows_of_a_step_do_not_depend_on_the_world_size(world: int) -> None:
    alone = sorted(plan().rows(11, 0, 1), key=lambda row: row.sample_index)
    together = [row for rank in range(world) for row in plan().rows(11, rank, world) if row.weight > 0]
    assert sorted(together, key=lambda row: row.sample_index) == alone


@pytest.mark.parametrize("world", [1, 3, 8])
def test_every_rank_gets_as_many_rows_and_the_weights_add_up_to_the_loss(world: int) -> None:
    ranks = [plan().rows(2, rank, world) for rank in range(world)]
    assert {len(rows) for rows in ranks} == {2 * plan().pairs_per_rank(world)}
    total = {role: sum(r.weight for rows in ranks for r in rows if r.role == role) for role in Role}
    assert total == pytest.approx({Role.SUBJECT: 1.0, Role.CLASS: 0.5})


def test_an_epoch_uses_every_image_once_and_in_another_order_than_the_one_before() -> None:
    rows = [row for step in range(35) for row in plan().rows(step, 0, 1)]  # 140 pairs, 28 and 20 epochs
    assert set(Counter(r.table_row for r in rows if r.role is Role.SUBJECT).values()) == {28}
    assert set(Counter(r.table_row for r in rows if r.role is Role.CLASS).values()) == {20}
    subjects = [r.table_row for r in rows if r.role is Role.SUBJECT]
    assert sorted(subjects[:5]) == sorted(subjects[5:10]) == list(range(5))
    assert len({tuple(subjects[i : i + 5]) for i in range(0, 140, 5)}) > 10


def test_a_validation_is_always_the_same_and_of_photos_that_are_held_out() -> None:
    held = plan(subject_rows=3, held_out=2)
    alone = held.validation_rows(5, 0, 1)
    assert [row.timestep for row in alone] == [t for t in (100, 300, 500, 700, 900) for _ in Role]
    assert [row.table_row for row in alone if row.role is Role.SUBJECT] == [3, 4, 3, 4, 3]
    assert [row.table_row for row in alone if row.role is Role.CLASS] == [0, 1, 2, 3, 4]
    two = [held.validation_rows(5, rank, 2) for rank in range(2)]
    assert len(two[0]) == len(two[1])
    together = sorted((row for rows in two for row in rows if row.weight), key=lambda row: row.sample_index)
    assert together == alone
    trained = {
        row.table_row for step in range(20) for row in held.rows(step, 0, 1) if row.role is Role.SUBJECT
    }
    assert trained == {0, 1, 2}
    everything = plan().validation_rows(5, 0, 1)
    assert [row.table_row for row in everything if row.role is Role.SUBJECT] == [0, 1, 2, 3, 4]
    assert not np.array_equal(plan().noise(everything[0].sample_index, (8,)), plan().noise(0, (8,)))


def test_without_a_class_or_a_prior_weight_there_are_only_subject_rows() -> None:
    for alone in (plan(class_rows=0), plan(prior_weight=0.0)):
        assert [r.role for r in alone.rows(0, 0, 1)] == [Role.SUBJECT] * 4


def test_noise_and_timesteps_are_of_their_sample_and_their_seed_alone() -> None:
    noise = plan().noise(6, (4, 8, 8))
    assert noise.dtype == np.float32
    assert np.array_equal(noise, plan(pairs_per_step=1).noise(6, (4, 8, 8)))
    others = [
        plan().noise(7, (4, 8, 8)),
        plan(seed=4).noise(6, (4, 8, 8)),
        plan().posterior_noise(6, (4, 8, 8)),
    ]
    assert all(abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.3 for other in others)


def test_timesteps_cover_the_whole_schedule_evenly() -> None:
    steps = [row.timestep for step in range(500) for row in plan().rows(step, 0, 1)]
    assert min(steps) >= 0 and max(steps) <= 999
    assert all(300 < count < 500 for count in np.histogram(steps, bins=10, range=(0, 1000))[0])


def test_what_a_seed_means_is_frozen() -> None:
    first = plan().rows(0, 0, 1)[:2]
    assert [(r.table_row, r.sample_index, r.timestep) for r in first] == FROZEN_ROWS
    assert np.allclose(plan().noise(0, (3,)), FROZEN_NOISE, atol=1e-6)


FROZEN_ROWS = [(4, 0, 750), (6, 1, 900)]
FROZEN_NOISE = [-0.095884, 1.454739, 0.690184]
