"""This file is where a replica draws: one thread owns the device and takes a step of the batch, again and again.

What is slow and not a step happens elsewhere: subjects are read by the cache's thread, PNGs are made by another.
Everybody else talks to the thread through its inbox.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from cluster.objects import failure_about
from cluster.storage import Storage
from serving.protocol import (
    PRISTINE,
    DeadlinePassed,
    Draining,
    Drawn,
    Event,
    ImageOrder,
    Joined,
    QueueFull,
    Stepped,
)
from serving.scheduler import Entry, Scheduler
from serving.subjects import NOBODY, Key, Subject, Wardrobe
from training.pipeline import BaseInfo
from training.png import Finish, encode_png
from training.studio import Row, Studio

Say = Callable[[Event | Exception], None]
"""Takes what there is to say of one image; called by the engine's threads, so it must not block."""
SMOOTHING = 0.1  # of the time of a step
UNDRAWN = "the image could not be drawn"


@dataclass(frozen=True)
class EngineSettings:
    """What an engine may hold."""

    max_waiting: int | None = None
    """Images that may wait beside those that are drawn; `None` is any number."""
    cache_bytes: int = 2 * 1024**3
    """Memory for subjects."""
    exact: bool = True
    """As `Studio`'s."""


@dataclass(eq=False)
class _Job:
    """One image on its way."""

    ticket: str
    order: ImageOrder
    say: Say
    began: float
    subject: Subject | None = None
    row: Row | None = None
    joined: float | None = None


class Engine:
    """Draws images of one base and its subjects, many at a time.

    Args:
        base: Resident from the start.
        storage: Root that holds the artifacts; `None` draws the base alone.
        device: `cpu`, `cuda`, or `auto`.
        width: Rows of a forward pass; `None` takes the device's.
        settings: What it may hold.
        finish: Makes the PNGs.
    """

    def __init__(
        self,
        base: BaseInfo,
        storage: Storage | None,
        device: str = "auto",
        width: int | None = None,
        settings: EngineSettings = EngineSettings(),
        finish: Finish = encode_png,
    ) -> None:
        self.base, self.settings = base, settings
        self._finish = finish
        self._studio = Studio(base, device, width, settings.exact)
        self._scheduler = Scheduler(self._studio.width)
        self._wardrobe = Wardrobe(storage, settings.cache_bytes, self._studio.read)
        self._cache = self._wardrobe.cache
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[str, _Job] = {}  # of the thread
        self._held = self._running = 0  # jobs that have not ended, and those in the batch, for those who ask
        self._lock = threading.Lock()
        self._desk = ThreadPoolExecutor(1, thread_name_prefix="png")
        self._step_s = 0.0
        self._counts = dict.fromkeys(("images", "steps", "forward_rows", "failed", "cancelled", "expired"), 0)
        self._draining = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- for everybody -------------------------------------------------------------------------------------

    def submit(self, order: ImageOrder, say: Say) -> str:
        """Have an image drawn.

        Args:
            order: What is wanted; asked twice, it is drawn twice.
            say: Told `Joined`, each `Stepped` that is wanted, and `Drawn` or an error in the end.

        Returns:
            A ticket, for `cancel`.

        Raises:
            QueueFull: As many wait as may.
            Draining: The engine takes nothing any more.
        """
        job = _Job(uuid4().hex, order, say, time.monotonic())
        with self._lock:
            if self._draining:
                raise Draining
            room = self.settings.max_waiting
            if room is not None and self._held >= room + self._studio.width // order.request.rows:
                ahead_s = self._step_s * self._rows_ahead() / self._studio.width
                raise QueueFull(self._held - self._running, max(1.0, ahead_s))
            self._held += 1
            self._inbox.put(lambda: self._admit(job))
        return job.ticket

    def cancel(self, ticket: str) -> None:
        """Give an image up; its row leaves before the next step. One that has ended is none."""
        self._inbox.put(lambda: self._give_up(ticket))

    def stats(self) -> dict[str, float]:
        """Rows running, images waiting, subjects and bytes in memory, and what was done so far."""
        kept = self._cache.stats()
        return {
            "running": self._running,
            "waiting": max(self._held - self._running, 0),
            "step_seconds": self._step_s,
            "subjects": kept.entries,
            "cache_bytes": kept.bytes,
            "cache_hits": kept.hits,
            "cache_misses": kept.misses,
            "cache_evictions": kept.evictions,
            **self._counts,
        }

    def resident(self) -> list[Key]:
        """Subjects and versions in memory."""
        return self._cache.resident()

    @property
    def healthy(self) -> bool:
        """Whether the thread that draws is alive."""
        return self._thread.is_alive()

    def drain(self) -> None:
        """Take nothing new; what was taken is drawn to its end."""
        with self._lock:
            self._draining = True

    def close(self) -> None:
        """End at once; images that are under way end with `Draining`."""
        self.drain()
        self._closed.set()
        self._inbox.put(lambda: None)
        self._thread.join()
        self._wardrobe.close()
        self._desk.shutdown(wait=True)

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self._hear()
                self._expire()
                tickets = self._scheduler.step()
                self._running = self._scheduler.running
                if tickets:
                    self._step([self._jobs[ticket] for ticket in tickets])
        finally:  # also when something here is wrong: nobody waits for a thread that is gone
            self.drain()
            with suppress(queue.Empty):  # those that were taken, and not yet let in
                while True:
                    self._inbox.get_nowait()()
            for job in list(self._jobs.values()):
                self._end(job, Draining())

    def _hear(self) -> None:
        """Do what the inbox says; wait for it while there is nothing to draw."""
        idle = self._scheduler.idle
        if idle:
            self._studio.rest()
        deadline = self._scheduler.next_deadline
        wait = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        try:
            while True:
                self._inbox.get(block=idle, timeout=wait)()
                idle = False
        except queue.Empty:
            pass

    def _expire(self) -> None:
        """End what nobody wants any more."""
        now = time.monotonic()
        for ticket in self._scheduler.expired(now):
            job = self._jobs[ticket]
            self._counts["expired"] += 1
            done = job.row.step if job.row else 0
            self._end(job, DeadlinePassed(now - job.began, done, job.order.request.steps))

    def _step(self, jobs: list[_Job]) -> None:
        """Take the rows of these jobs one step further."""
        began = time.monotonic()
        rows = [job.row for job in jobs if job.row]
        for job in jobs:
            if job.joined is None:
                job.joined = began
                job.say(Joined(began - job.began))
        try:
            self._studio.step(rows)
        except Exception as error:
            for job in jobs:
                self._fail(job, error)
            return
        took = time.monotonic() - began
        self._step_s += (took - self._step_s) * (SMOOTHING if self._step_s else 1.0)
        self._counts["steps"] += len(rows)
        self._counts["forward_rows"] += sum(row.cost for row in rows)
        for job, row in zip(jobs, rows, strict=True):
            try:
                self._report(job, row)
            except Exception as error:
                self._fail(job, error)

    def _report(self, job: _Job, row: Row) -> None:
        """Say that a step is done, and hand the image on when it was the last."""
        every, step, steps = job.order.preview_every, row.step, len(row.table)
        if every and step % every == 0 and not row.done:
            pixels = self._studio.pixels(row.x0)
            self._desk.submit(lambda: job.say(Stepped(step, steps, encode_png(pixels, None))))
        elif job.order.progress:
            # by the desk as well, so that steps are told in their order
            self._desk.submit(job.say, Stepped(step, steps))
        if row.done:
            pixels = self._studio.pixels(row.x)
            self._leave(job)
            self._desk.submit(self._deliver, job, pixels)

    def _admit(self, job: _Job) -> None:
        """Take a job in; its subject is read first, if it is not in memory."""
        order = job.order
        self._jobs[job.ticket] = job
        deadline = None if order.deadline_s is None else job.began + order.deadline_s
        self._scheduler.add(Entry(job.ticket, order.request.rows, deadline))
        if order.subject == PRISTINE:
            self._dressed(job, NOBODY)
        else:
            self._cache.pin(
                (order.subject, order.version),
                lambda found: self._inbox.put(lambda: self._dressed(job, found)),
            )

    def _dressed(self, job: _Job, found: Subject | Exception) -> None:
        """Let a job into the schedule, now that its subject is there."""
        if isinstance(found, Exception):
            if job.ticket in self._jobs:
                self._fail(job, found)
            return
        job.subject = found
        if job.ticket not in self._jobs:  # it was given up meanwhile
            self._undress(job)
            return
        asked = job.order.request
        try:
            request = replace(asked, prompt=found.words(asked.prompt))
            job.row = self._studio.row(request, found.outfit)
        except Exception as error:
            self._fail(job, error)
            return
        kind = (id(found.outfit.weights) if found.outfit.weights else None, job.row.x.shape)
        self._scheduler.ready(job.ticket, kind)

    def _give_up(self, ticket: str) -> None:
        job = self._jobs.get(ticket)
        if job:
            self._counts["cancelled"] += 1
            self._leave(job)

    def _fail(self, job: _Job, error: Exception) -> None:
        self._counts["failed"] += 1
        self._end(job, failure_about(UNDRAWN, error))

    def _end(self, job: _Job, error: Exception) -> None:
        self._leave(job)
        self._desk.submit(job.say, error)

    def _leave(self, job: _Job) -> None:
        """Let a job out of everything it is in."""
        del self._jobs[job.ticket]
        self._scheduler.remove(job.ticket)
        self._running = self._scheduler.running
        self._undress(job)
        with self._lock:
            self._held -= 1

    def _undress(self, job: _Job) -> None:
        if job.subject and job.subject is not NOBODY:
            self._cache.unpin((job.order.subject, job.order.version), job.subject)

    def _rows_ahead(self) -> int:
        """Forward rows that those who are here still want, about."""
        jobs = list(self._jobs.values())
        return sum(
            (len(job.row.table) - job.row.step if job.row else job.order.request.steps)
            * job.order.request.rows
            for job in jobs
        )

    # -- other threads -------------------------------------------------------------------------------------

    def _deliver(self, job: _Job, pixels: NDArray[np.uint8]) -> None:
        assert job.subject and job.row
        subject = job.subject
        facts = job.row.request.parameters(subject.label, self.base.revision, subject.artifact)
        try:
            png = self._finish(pixels, facts)
        except Exception as error:
            self._counts["failed"] += 1
            job.say(failure_about(UNDRAWN, error))
            return
        self._counts["images"] += 1
        job.say(Drawn(png, {**facts, "seconds": time.monotonic() - job.began}))
