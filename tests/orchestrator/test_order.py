"""This file is where it is tested which runs train together and which go first."""

import random
import time
from collections import Counter, deque

from orchestrator.order import Facts, Group, Queue, groups, prior_order


def facts(run_id, tenant="acme", priority=0, steps=100, bank_key="lora", prior_key="dog", **recorded):
    return Facts(run_id, run_id, tenant, priority, steps, bank_key, prior_key, **recorded)


def group(number, tenant="acme", priority=0, steps=100, runs=1, priors=()):
    return Group(
        number, runs, tuple(range(number, number + runs)), tenant, priority, steps, number, tuple(priors)
    )


def popped(queue):
    found = []
    while taken := queue.pop():
        found.append(taken.number)
    return found


def test_runs_of_one_kind_are_cut_into_banks_and_the_rest_gets_the_narrowest_that_holds_it():
    widths = {
        runs: [(len(g.run_ids), g.width) for g in groups(map(facts, range(runs)), width=8)]
        for runs in (1, 2, 3, 5, 8, 11)
    }

    assert widths == {
        1: [(1, 1)],
        2: [(2, 2)],
        3: [(3, 4)],
        5: [(5, 8)],
        8: [(8, 8)],
        11: [(8, 8), (3, 4)],
    }


def test_a_bank_holds_one_recipe_tenant_and_priority():
    rows = [
        facts(0),
        facts(1, tenant="other"),
        facts(2, priority=1),
        facts(3, bank_key="wide"),
        facts(4, bank_key=None),
        facts(5, bank_key=None),
        facts(6),
    ]

    assert [g.run_ids for g in groups(rows, width=8)] == [(0, 6), (1,), (2,), (3,), (4,), (5,)]


def test_a_bank_is_filled_by_class_then_steps_then_position():
    rows = [
        facts(0, prior_key="owl", steps=100),
        facts(1, prior_key="dog", steps=300),
        facts(2, prior_key="dog", steps=100),
        facts(3, prior_key="dog", steps=100),
    ]

    [one, two] = groups(rows, width=2)

    assert (one.run_ids, one.prior_keys, one.steps, one.position) == ((1, 0), ("dog", "owl"), 300, 0)
    assert (two.run_ids, two.prior_keys, two.steps, two.position) == ((2, 3), ("dog",), 100, 2)


def test_width_one_trains_every_run_alone_in_the_order_of_the_manifest():
    found = groups([facts(i) for i in (2, 0, 1)], width=1)

    assert [(g.number, g.run_ids, g.width) for g in found] == [(0, (0,), 1), (1, (1,), 1), (2, (2,), 1)]


def test_no_bank_is_wider_than_a_tenant_may_have_runs():
    found = groups(map(facts, range(6)), width=8, per_tenant=3)

    assert [g.width for g in found] == [2, 2, 2]


def test_groups_do_not_depend_on_the_order_they_are_asked_in():
    rows = [facts(i, tenant=f"t{i % 3}", priority=i % 2, steps=100 + i % 5) for i in range(50)]
    shuffled = random.Random(0).sample(rows, len(rows))

    assert groups(rows, width=8) == groups(shuffled, width=8)


def test_a_recorded_group_keeps_its_number_and_width_whoever_is_left_of_it():
    rows = [facts(3, group_no=4, width=8), facts(5, group_no=4, width=8), facts(7, group_no=2, width=1)]
    rows += [facts(8), facts(9)]

    found = groups(rows, width=4)

    assert [(g.number, g.run_ids, g.width) for g in found] == [(2, (7,), 1), (4, (3, 5), 8), (5, (8, 9), 2)]


def test_every_run_is_in_exactly_one_group():
    draw = random.Random(1)
    rows = [
        facts(
            i,
            tenant=draw.choice("ab"),
            priority=draw.randrange(2),
            steps=draw.choice((100, 300)),
            bank_key=draw.choice(("x", "y", None)),
            prior_key=draw.choice(("dog", None)),
        )
        for i in range(300)
    ]

    found = groups(rows, width=8)

    assert Counter(run for g in found for run in g.run_ids) == Counter(range(300))
    assert all(len(g.run_ids) <= g.width for g in found)
    assert [g.number for g in found] == list(range(len(found)))


def test_a_higher_priority_goes_first_then_the_shorter_then_the_earlier():
    queue = Queue()
    for waiting in (group(1), group(2, steps=50), group(3, priority=1, steps=900), group(4)):
        queue.push(waiting)

    assert len(queue) == 4 and 3 in queue
    assert popped(queue) == [3, 2, 1, 4]
    assert len(queue) == 0


def test_tenants_take_turns_within_a_priority():
    queue = Queue()
    for number in range(6):
        queue.push(group(number, tenant="large", steps=10))
    queue.push(group(6, tenant="small", steps=500))
    queue.push(group(7, tenant="small", steps=500))
    queue.push(group(8, tenant="large", priority=1))

    assert popped(queue) == [8, 6, 0, 7, 1, 2, 3, 4, 5]


def test_a_tenant_trains_as_many_runs_as_it_may_at_a_time():
    queue = Queue(per_tenant=2)
    waiting = [group(number) for number in range(4)]
    for one in waiting:
        queue.push(one)
    queue.push(group(9, tenant="other"))

    assert popped(queue) == [0, 9, 1]
    queue.ended(waiting[1])
    assert popped(queue) == [2]
    queue.ended(waiting[0])
    queue.ended(waiting[2])
    assert popped(queue) == [3]


def test_a_bank_that_must_wait_is_not_overtaken_by_its_tenants_smaller_groups():
    queue = Queue(per_tenant=4)
    small, bank, later = group(0, steps=10), group(1, runs=4, steps=50), group(5, priority=-1, steps=1)
    for one in (small, bank, later):
        queue.push(one)

    assert popped(queue) == [0]
    queue.ended(small)
    assert popped(queue) == [1]
    queue.ended(bank)
    assert popped(queue) == [5]


def test_a_bank_wider_than_the_limit_still_trains_alone():
    queue = Queue(per_tenant=2)
    bank = group(0, runs=8)
    queue.push(bank)
    queue.push(group(8))

    assert popped(queue) == [0]
    queue.ended(bank)
    assert popped(queue) == [8]


def test_a_group_that_is_pushed_late_takes_its_place():
    queue = Queue()
    queue.push(group(1, steps=100))
    queue.push(group(0, steps=10))
    queue.push(group(2, priority=5))

    assert popped(queue) == [2, 0, 1]


def test_ten_thousand_groups_of_many_tenants_are_ordered_in_a_second():
    draw = random.Random(0)
    waiting = [
        group(number, tenant=f"t{draw.randrange(500)}", priority=draw.randrange(3), steps=draw.randrange(9))
        for number in range(10_000)
    ]
    began = time.process_time()
    queue, training, taken = Queue(per_tenant=3), deque(), []
    for one in waiting:
        queue.push(one)
    while queue or training:
        while one := queue.pop():
            training.append(one)
        taken.append(training.popleft())
        queue.ended(taken[-1])
    seconds = time.process_time() - began

    assert len({one.number for one in taken}) == 10_000
    assert seconds < 1


def test_the_prior_set_of_the_group_whose_turn_comes_first_is_drawn_first():
    waiting = [
        group(0, steps=300, priors=["dog"]),
        group(1, steps=100, priors=["cat", "owl"]),
        group(2, steps=10),
        group(3, steps=10, priors=["there"]),
        group(4, priority=1, steps=900, priors=["fox"]),
    ]

    assert prior_order(waiting, {"dog", "cat", "owl", "fox", "nobody's"}) == ["fox", "cat", "owl", "dog"]
