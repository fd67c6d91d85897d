"""This file is where an engine's thread becomes an `Artist`: something that asyncio can wait for."""

import asyncio
from collections.abc import AsyncIterator, Mapping

from serving.engine import Engine
from serving.protocol import Drawn, Event, ImageOrder


class EngineArtist:
    """An engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def draw(self, order: ImageOrder) -> AsyncIterator[Event]:
        """As `Artist.draw`."""
        loop = asyncio.get_running_loop()
        said: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def say(event: Event | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(said.put_nowait, event)

        ticket = self.engine.submit(order, say)
        try:
            while True:
                event = await said.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Drawn):
                    return
        finally:
            self.engine.cancel(ticket)

    async def stats(self) -> Mapping[str, float]:
        """As `Artist.stats`."""
        return self.engine.stats()
