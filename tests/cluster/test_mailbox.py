"""Leases one way, events the other."""

import asyncio

from cluster.mailbox import GIVE_UP_AFTER, Mailbox


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


def test_a_lease_that_kills_its_gang_again_and_again_is_failed_unless_it_makes_steps() -> None:
    async def body() -> None:
        box = Mailbox()
        for name in ("rex", "tom"):
            await box.post(name)
        for _ in range(2 * GIVE_UP_AFTER):  # it dies, but gets further each time
            assert await box.resume() == 0
            await box.report(0, 0, "steps", [{"step": 1}])
        await box.drain()
        assert [await box.resume() for _ in range(GIVE_UP_AFTER)] == [0] * (GIVE_UP_AFTER - 1) + [1]
        failed = await box.drain()
        assert [(e.lease, e.kind) for e in failed] == [(0, "failed")]
        assert {"what", "seen", "do"} <= set(failed[0].payload)

    run(body())
