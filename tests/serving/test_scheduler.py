"""Whatever arrives and leaves, every row is drawn, in bounded time, and no forward pass is too wide."""

import random
from collections import Counter
from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.scheduler import TURN, Entry, Scheduler

WIDTH = 8


def put(scheduler: Scheduler, entry: Entry, kind: Hashable) -> None:
    scheduler.add(entry)
    scheduler.ready(entry.id, kind)


def drain(scheduler: Scheduler, steps: dict[str, int], limit: int = 100_000) -> list[list[str]]:
    """Step until nothing is left; returns who took part in each step."""
    history = []
    left = dict(steps)
    while len(scheduler):
        history.append(rows := scheduler.step())
        for row in rows:
            left[row] -= 1
            if not left[row]:
                scheduler.remove(row)
        assert len(history) < limit
    return history


def test_a_row_joins_as_soon_as_there_is_room() -> None:
    scheduler = Scheduler(4)
    for name, cost in (("a", 2), ("b", 2), ("c", 2)):
        put(scheduler, Entry(name, cost), "lora")
    assert scheduler.step() == ["a", "b"]
    scheduler.remove("a")
    assert scheduler.step() == ["b", "c"]


def test_first_come_first_served_also_when_a_narrow_row_would_fit() -> None:
    scheduler = Scheduler(3)
    for name, cost in (("a", 2), ("wide", 2), ("narrow", 1)):
        put(scheduler, Entry(name, cost), "lora")
    assert scheduler.step() == ["a"]
    scheduler.remove("a")
    assert scheduler.step() == ["wide", "narrow"]


def test_kinds_take_turns() -> None:
    scheduler = Scheduler(WIDTH, turn=3)
    for kind in "xyz":
        put(scheduler, Entry(kind, 2), kind)
    history = drain(scheduler, dict.fromkeys("xyz", 6))
    assert [row for [row] in history] == list("xxxyyyzzzxxxyyyzzz")


def test_a_kind_that_is_alone_keeps_its_turn() -> None:
    scheduler = Scheduler(WIDTH, turn=2)
    put(scheduler, Entry("a", 2), "x")
    assert [scheduler.step() for _ in range(5)] == [["a"]] * 5
    put(scheduler, Entry("b", 2), "y")
    assert scheduler.step() == ["b"]


def test_what_cannot_be_scheduled_is_refused() -> None:
    scheduler = Scheduler(2)
    put(scheduler, Entry("a", 2), "x")
    for entry in (Entry("a", 2), Entry("b", 3), Entry("c", 0)):
        with pytest.raises(ValueError, match="cannot be scheduled"):
            scheduler.add(entry)


def test_a_row_that_is_not_ready_holds_nobody_up_and_counts_as_waiting() -> None:
    scheduler = Scheduler(WIDTH)
    scheduler.add(Entry("slow", 2, deadline=5.0))
    assert scheduler.idle and scheduler.step() == [] and scheduler.waiting == 1
    put(scheduler, Entry("a", 2), "x")
    assert scheduler.step() == ["a"] and scheduler.next_deadline == 5.0
    assert scheduler.expired(5.0) == ["slow"]
    scheduler.ready("slow", "x")
    assert scheduler.step() == ["a", "slow"]
    scheduler.add(Entry("gone", 1))
    scheduler.remove("gone")
    assert len(scheduler) == 2


def test_a_deadline_is_told_until_the_row_is_removed() -> None:
    scheduler = Scheduler(WIDTH)
    put(scheduler, Entry("a", 2, deadline=10.0), "x")
    put(scheduler, Entry("b", 2), "x")
    assert scheduler.expired(9.9) == []
    assert scheduler.expired(10.0) == ["a"]
    scheduler.remove("a")
    assert scheduler.expired(99.0) == [] and len(scheduler) == 1


arrivals = st.lists(
    st.tuples(
        st.integers(1, 2),  # cost
        st.integers(0, 5),  # kind
        st.integers(1, 30),  # steps
        st.integers(0, 40),  # arrives before this step
        st.one_of(st.none(), st.integers(0, 60)),  # its client is gone at this step
    ),
    max_size=40,
)


@given(arrivals)
def test_no_row_is_lost_or_starved_and_no_forward_is_too_wide(
    rows: list[tuple[int, int, int, int, int | None]],
) -> None:
    scheduler = Scheduler(WIDTH)
    left = {str(i): steps for i, (_, _, steps, _, _) in enumerate(rows)}
    gone: set[str] = set()
    taken: Counter[str] = Counter()
    for now in range(10_000):
        for i, (cost, kind, _, arrives, leaves) in enumerate(rows):
            if arrives == now:
                put(scheduler, Entry(str(i), cost), kind)
            if leaves is not None and leaves == now > arrives:
                gone.add(str(i))
                scheduler.remove(str(i))
        batch = scheduler.step()
        assert len(set(batch)) == len(batch)
        assert sum(rows[int(row)][0] for row in batch) <= WIDTH
        assert len({rows[int(row)][1] for row in batch}) <= 1  # one kind
        assert batch or not len(scheduler)  # never idle while somebody waits
        for row in batch:
            assert row not in gone
            taken[row] += 1
            if taken[row] == left[row]:
                scheduler.remove(row)
        if now > 60 and not len(scheduler):
            break
    for row, steps in left.items():
        assert taken[row] == steps or (row in gone and taken[row] < steps)
    assert not scheduler._of and not scheduler._deadlines and scheduler.idle  # nothing is kept for ever


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_a_row_waits_no_longer_than_those_before_it_and_the_turns_of_others(seed: int, kinds: int) -> None:
    """Under endless load: every kind is fed as fast as it is served."""
    rng, scheduler, number = random.Random(seed), Scheduler(WIDTH), 0
    steps: dict[str, int] = {}
    joined: dict[str, int] = {}
    added: dict[str, tuple[int, int]] = {}  # when, and how many of its kind were before it

    def feed(kind: int, now: int) -> None:
        nonlocal number
        before = sum(1 for row in steps if row.startswith(f"{kind}-"))
        name = f"{kind}-{number}"
        put(scheduler, Entry(name, rng.choice((1, 2))), kind)
        steps[name], added[name] = rng.randint(1, 10), (now, before)
        number += 1

    for kind in range(kinds):
        for _ in range(10):
            feed(kind, 0)
    for now in range(600):
        for row in scheduler.step():
            joined.setdefault(row, now)
            steps[row] -= 1
            if not steps[row]:
                del steps[row]
                scheduler.remove(row)
                feed(int(row.partition("-")[0]), now)
    for row, (when, before) in added.items():
        longest = (before + 1) * 10 * kinds + (kinds + 1) * TURN
        assert joined.get(row, 600) - when <= longest
