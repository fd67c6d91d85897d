"""This file is where what a gang says is written down, and where its thread is watched."""

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from cluster.mailbox import Event
from cluster.storage import Storage, StorageError

_OF_A_STEP = ("step", "validation", "sample")


class EventLog:
    """`events.jsonl` of a run: what happened; what belongs to a step once, even when a restart repeats some.

    What cannot be written, because a disk is full, waits for the next event.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage, self.path = storage, path
        self.before: list[dict[str, Any]] = []
        """What was written before this process."""
        self._unwritten = ""
        if storage.exists(path):
            whole, _, torn = storage.read(path).decode(errors="replace").rpartition("\n")
            if torn:  # the driver was killed while it wrote
                storage.write(path, f"{whole}\n".encode() if whole else b"")
            self.before = [json.loads(line) for line in whole.splitlines()]
        self._told = {(said["event"], said["step"]) for said in self.before if said["event"] in _OF_A_STEP}

    def add(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Write events; returns those that were not written before, as they are written."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        lines: list[dict[str, Any]] = []
        for event in events:
            key = (event.kind, event.payload.get("step"))
            if key in self._told:
                continue
            lines.append({"time": now, "event": event.kind, **event.payload})
            if event.kind in _OF_A_STEP:
                self._told.add(key)
        if lines:
            self._unwritten += "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            with suppress(StorageError):
                self.storage.append(self.path, self._unwritten.encode())
                self._unwritten = ""
        return lines


class GangThread(threading.Thread):
    """Runs a gang beside the controller and keeps the error it ended with."""

    def __init__(self, gang: Callable[[], None]) -> None:
        super().__init__(name="gang", daemon=True)
        self.gang = gang
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.gang()
        except BaseException as error:  # whatever it is, the controller tells the user
            self.error = error
