"""Signals that reach a run, sent to this very process."""

import os
import signal
import sys
from pathlib import Path

import pytest

from cluster.mailbox import Event
from cluster.storage import Storage
from orchestrator.events import EventLog
from orchestrator.signals import Interrupted, Signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_sigusr1_is_noted_and_nothing_else() -> None:
    signals = Signals()
    with signals.heard():
        send(signal.SIGUSR1)
    assert signals.save and not signals.leave


def test_sigterm_ends_what_runs_with_the_exit_code_of_shells_and_is_ours_no_longer_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught, Signals().heard():
        send(signal.SIGTERM)
    assert (caught.value.exit_code, caught.value.state) == (143, "interrupted")
    assert "same command" in caught.value.do
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_waits_where_there_is_something_to_save_but_not_twice() -> None:
    signals = Signals()
    with pytest.raises(Interrupted), signals.heard(), signals.patiently():
        send(signal.SIGTERM)
        assert signals.leave
        send(signal.SIGTERM)


def test_the_answer_of_a_starting_ray_to_sigterm_is_understood() -> None:
    with pytest.raises(Interrupted), Signals().heard():
        sys.exit(signal.SIGTERM)
    with pytest.raises(SystemExit), Signals().heard():
        sys.exit(3)


def test_events_that_cannot_be_written_wait_for_room(storage: Storage) -> None:
    log = EventLog(storage, "runs/events.jsonl")
    Path(storage.full("runs/events.jsonl")).mkdir(parents=True)  # in the way
    assert [row["step"] for row in log.add([Event(0, 0, "step", {"step": 1})])] == [1]
    Path(storage.full("runs/events.jsonl")).rmdir()
    log.add([Event(0, 0, "step", {"step": 2})])
    assert [line.count('"step": ') for line in storage.read("runs/events.jsonl").decode().splitlines()] == [
        1,
        1,
    ]
