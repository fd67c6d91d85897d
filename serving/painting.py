"""This file is where several images are drawn at once for one client, and given up together when it leaves."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from starlette.requests import Request

from cluster.errors import SystemFailure, UserError
from serving.metrics import Metrics
from serving.protocol import PRISTINE, Artist, DeadlinePassed, Draining, Drawn, Event, ImageOrder, Refused

LATE_S = 1.0  # that a replica may be late with its own word on the deadline, which knows the step
TRIES = 5  # of an order whose replica goes away
PAUSE_S = 0.2  # between them, doubled each time
_T = TypeVar("_T")


class ClientGone(Exception):
    """Nobody is there to take the answer."""


class Painting:
    """The images of one request on their way. Used with `async with`: leaving it gives up what is not drawn.

    Args:
        artist: Draws.
        orders: What.
        deadline_s: Seconds from now; `None` waits for ever.
        metrics: Counts.
    """

    def __init__(
        self, artist: Artist, orders: Sequence[ImageOrder], deadline_s: float | None, metrics: Metrics
    ) -> None:
        self._artist, self._orders, self._deadline_s = artist, orders, deadline_s
        self._metrics = metrics
        self._heard: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Painting":
        self.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def begin(self) -> None:
        """Ask for all of the images."""
        self._tasks = [asyncio.create_task(self._follow(i, order)) for i, order in enumerate(self._orders)]

    async def close(self) -> None:
        """Give up what is not drawn yet; its rows leave within a step."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What happens, with the image's number; ends with the last `Drawn`.

        Raises:
            RayboothError: As `Artist.draw`; `DeadlinePassed` too when the artist does not say so itself.
        """
        loop, left = asyncio.get_running_loop(), len(self._orders)
        began = loop.time()
        until = None if self._deadline_s is None else began + self._deadline_s + LATE_S
        while left:
            try:
                async with asyncio.timeout_at(until):
                    number, said = await self._heard.get()
            except TimeoutError:
                raise DeadlinePassed(loop.time() - began, 0, self._orders[0].request.steps) from None
            if isinstance(said, BaseException):
                raise said
            left -= isinstance(said, Drawn)
            yield number, said

    async def all(self) -> list[Drawn]:
        """The images, once all are there; raises as `events`."""
        found: dict[int, Drawn] = {}
        async for number, event in self.events():
            if isinstance(event, Drawn):
                found[number] = event
        return [found[number] for number in sorted(found)]

    async def _follow(self, number: int, order: ImageOrder) -> None:
        outcome, began = "abandoned", time.perf_counter()
        try:
            for attempt in range(TRIES):
                try:
                    await self._hear(number, order)
                    outcome = "drawn"
                    kind = PRISTINE if order.subject == PRISTINE else "subject"
                    self._metrics.generate_seconds.labels(kind).observe(time.perf_counter() - began)
                    return
                except Draining:
                    if attempt == TRIES - 1:
                        raise
                    await asyncio.sleep(PAUSE_S * 2**attempt)
        except Exception as error:
            outcome = "refused" if isinstance(error, Refused | UserError) else "failed"
            self._heard.put_nowait((number, error))
        finally:
            self._metrics.images.labels(outcome).inc()

    async def _hear(self, number: int, order: ImageOrder) -> None:
        said = self._artist.draw(order)
        try:
            async for event in said:
                self._heard.put_nowait((number, event))
                if isinstance(event, Drawn):
                    return
        finally:
            await _close(said)
        raise SystemFailure("a replica ended without the image", f"order {order.id}", "ask again")


async def _close(said: AsyncIterator[Event]) -> None:
    """Close an iterator that can be closed, as a generator can."""
    close: Any = getattr(said, "aclose", None)
    if close is not None:
        await close()


async def while_there(request: Request, work: Awaitable[_T]) -> _T:
    """The result of `work`, which is cancelled as soon as the client leaves. The body must have been read.

    Raises:
        ClientGone: It has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        with suppress(BaseException):
            await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
