"""What a run said, written down once."""

import json

import pytest

from cluster.mailbox import Event
from cluster.storage import Storage
from orchestrator.events import EventLog

LOG = "runs/rex/v1/events.jsonl"


def step(number: int) -> Event:
    return Event(0, 0, "step", {"step": number, "loss_subject": 0.5})


def test_what_belongs_to_a_step_is_there_once_whatever_is_said_again(storage: Storage) -> None:
    validation = Event(0, 0, "validation", {"step": 2, "loss": 0.1})
    checkpoint = Event(0, 0, "checkpoint", {"step": 2, "why": "schedule", "seconds": 0.1})
    log = EventLog(storage, LOG)
    assert log.before == []
    assert [said["event"] for said in log.add([step(1), step(2), validation, checkpoint])] == [
        "step",
        "step",
        "validation",
        "checkpoint",
    ]
    assert log.add([step(2), step(3)])[0]["step"] == 3
    again = EventLog(storage, LOG)  # the driver died and its gang goes on from step 2, and tells what it has
    assert [said["event"] for said in again.before] == ["step", "step", "validation", "checkpoint", "step"]
    new = again.add([step(1), step(2), step(3), validation, checkpoint, step(4)])
    assert [(said["event"], said["step"]) for said in new] == [("checkpoint", 2), ("step", 4)]
    lines = [json.loads(line) for line in storage.read(LOG).splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4]


def test_in_an_object_store_a_log_is_written_now_and_then_and_whole_in_the_end(bucket: str) -> None:
    remote = Storage(f"{bucket}/root")

    def written() -> list[int]:
        return [json.loads(line)["step"] for line in remote.read(LOG).splitlines()]

    log = EventLog(remote, LOG, every_s=60)
    log.add([step(1)])
    assert written() == [1]
    assert [said["step"] for said in log.add([step(2)])] == [2]  # said, and written a minute later
    log.add([step(3)])
    assert written() == [1]
    log.flush()
    assert written() == [1, 2, 3]
    again = EventLog(remote, LOG, every_s=0)
    assert [said["step"] for said in again.before] == [1, 2, 3]
    again.add([step(3), step(4)])
    again.add([])
    assert written() == [1, 2, 3, 4]


def test_what_could_not_be_written_is_written_later(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Storage(f"{bucket}/root")
    log = EventLog(remote, LOG, every_s=0)
    with monkeypatch.context() as patch:
        patch.setattr("cluster.remote.S3_ATTEMPTS", 1)
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")
        log.storage = Storage(remote.uri)
        log.add([step(1)])
    log.storage = remote
    log.add([step(2)])
    log.flush()
    assert len(remote.read(LOG).splitlines()) == 2
