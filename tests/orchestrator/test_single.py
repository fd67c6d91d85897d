"""What becomes of a run whose artifact is published when its samples are drawn."""

import io
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from cluster.errors import SystemFailure
from cluster.mailbox import BAD_INPUT, GANG_KILLED, MEMORY, Event, failure
from orchestrator.events import GangThread
from orchestrator.progress import Lines
from orchestrator.single import SingleRun
from training.lease import Draw

LEASE = 1
DIED = SystemFailure("the workers of this run die again and again", "3 times", "mend that")


class Letters:
    """A mailbox with answers that were written before."""

    def __init__(self, *events: Event) -> None:
        self._events: Iterator[Sequence[Event]] = iter([[event] for event in events])

    def post(self, lease: Any) -> int:
        return LEASE

    def drain(self, wait_s: float) -> Sequence[Event]:
        return next(self._events)


def drawn(*events: Event) -> str:
    """What people read while the samples are drawn; the gang stays."""
    told, stay = io.StringIO(), threading.Event()
    run = object.__new__(SingleRun)
    run.stages = Lines(told)
    gang = GangThread(lambda: stay.wait() and None)
    gang.start()
    try:
        run._draw(Letters(*events), gang, Draw(None, (), 1, ""))  # type: ignore[arg-type]
    finally:
        stay.set()
    return told.getvalue()


@pytest.mark.parametrize("kind", [MEMORY, GANG_KILLED])
def test_workers_that_die_of_drawing_cost_the_run_its_samples_and_nothing_else(kind: str) -> None:
    told = drawn(
        Event(LEASE - 1, 0, "published", {"metrics": {}}),
        Event(LEASE, 0, "drawn", {"steps": 1}),
        Event(LEASE, 0, "note", {"text": "worker 0: OutOfMemoryError", "died": True}),
        Event(LEASE, 0, "failed", failure(DIED, kind)),
    )
    assert "worker 0: OutOfMemoryError" in told and "no samples" in told and "3 times" in told


def test_an_artifact_that_cannot_be_read_fails_the_run() -> None:
    with pytest.raises(SystemFailure, match="die again and again"):
        drawn(Event(LEASE, 0, "failed", failure(DIED, BAD_INPUT)))
