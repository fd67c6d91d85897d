"""A small fleet, simulated: what the figures of `benchmarks.fleet` rest on."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.fleet import simulate
from benchmarks.simulated_nodes import Clock, Stages
from benchmarks.simulated_works import SimulatedWorks
from orchestrator.campaign_settings import Schedule
from orchestrator.records import RunRow

SUBJECTS, SHARE = 300, 16


def test_nodes_are_lost_and_no_subject_is_and_no_tenant_exceeds_its_share(tmp_path: Path) -> None:
    most: Counter[str] = Counter()

    def look(works: SimulatedWorks, rows: Sequence[RunRow]) -> None:
        training = Counter(row.tenant for row in rows if row.state == "training")
        for tenant, runs in training.items():
            most[tenant] = max(most[tenant], runs)

    stages = Stages(lost_h=0.05, back_s=30, every=20, bad=0.02, failing=0.02)
    schedule = Schedule(bank=8, per_tenant=SHARE)
    found = simulate(tmp_path, SUBJECTS, 4, stages, number=5, schedule=schedule, price=1.0, look=look)

    assert sum(found["ended"].values()) == SUBJECTS and set(found["ended"]) == {"succeeded", "failed"}
    assert found["ended"]["failed"] < 0.1 * SUBJECTS
    assert found["nodes_lost"] > 5 and found["steps_lost"] > 0 and found["retries"] > 0
    assert found["steps"] - found["steps_lost"] >= found["ended"]["succeeded"] * stages.steps
    assert max(most.values()) == SHARE  # it is reached, so it was a limit
    assert 0 < found["worker_hours"] <= found["node_hours"] == found["cost"]


def test_a_day_that_is_over_leaves_the_rest_queued_with_what_was_done_saved(tmp_path: Path) -> None:
    found = simulate(tmp_path, 100, 1, Stages(), hours=0.05, number=3)
    assert found["state"] == "stopped" and found["ended"]["succeeded"] > 0 and found["ended"]["queued"] > 0
    assert found["steps_lost"] == 0 and sum(found["ended"].values()) == 100


def test_a_loss_with_a_notice_costs_no_step(tmp_path: Path) -> None:
    found = simulate(tmp_path, 60, 2, Stages(lost_h=0.05, back_s=30, notice=1.0, failing=0.0), number=2)
    assert found["nodes_lost"] > 0 and found["steps_lost"] == 0


def test_a_bank_of_eight_takes_as_long_as_was_measured_and_a_subject_alone_longer() -> None:
    stages = Stages()
    assert stages.step_s(8) * stages.steps == pytest.approx(8 * stages.subject_s)
    assert stages.step_s(1) * stages.steps == pytest.approx(1.72 * stages.subject_s)


def test_a_clock_does_everything_in_its_order() -> None:
    clock, done = Clock(), list[tuple[str, float]]()
    clock.at(3.0, lambda: done.append(("late", clock.now)))
    clock.at(1.0, lambda: clock.at(2.0, lambda: done.append(("early", clock.now))))
    clock.advance(2.5)
    assert done == [("early", 2.0)] and clock.now == 2.5
