"""This file is where trainings that were asked for are kept going: so many at a time, whichever process asked."""

import asyncio
import logging
from contextlib import suppress

from cluster.errors import RayboothError, UserError
from cluster.objects import StorageError
from serving.booth import Booth
from serving.predictions import made_at
from serving.trainer import ENDED, Trainer
from serving.training_order import TrainingStore

LOG = logging.getLogger("raybooth.serving")
LONGEST_PAUSE_S = 600.0  # between two tries to start a training that does not start


class TrainingWork:
    """The trainings of a storage root, as this process sees to them.

    Args:
        booth: Where they are on record.
        trainer: Trains.
    """

    def __init__(self, booth: Booth, trainer: Trainer) -> None:
        self._booth, self.trainer = booth, trainer
        self.store = TrainingStore(booth.storage, booth.clock, booth.settings.retention.records_s)
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._failures: dict[str, tuple[int, float]] = {}
        """By id: how often it did not start, and until when it is left alone."""

    async def start(self) -> None:
        """See to them from here on."""
        self._loop = asyncio.create_task(self._see_to_them())

    async def close(self) -> None:
        """Leave them alone; what runs goes on."""
        if self._loop:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    def wake(self) -> None:
        """Look at once."""
        self._wake.set()

    async def _see_to_them(self) -> None:
        while True:
            self._wake.clear()
            try:
                await asyncio.to_thread(self._advance)
                await asyncio.to_thread(self.store.sweep)
            except Exception:
                LOG.exception("trainings are not seen to")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._booth.settings.predictions.sweep_s)

    def _advance(self) -> None:
        """Clean up after those that have ended, and start as many as may run."""
        busy = UserError("another process sees to the trainings")
        try:
            with self._booth.storage.lock_or_refuse("locks/trainings", busy):
                running, waiting = 0, []
                for identity in self.store.unended():
                    state = self.trainer.state(identity)
                    if state is None or state.status in ENDED:
                        self._end(identity, known=state is not None)
                    elif state.held:
                        running += 1
                    else:
                        waiting.append(identity)
                for identity in waiting:
                    if running < self._booth.settings.trainings.at_once:
                        running += self._started(identity)
        except UserError as error:
            if error is not busy:
                raise

    def _end(self, identity: str, known: bool) -> None:
        """Nothing more comes of a training. One that never came to be on record may be about to."""
        if known or self._booth.clock() - made_at(identity) > LONGEST_PAUSE_S:
            self.store.settle(identity)
            self._failures.pop(identity, None)

    def _started(self, identity: str) -> bool:
        failures, until = self._failures.get(identity, (0, 0.0))
        if self._booth.clock() < until:
            return False
        try:
            self.trainer.run(identity)
        except (RayboothError, StorageError) as error:
            LOG.warning("training %s does not start: %s", identity, error)
            pause = min(2.0 ** (failures + 2), LONGEST_PAUSE_S)
            self._failures[identity] = (failures + 1, self._booth.clock() + pause)
            return False
        return True
