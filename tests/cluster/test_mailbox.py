"""Leases one way, events the other."""

import asyncio
from typing import Any

from cluster.errors import SystemFailure, UserError, failure_of
from cluster.mailbox import CHECKPOINT, GIVE_UP_AFTER, LEAVE, Mailbox, Withdrawn, failure


def run(body: object) -> None:
    asyncio.run(asyncio.wait_for(body, 20))  # type: ignore[arg-type]


def test_a_rank_waits_until_its_lease_is_posted_and_every_rank_gets_it() -> None:
    async def body() -> None:
        box = Mailbox()
        ranks = [asyncio.create_task(box.take(0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(rank.done() for rank in ranks)
        assert await box.post("rex") == 0
        assert await asyncio.gather(*ranks) == ["rex"] * 3

    run(body())


def test_after_stop_what_was_posted_is_still_handed_out_and_then_nothing() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("rex")
        waiting = asyncio.create_task(box.take(1))
        await box.stop()
        assert await box.take(0) == "rex"
        assert await waiting is None

    run(body())


def test_events_come_out_once_in_order_and_steps_one_by_one() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("rex")
        await box.report(0, 0, "started", {"step": 0})
        await box.report(0, 0, "steps", [{"step": 1}, {"step": 2}])
        assert [(e.kind, e.payload["step"]) for e in await box.drain()] == [
            ("started", 0),
            ("step", 1),
            ("step", 2),
        ]
        assert await box.drain() == []
        waiting = asyncio.create_task(box.drain(wait_s=10))
        await asyncio.sleep(0)
        await box.report(0, 0, "published", {})
        assert [e.kind for e in await waiting] == ["published"]
        assert await box.drain(wait_s=0.01) == []

    run(body())


def test_a_gang_that_restarts_takes_the_lease_it_had() -> None:
    async def body() -> None:
        box = Mailbox()
        for name in ("rex", "tom"):
            await box.post(name)
        assert await box.resume() == 0
        await box.report(0, 0, "published", {})
        assert await box.resume() == 1
        await box.report(1, 0, "failed", {"what": "diverged"})
        assert await box.resume() == 2

    run(body())


async def live_and_die(box: Mailbox, steps: int, *last_words: str) -> int:
    """One life of a gang on lease 0 from its last checkpoint, step 0; returns the lease it was given."""
    here = await box.resume()
    if here == 0:
        await box.report(0, 0, "steps", [{"step": step} for step in range(1, steps + 1)])
        for rank, text in enumerate(last_words):
            await box.report(0, rank, "note", {"text": text, "died": True})
    return here


async def failed(box: Mailbox) -> list[tuple[int, Any]]:
    return [(e.lease, e.payload) for e in await box.drain() if e.kind == "failed"]


def test_a_lease_that_gets_further_each_time_is_never_given_up() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("rex")
        assert {await live_and_die(box, steps) for steps in range(1, 3 * GIVE_UP_AFTER)} == {0}
        for steps in range(3 * GIVE_UP_AFTER, 6 * GIVE_UP_AFTER):  # of denoising
            assert await box.resume() == 0
            await box.report(0, 0, "drawn", {"steps": steps})
        assert await failed(box) == []

    run(body())


def test_a_lease_that_dies_at_the_same_step_again_and_again_is_given_up_with_what_it_died_of() -> None:
    async def body() -> None:
        box = Mailbox()
        for name in ("rex", "tom"):
            await box.post(name)
        lives = [await live_and_die(box, 5, "worker 0: OSError: disk full", "worker 1: lost worker 0")]
        while lives[-1] == 0:
            lives.append(await live_and_die(box, 5))  # no worker could tell: the last words stay
        assert lives == [0] * GIVE_UP_AFTER + [1]
        [(lease, payload)] = await failed(box)
        assert lease == 0
        assert "step 5" in payload["seen"] and "OSError: disk full" in payload["seen"]
        assert isinstance(failure_of(payload), SystemFailure)

    run(body())


def test_an_idle_gang_that_dies_costs_the_next_lease_nothing() -> None:
    async def body() -> None:
        box = Mailbox()
        assert [await box.resume() for _ in range(2 * GIVE_UP_AFTER)] == [0] * (2 * GIVE_UP_AFTER)
        await box.post("rex")
        assert await box.resume() == 0
        assert await failed(box) == []

    run(body())


def test_a_failure_arrives_as_the_error_it_was() -> None:
    for error in (UserError("it diverged", "lr 9", "lower it"), SystemFailure("a disk is full")):
        arrived = failure_of(failure(error))
        assert (type(arrived), str(arrived)) == (type(error), str(error))


def test_what_is_asked_reaches_the_gang_that_trains_and_no_other() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("rex")
        assert await box.resume() == 0
        assert not await box.ask(CHECKPOINT)  # nobody trains yet
        await box.report(0, 0, "started", {})
        waiting = asyncio.create_task(box.asked(0))
        await asyncio.sleep(0)
        assert await box.ask(CHECKPOINT) and await waiting == [CHECKPOINT]
        assert await box.ask(LEAVE) and await box.asked(1) == [LEAVE]
        assert await box.resume() == 0  # a new gang
        listening = asyncio.create_task(box.asked(0))
        await asyncio.sleep(0)
        assert not listening.done()
        listening.cancel()

    run(body())


def test_a_run_that_is_left_stays_open_and_costs_it_no_life() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("rex")
        for step in range(2 * GIVE_UP_AFTER):
            assert await box.resume() == 0
            await box.report(0, 0, "started", {})
            assert not await box.quiet(0.01)
            leaving = asyncio.create_task(box.quiet(10))
            await box.report(0, 0, "left", {"step": step})
            assert await leaving
        assert await failed(box) == []

    run(body())


def test_a_mailbox_that_retires_hands_out_not_even_what_is_open() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("rex")
        assert await box.take(await box.resume()) == "rex"
        await box.report(0, 0, "started", {})
        assert await box.retire()
        assert await box.asked(0) == [LEAVE]
        await box.report(0, 0, "left", {"step": 3})
        assert await box.take(await box.resume()) is None
        assert not await box.retire()

    run(body())


def test_a_lease_of_several_runs_is_open_until_each_has_ended() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("bank", [0, 2])
        assert await box.resume() == 0
        await box.report(0, 0, "started", {"step": 0}, 0)
        await box.report(0, 0, "published", {}, 0)
        assert await box.resume() == 0
        await box.report(0, 0, "failed", {}, 2)
        await box.report(0, 0, "published", {}, 2)  # it has ended: nothing more is heard of it
        assert await box.resume() == 1
        said = [(e.kind, e.slot) for e in await box.drain() if e.lease == 0]
        assert said == [("started", 0), ("published", 0), ("failed", 2)]

    run(body())


def test_a_gang_that_gives_up_a_bank_fails_every_run_of_it_that_is_open() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("bank", 3)
        await box.report(0, 0, "published", {}, 1)
        for _ in range(GIVE_UP_AFTER):
            await box.resume()
            await box.report(0, 0, "note", {"text": "worker 0: OSError: no", "died": True})
        assert await box.resume() == 1
        failed = [e for e in await box.drain() if e.kind == "failed"]
        assert [(e.slot, e.payload["kind"]) for e in failed] == [(0, "gang_killed"), (2, "gang_killed")]

    run(body())


def test_progress_of_any_run_of_a_bank_counts_as_progress_of_the_gang() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("bank", 2)
        for step in range(GIVE_UP_AFTER + 2):
            assert await box.resume() == 0
            await box.report(0, 0, "steps", [{"step": step + 1}], step % 2)

    run(body())


def test_a_worker_that_was_out_of_memory_ends_the_lease_at_once_with_that_kind() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("rex")
        await box.resume()
        await box.report(0, 0, "started", {"step": 0})
        told = {"text": "worker 0: OutOfMemoryError: 2 GiB", "died": True, "kind": "memory"}
        await box.report(0, 0, "note", told)
        assert await box.resume() == 1
        [failed] = [e.payload for e in await box.drain() if e.kind == "failed"]
        assert failed["kind"] == "memory" and "2 GiB" in failed["seen"] and "accumulation" in failed["do"]

    run(body())


def test_a_run_that_no_worker_has_taken_is_dropped_at_once_and_its_lease_withdrawn() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("rex")
        await box.drop(0, 0)
        assert [e.kind for e in await box.drain()] == ["dropped"]
        assert isinstance(await box.take(0), Withdrawn)
        assert await box.resume() == 1

    run(body())


def test_a_run_that_trains_is_asked_to_be_dropped_also_by_a_gang_that_restarts() -> None:
    async def body() -> None:
        box = Mailbox()
        await box.post("bank", 2)
        await box.take(0)
        await box.report(0, 0, "started", {"step": 0})
        await box.ask(CHECKPOINT)
        await box.drop(0, 1)
        assert await box.asked(0) == [CHECKPOINT, "drop 0 1"]
        assert await box.resume() == 0
        assert await box.asked(0) == ["drop 0 1"]

    run(body())
