"""A campaign's controller on a real ledger, with works that do nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks.idle_works import IdleWorks
from cluster.mailbox import BAD_INPUT, GANG_KILLED, MEMORY, SYSTEM
from orchestrator.campaign_settings import Budget, Schedule
from orchestrator.controller import Controller
from orchestrator.facts import Failed
from orchestrator.ledger import Ledger
from orchestrator.records import NewRun, RunRow
from orchestrator.roster import Outline

NAME = "night"


def enroll(ledger: Ledger, names: Sequence[str], **fields: Any) -> dict[str, int]:
    """Put runs on record; returns their ids by name."""
    given = {"class_noun": "dog", "tenant": "a", "priority": 0, "steps": 10, "spec": {"x": 1}, **fields}
    ledger.enroll(NAME, "/root", {}, [NewRun(name, **given) for name in names])
    return {row.name: row.id for row in ledger.runs(NAME)}


def run(
    ledger: Ledger,
    works: IdleWorks,
    schedule: dict[str, Any] | None = None,
    budget: dict[str, Any] | None = None,
    look: Callable[[Controller], None] = lambda controller: None,
) -> tuple[str, dict[str, RunRow]]:
    """Run the campaign; returns its state and its runs by name."""
    with ledger.claim(NAME) as claim:
        controller = Controller(
            ledger,
            claim,
            ledger.campaign(NAME),
            Schedule(**(schedule or {})),
            Budget(**(budget or {})),
            works,
            lambda rows: look(controller),
            lambda text: None,
        )
        state = controller.run()
    return state, {row.name: row for row in ledger.runs(NAME)}


def banked(run: int) -> Outline:
    return Outline("cpu", "key", None)


def test_every_run_is_trained_once_and_put_on_record(ledger: Ledger) -> None:
    ids = enroll(ledger, ["ada", "bob", "cat"])
    works = IdleWorks(gangs=2)
    state, rows = run(ledger, works)
    assert state == ledger.campaign(NAME).state == "succeeded"
    assert sorted(works.leases) == [(ids["ada"],), (ids["bob"],), (ids["cat"],)]
    assert {(row.state, row.version, row.attempts, row.step) for row in rows.values()} == {
        ("succeeded", "v1", 1, 10)
    }
    assert [m.state for m in ledger.history(ids["ada"])] == [
        "queued",
        "preparing",
        "training",
        "publishing",
        "succeeded",
    ]


def test_a_campaign_run_again_trains_nothing_twice(ledger: Ledger) -> None:
    enroll(ledger, ["ada", "bob"])
    run(ledger, IdleWorks())
    works = IdleWorks()
    assert run(ledger, works)[0] == "succeeded" and works.leases == []


def test_a_bad_subject_fails_alone_and_the_record_is_written_before_the_lease(ledger: Ledger) -> None:
    ids = enroll(ledger, ["ada", "bad"])
    seen: list[str] = []

    class Watching(IdleWorks):
        def train(self, kind: object, slots: Sequence[int | None]) -> str:
            seen.extend(row.state for row in ledger.runs(NAME) if row.id in slots)
            return super().train(kind, slots)

    def fails(run: int, attempt: int) -> Failed | None:
        return (
            Failed(run, BAD_INPUT, "a.jpg is damaged", "truncated", "save it again")
            if run == ids["bad"]
            else None
        )

    works = Watching(fails=fails)
    state, rows = run(ledger, works)
    assert state == "failed" and rows["ada"].state == "succeeded" and set(seen) == {"training"}
    assert rows["bad"].state == "failed" and rows["bad"].attempts == 1
    assert rows["bad"].reason is not None and rows["bad"].reason["what"] == "a.jpg is damaged"
    assert works.ended == {ids["bad"]: "failed"}


@pytest.mark.parametrize(
    ("kind", "fail_attempts", "state", "attempts"),
    [
        (SYSTEM, 2, "succeeded", 3),
        (SYSTEM, 9, "failed", 3),
        (GANG_KILLED, 9, "failed", 1),
        (BAD_INPUT, 9, "failed", 1),
    ],
)
def test_a_failure_is_tried_again_by_its_kind(
    ledger: Ledger, kind: str, fail_attempts: int, state: str, attempts: int
) -> None:
    enroll(ledger, ["ada"])
    works = IdleWorks(
        fails=lambda run, attempt: Failed(run, kind, "no") if attempt <= fail_attempts else None
    )
    _, rows = run(ledger, works)
    assert (rows["ada"].state, rows["ada"].attempts) == (state, attempts)


def test_a_bank_out_of_memory_goes_on_in_halves_and_then_alone(ledger: Ledger) -> None:
    enroll(ledger, [f"s{i}" for i in range(8)])
    works = IdleWorks(outlines=banked)

    def fails(run: int, attempt: int) -> Failed | None:
        return Failed(run, MEMORY, "too much") if len(works.leases[-1]) > 1 else None

    works._fails = fails
    state, rows = run(ledger, works, {"bank": 8})
    assert state == "succeeded" and [len(lease) for lease in works.leases] == [8, 4, 4, *[1] * 8]
    assert {row.width for row in rows.values()} == {1}


def test_a_bank_that_kills_its_gang_is_broken_up_and_only_the_culprit_set_aside(ledger: Ledger) -> None:
    ids = enroll(ledger, [f"s{i}" for i in range(4)])
    works = IdleWorks(outlines=banked)

    def fails(run: int, attempt: int) -> Failed | None:
        return Failed(run, GANG_KILLED, "workers die") if ids["s2"] in works.leases[-1] else None

    works._fails = fails
    _, rows = run(ledger, works, {"bank": 4})
    assert {name: row.state for name, row in rows.items()} == {
        "s0": "succeeded",
        "s1": "succeeded",
        "s2": "failed",
        "s3": "succeeded",
    }
    assert [len(lease) for lease in works.leases] == [4, 1, 1, 1, 1]


def test_how_many_train_together_is_measured_once_and_kept_with_the_runs(ledger: Ledger) -> None:
    enroll(ledger, [f"s{i}" for i in range(6)])
    works = IdleWorks(outlines=banked)
    _, rows = run(ledger, works, {"bank": "auto"})
    assert [len(lease) for lease in works.leases] == [4, 2]
    assert [rows[f"s{i}"].width for i in range(6)] == [4, 4, 4, 4, 2, 2]


def test_a_controller_that_was_killed_is_gone_on_from_with_the_same_groups(ledger: Ledger) -> None:
    enroll(ledger, [f"s{i}" for i in range(6)])

    class Killed(Exception):
        pass

    def dies(controller: Controller) -> None:
        if len(first.leases) == 1:
            raise Killed

    first = IdleWorks(outlines=banked)
    with pytest.raises(Killed):
        run(ledger, first, {"bank": 4}, look=dies)
    groups = {row.name: (row.group_no, row.width) for row in ledger.runs(NAME)}
    second = IdleWorks(outlines=banked)
    state, rows = run(ledger, second, {"bank": 1})  # the setting may differ: what is on record goes before it
    assert state == "succeeded" and {n: (r.group_no, r.width) for n, r in rows.items()} == groups
    assert sorted(map(len, second.leases)) == [2, 4]
    assert {row.attempts for row in rows.values()} == {1}  # the try that the kill ended cost nothing


def test_cancelling_one_subject_leaves_the_others(ledger: Ledger) -> None:
    ids = enroll(ledger, ["ada", "bob", "cat"])
    works = IdleWorks(gangs=1, holds=[ids["ada"]])
    asked: list[str] = []

    def cancel(controller: Controller) -> None:
        if controller.roster[ids["ada"]].state == "training" and not asked:
            asked.extend(ledger.ask(NAME, "cancel", ["ada", "cat"]).names)

    state, rows = run(ledger, works, look=cancel)
    assert state == "cancelled"
    assert {name: row.state for name, row in rows.items()} == {
        "ada": "cancelled",
        "bob": "succeeded",
        "cat": "cancelled",
    }


def test_a_cancelled_run_is_tried_again_when_it_is_queued_anew(ledger: Ledger) -> None:
    ids = enroll(ledger, ["ada"])
    ledger.ask(NAME, "cancel")
    assert ledger.runs(NAME)[0].state == "cancelled"
    assert ledger.requeue(NAME) == ["ada"]
    works = IdleWorks()
    assert run(ledger, works)[0] == "succeeded" and works.leases == [(ids["ada"],)]


def test_a_spent_budget_saves_what_trains_and_the_campaign_can_be_gone_on_with(ledger: Ledger) -> None:
    ids = enroll(ledger, ["ada", "bob"])
    works = IdleWorks(holds=list(ids.values()))
    state, rows = run(ledger, works, budget={"hours": 1e-9})
    assert state == "stopped" and {row.state for row in rows.values()} == {"queued"}
    assert "budget.hours" in str(ledger.campaign(NAME).reason)
    state, rows = run(ledger, IdleWorks())
    assert state == "succeeded" and {row.attempts for row in rows.values()} == {1}


def test_a_tenant_never_trains_more_than_its_share(ledger: Ledger) -> None:
    runs = [NewRun(f"{t}{i}", "dog", t, 0, 10, {"x": 1}) for t in ("a", "b") for i in range(3)]
    ledger.enroll(NAME, "/root", {}, runs)
    ids = {row.id: row.tenant for row in ledger.runs(NAME)}
    works = IdleWorks(gangs=6, holds=list(ids))
    most: list[int] = []

    def look(controller: Controller) -> None:
        training = [run for run in ids if controller.roster[run].state == "training"]
        most.append(max([sum(ids[r] == t for r in training) for t in ("a", "b")]))
        for run in training:
            works.drop(run)
            controller._cancelled.add(run)

    run(ledger, works, {"per_tenant": 1}, look=look)
    assert max(most) == 1 and len(works.leases) == 6


def test_runs_of_two_keys_and_one_gang_are_measured_and_trained_in_turn(ledger: Ledger) -> None:
    ids = enroll(ledger, [f"s{i}" for i in range(4)])
    outlines = {run: Outline("cpu", f"key{number % 2}", None) for number, run in enumerate(ids.values())}
    works = IdleWorks(outlines=outlines.__getitem__)
    assert run(ledger, works, {"bank": "auto"})[0] == "succeeded"
    assert [len(lease) for lease in works.leases] == [2, 2]


def test_what_cannot_be_measured_is_trained_alone(ledger: Ledger) -> None:
    enroll(ledger, [f"s{i}" for i in range(3)])

    class Broken(IdleWorks):
        def measure(self, kind: object, run: int) -> None:
            self.leases.append(())
            self._facts.append(Failed(run, SYSTEM, "no room to measure in"))

    works = Broken(outlines=banked)
    state, _ = run(ledger, works, {"bank": "auto", "attempts": 5})
    assert state == "succeeded" and [len(lease) for lease in works.leases] == [0, 0, 0, 1, 1, 1]


def test_cancelling_the_run_that_is_measured_does_not_keep_the_others(ledger: Ledger) -> None:
    ids = enroll(ledger, [f"s{i}" for i in range(3)])
    asked: list[int] = []

    class Slow(IdleWorks):
        def measure(self, kind: object, run: int) -> None:
            asked.append(run)
            if len(asked) == 1:
                ledger.ask(NAME, "cancel", [next(name for name, of in ids.items() if of == run)])
            else:
                super().measure(kind, run)

    _, rows = run(ledger, Slow(outlines=banked), {"bank": "auto"})
    assert sorted(row.state for row in rows.values()) == ["cancelled", "succeeded", "succeeded"]


def test_a_gang_of_one_kind_is_not_kept_waiting_by_groups_of_another(ledger: Ledger) -> None:
    ids = enroll(ledger, [f"s{i}" for i in range(20)])
    kinds = {run: Outline("a" if number else "b", None, None) for number, run in enumerate(ids.values())}

    class OneKind(IdleWorks):
        """Only gangs of kind b at first."""

        def free(self, kind: object) -> int:
            return super().free(kind) if kind == "b" or self.leases else 0

    works = OneKind(outlines=kinds.__getitem__)
    assert run(ledger, works, {"per_tenant": 1})[0] == "succeeded"
    assert works.leases[0] == (ids["s0"],)


def test_a_campaign_cancelled_by_a_controller_that_was_killed_stays_cancelled(ledger: Ledger) -> None:
    ids = enroll(ledger, ["ada", "bob"])

    class Killed(Exception):
        pass

    class Deaf(IdleWorks):
        def drop(self, run: int) -> None:
            raise Killed

    first = Deaf(gangs=2, holds=list(ids.values()))

    def cancel(controller: Controller) -> None:
        if first.leases and not ledger.wishes(controller._claim):
            ledger.ask(NAME, "cancel")

    with pytest.raises(Killed):
        run(ledger, first, look=cancel)
    works = IdleWorks()
    assert run(ledger, works)[0] == "cancelled" and works.leases == []
