"""This file is where predictions are drawn: those that this process accepted, and those whose process is gone."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.errors import RayboothError, SystemFailure
from cluster.objects import StorageError
from serving.answers import ApiError, answer_of
from serving.booth import Booth
from serving.outbound import Outbound
from serving.prediction_answers import shown
from serving.predictions import Prediction, PredictionStore
from serving.presence import Presence
from serving.protocol import PRISTINE, Draining, Drawn, QueueFull, Stepped
from serving.webhooks import WebhookSecrets, signed

LOG = logging.getLogger("raybooth.serving")
TRIES = 3  # of a prediction whose replica fails
PAUSE_S = 1.0
DELIVERED = range(200, 300)
GONE = 410  # the receiver wants no more of it


@dataclass
class _Open:
    """A prediction that this process has."""

    prediction: Prediction
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is cancelled."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    steps: dict[int, int] = field(default_factory=dict)
    """Done, by image."""
    task: asyncio.Task[None] | None = None


class PredictionWork:
    """The predictions of this process.

    Args:
        booth: Draws and counts.
        secrets: Sign webhooks.
        outbound: Sends them.
    """

    def __init__(self, booth: Booth, secrets: WebhookSecrets, outbound: Outbound) -> None:
        settings = booth.settings.predictions
        self._booth, self._secrets, self._outbound, self._settings = booth, secrets, outbound, settings
        self._presence = Presence(booth.storage, settings.heartbeat_s)
        keep_s = settings.deadline_s + booth.settings.retention.outputs_s
        self.store = PredictionStore(booth.storage, self._presence, booth.clock, keep_s)
        self._room = asyncio.Semaphore(settings.at_once)
        self._open: dict[str, _Open] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> None:
        """Say that this process lives, and look for what is left of others."""
        await asyncio.to_thread(self._presence.beat)
        self._loops = [
            asyncio.create_task(_again(self._settings.heartbeat_s, self._beat)),
            asyncio.create_task(_again(self._settings.sweep_s, self._sweep)),
        ]

    async def close(self) -> None:
        """Leave what is not done to the next process."""
        self._closing = True
        for loop in self._loops:
            loop.cancel()
        tasks = [each.task for each in self._open.values() if each.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._loops, return_exceptions=True)
        with suppress(StorageError):  # then others find out
            for each in self._open.values():
                await asyncio.to_thread(self.store.release, each.prediction)
            await asyncio.to_thread(self._presence.leave)

    # -- what routes ask -----------------------------------------------------------------------------------

    def check_room(self, tenant: str) -> None:
        """Refuse another prediction of a tenant that has too many.

        Raises:
            ApiError: 429.
            Draining: This process goes away.
        """
        if self._closing:
            raise Draining
        waiting = sum(each.prediction.tenant == tenant for each in self._open.values())
        if waiting >= self._settings.waiting:
            said = f"{waiting} predictions have not ended. Wait for some of them, or cancel them"
            raise ApiError(429, said, "too_many_predictions", retry_after_s=PAUSE_S)

    def begin(self, prediction: Prediction) -> None:
        """Draw a prediction that is on record as this process's."""
        if prediction.id not in self._open:
            entry = self._open[prediction.id] = _Open(prediction)
            entry.task = asyncio.create_task(self._live(entry))
            self._booth.metrics.predictions_open.set(len(self._open))

    async def find(self, tenant: str, identity: str) -> Prediction:
        """A tenant's prediction.

        Raises:
            ApiError: 404.
        """
        mine = self._open.get(identity)
        if mine and mine.prediction.tenant == tenant:
            return mine.prediction
        found = await asyncio.to_thread(self.store.find, tenant, identity)
        if found is None:
            raise ApiError(
                404, f"there is no prediction {identity[:64]!r}. It may have expired", "no_prediction"
            )
        return found

    def steps(self, identity: str) -> int | None:
        """Steps that are done of a prediction that this process draws."""
        mine = self._open.get(identity)
        return sum(mine.steps.values()) if mine and mine.steps else None

    async def wait(self, identity: str, seconds: float) -> None:
        """Return when a prediction of this process has ended, or the time is over."""
        mine = self._open.get(identity)
        if mine:
            with suppress(TimeoutError):
                await asyncio.wait_for(mine.ended.wait(), seconds)

    async def cancel(self, prediction: Prediction) -> None:
        """Give a prediction up: at once where it is this process's, else the one that has it finds out."""
        if prediction.ended:
            return
        await asyncio.to_thread(self.store.wish_cancelled, prediction)
        mine = self._open.get(prediction.id)
        if mine:
            mine.stop.set()
            await mine.ended.wait()

    async def remove(self, prediction: Prediction) -> None:
        """Remove a prediction with its images.

        Raises:
            ApiError: 409: another process draws it.
        """
        mine = self._open.get(prediction.id)
        if mine and mine.task:
            mine.stop.set()
            await mine.ended.wait()
            mine.task.cancel()
            await asyncio.gather(mine.task, return_exceptions=True)
            self._close(mine)
        elif not prediction.ended:
            raise ApiError(409, "the prediction is being drawn. Cancel it first", "not_ended")
        await asyncio.to_thread(self.store.remove, prediction)

    # -- its life ------------------------------------------------------------------------------------------

    async def _live(self, entry: _Open) -> None:
        """Draw it, tell of it, and be done with it. What fails here is left for the next sweep, of any process."""
        try:
            if not entry.prediction.ended:
                await self._draw(entry)
            entry.ended.set()
            await self._tell(entry)
            await asyncio.to_thread(self.store.settle, entry.prediction)
        except StorageError:
            LOG.exception("prediction %s is left for later", entry.prediction.id)
            with suppress(StorageError):
                await asyncio.to_thread(self.store.release, entry.prediction)
        finally:
            if not self._closing:
                self._close(entry)

    def _close(self, entry: _Open) -> None:
        entry.ended.set()
        self._open.pop(entry.prediction.id, None)
        self._booth.metrics.predictions_open.set(len(self._open))

    async def _draw(self, entry: _Open) -> None:
        if await asyncio.to_thread(self.store.is_cancelled, entry.prediction):
            entry.stop.set()
        left = entry.prediction.created + self._settings.deadline_s - self._booth.clock()
        drawing = asyncio.create_task(self._images(entry))
        stopping = asyncio.create_task(entry.stop.wait())
        try:
            await asyncio.wait({drawing, stopping}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            ended = drawing.done() and not drawing.cancelled()
            error = drawing.exception() if ended else None
        finally:
            for task in (drawing, stopping):
                task.cancel()
            await asyncio.gather(drawing, stopping, return_exceptions=True)
        if isinstance(error, StorageError):
            raise error
        if entry.stop.is_set():
            await asyncio.to_thread(self.store.drop_images, entry.prediction)
            status, error = "canceled", None
        elif ended:
            status = "failed" if error else "succeeded"
        else:
            said = f"not ready within {self._settings.deadline_s:g} s. Ask again, or for fewer steps"
            status, error = "failed", ApiError(504, said)
        if error:
            LOG.warning("prediction %s failed: %s", entry.prediction.id, error)
        about = answer_of(error).as_json()["error"] if error else None
        await self._becomes(entry, status=status, completed=self._booth.clock(), error=about)
        self._booth.metrics.predictions.labels(status).inc()

    async def _images(self, entry: _Open) -> None:
        """Draw what is missing of its images, each once, until all are there."""
        async with self._room:
            if entry.prediction.status == "starting":
                await self._becomes(entry, status="processing", started=self._booth.clock())
            telling = asyncio.create_task(self._tell_start(entry.prediction))
            failures = 0
            while missing := await asyncio.to_thread(self.store.missing, entry.prediction):
                try:
                    await self._paint(entry, missing)
                except (QueueFull, Draining) as error:
                    await asyncio.sleep(getattr(error, "retry_after_s", PAUSE_S))
                except SystemFailure:
                    failures += 1
                    if failures == TRIES:
                        raise
                    await asyncio.sleep(PAUSE_S * failures)
            await telling
        if not await asyncio.to_thread(self._is_there, entry.prediction):
            await asyncio.to_thread(self.store.drop_images, entry.prediction)
            raise ApiError(404, "the model was deleted meanwhile", "model_not_found", "model")

    async def _paint(self, entry: _Open, missing: list[int]) -> None:
        orders = entry.prediction.orders()
        async with self._booth.painting([orders[number] for number in missing], None) as painting:
            async for place, event in painting.events():
                number = missing[place]
                if isinstance(event, Stepped):
                    entry.steps[number] = event.step
                elif isinstance(event, Drawn):
                    await asyncio.to_thread(self.store.keep, entry.prediction, number, event.png)

    def _is_there(self, prediction: Prediction) -> bool:
        """Whether the model was not deleted while it was drawn with."""
        if prediction.subject == PRISTINE:
            return True
        record = self._booth.catalog.registered(prediction.subject)
        return record is not None and prediction.version in record["versions"]

    async def _becomes(self, entry: _Open, **fields: Any) -> None:
        entry.prediction = replace(entry.prediction, **fields)
        await asyncio.to_thread(self.store.write, entry.prediction)

    # -- webhooks ------------------------------------------------------------------------------------------

    async def _tell_start(self, prediction: Prediction) -> None:
        if prediction.webhook and "start" in prediction.webhook_events:
            await self._sent(prediction, "start")

    async def _tell(self, entry: _Open) -> None:
        """Tell the webhook of the end, again and again until it has heard it, or has no more chances."""
        wanted = entry.prediction.webhook and "completed" in entry.prediction.webhook_events
        pauses = self._booth.settings.outward.retries_s
        while wanted and entry.prediction.webhook_state is None:
            status = await self._sent(entry.prediction, "completed")
            tries = entry.prediction.webhook_tries + 1
            state = "delivered" if status in DELIVERED else None
            if state is None and (status == GONE or tries > len(pauses)):
                state = "given up"
            self._booth.metrics.webhooks.labels(state or "failed").inc()
            await self._becomes(entry, webhook_tries=tries, webhook_state=state)
            if state is None:
                await asyncio.sleep(pauses[tries - 1])

    async def _sent(self, prediction: Prediction, event: str) -> int | None:
        """The status that a webhook was answered with; `None` when it could not be reached."""
        body = json.dumps(shown(prediction, self._booth.outputs).model_dump(mode="json")).encode()
        try:
            secrets = await asyncio.to_thread(self._secrets.of, prediction.tenant)
            headers = signed(secrets, f"{prediction.id}-{event}", self._booth.clock(), body)
            return await self._outbound.post(str(prediction.webhook), headers, body)
        except RayboothError as error:
            LOG.warning("the webhook of prediction %s failed: %s", prediction.id, error)
            return None

    # -- other processes -----------------------------------------------------------------------------------

    async def _beat(self) -> None:
        await asyncio.to_thread(self._presence.beat)
        for entry in list(self._open.values()):
            if not entry.ended.is_set() and await asyncio.to_thread(
                self.store.is_cancelled, entry.prediction
            ):
                entry.stop.set()

    async def _sweep(self) -> None:
        for prediction in await asyncio.to_thread(self.store.mine, self._open.keys()):
            self.begin(prediction)  # where whoever asked was cut off before it was begun
        taken = await asyncio.to_thread(self.store.take_over)
        for prediction in taken:
            LOG.info("prediction %s is taken over", prediction.id)
            self._booth.metrics.taken_over.inc()
            self.begin(prediction)
        await asyncio.to_thread(self.store.sweep)
        await asyncio.to_thread(self._booth.outputs.sweep)
        await asyncio.to_thread(self._booth.idempotency.sweep)


async def _again(pause_s: float, act: Callable[[], Awaitable[None]]) -> None:
    """Do something again and again; what fails once may go well the next time."""
    while True:
        try:
            await act()
        except Exception:
            LOG.exception("%s failed", getattr(act, "__name__", "a loop"))
        await asyncio.sleep(pause_s)
