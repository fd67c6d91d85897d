"""This file is where every failure of a run meets what is to become of it."""

import pytest

from orchestrator.recovery import Again, Fail, Failure, History, Kind, SetAside, Size, decide

AS_ASKED, HALF, ALONE, CHECKPOINTING, ACCUMULATING = Size
RECIPE = frozenset({CHECKPOINTING, ACCUMULATING})
REASON = {"what": "it ended", "seen": "this", "do": "that"}


def history(attempts=1, kills=0, smaller=AS_ASKED, width=1, members=1, can=RECIPE):
    return History(attempts, kills, smaller, width, members, most_attempts=3, can=can)


def again(attempts=0, kills=0, smaller=AS_ASKED, width=1):
    return Again(attempts, kills, smaller, width)


@pytest.mark.parametrize(
    ("kind", "so_far", "expected"),
    [
        # a lost node costs nothing, however often
        ("lost_node", history(), again()),
        ("lost_node", history(attempts=3, kills=2, width=8, members=8), again(2, 2, width=8)),
        # out of memory: a bank halves once, its runs go alone, then the recipe needs less; each size once
        ("memory", history(width=8, members=8), again(smaller=HALF, width=4)),
        ("memory", history(width=4, members=4, smaller=HALF), again(smaller=ALONE)),
        ("memory", history(width=2, members=2), again(smaller=ALONE)),
        ("memory", history(width=8, members=1), again(smaller=HALF, width=4)),
        ("memory", history(smaller=ALONE), again(smaller=CHECKPOINTING)),
        ("memory", history(), again(smaller=CHECKPOINTING)),
        ("memory", history(smaller=CHECKPOINTING), again(smaller=ACCUMULATING)),
        ("memory", history(can=frozenset({ACCUMULATING})), again(smaller=ACCUMULATING)),
        ("memory", history(attempts=3), again(2, smaller=CHECKPOINTING)),
        ("memory", history(smaller=ACCUMULATING), Fail),
        ("memory", history(can=frozenset()), Fail),
        # what would end the same again
        ("bad_input", history(), Fail),
        ("diverged", history(), Fail),
        # ours: as often as the schedule says
        ("storage", history(), again(1)),
        ("system", history(attempts=2, width=8, members=8), again(2, width=8)),
        ("system", history(attempts=3), Fail),
        ("storage", history(attempts=4), Fail),
        # what kills its gang
        ("gang_killed", history(), again(kills=1)),
        ("gang_killed", history(attempts=3, kills=1), again(2, kills=2)),
        ("gang_killed", history(kills=2), SetAside),
        ("gang_killed", history(kills=2, width=8, members=5), again(smaller=ALONE)),
        ("gang_killed", history(kills=2, width=8, members=1), SetAside),
        ("gang_killed", history(kills=2, width=2, members=2, smaller=CHECKPOINTING), again(smaller=CHECKPOINTING)),
        # what people want
        ("cancelled", history(), Fail),
        ("budget", history(width=8, members=8), again(width=8)),
    ],
)  # fmt: skip
def test_what_becomes_of_a_run(kind, so_far, expected):
    decided = decide(Failure(Kind(kind), REASON), so_far)

    if isinstance(expected, type):
        assert isinstance(decided, expected)
        assert decided.reason["kind"] == kind
        assert decided.reason["what"] == "it ended"
    else:
        assert decided == expected


def test_every_kind_of_failure_has_a_policy():
    for kind in Kind:
        assert decide(Failure(kind, REASON), history())


def test_only_a_cancelled_run_ends_as_cancelled():
    states = {kind: decide(Failure(kind, REASON), history(attempts=3, can=frozenset())) for kind in Kind}
    ended = {kind: fate.state for kind, fate in states.items() if isinstance(fate, Fail)}

    assert {kind.value for kind, state in ended.items() if state == "cancelled"} == {"cancelled"}
    assert len(ended) > 4


def test_the_reason_says_how_often_it_was_tried():
    assert decide(Failure(Kind.SYSTEM, REASON), history(attempts=3)).reason["seen"] == "this; tried 3 times"
    killed = decide(Failure(Kind.GANG_KILLED, {"what": "a worker died"}), history(kills=2))
    assert killed.reason == {
        "what": "a worker died",
        "seen": "it ended its gang 3 times",
        "kind": "gang_killed",
    }


def test_running_out_of_memory_ends_after_a_few_tries():
    so_far, tries = history(width=8, members=8), 0
    while isinstance(fate := decide(Failure(Kind.MEMORY, REASON), so_far), Again):
        so_far = history(1, 0, fate.smaller, fate.width, fate.width)
        tries += 1

    assert tries == 4
