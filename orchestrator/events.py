"""This file is where what a gang says is written down, and where its thread is watched."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from cluster.mailbox import Event
from cluster.objects import StorageError
from cluster.storage import Storage

EVERY_S = 3.0  # between two writes of a log in an object store
SHARE = 10  # and as many times as long as one takes: a long log must not keep the controller busy
_OF_A_STEP = ("step", "validation", "sample", "score")


class EventLog:
    """`events.jsonl` of a run: what happened; what belongs to a step once, even when a restart repeats some.

    What cannot be written, because a disk is full, waits for the next event. In an object store, where a log is written
    anew each time, events wait until some came together or `flush` is called; those that a kill takes are told again
    by the gang.

    Args:
        storage: The root.
        path: Of the log.
        every_s: Seconds between two writes to an object store at least.
    """

    def __init__(self, storage: Storage, path: str, every_s: float = EVERY_S) -> None:
        self.storage, self.path = storage, path
        self.before: list[dict[str, Any]] = []
        """What was written before this process."""
        self._unwritten = ""
        self._every_s, self._due = every_s, 0.0
        self._remote = b""  # what the object in the store holds
        if storage.exists(path):
            text = storage.read(path)
            whole, _, torn = text.decode(errors="replace").rpartition("\n")
            if torn:  # the driver was killed while it wrote
                text = f"{whole}\n".encode() if whole else b""
                storage.write(path, text)
            self.before = [json.loads(line) for line in whole.splitlines()]
            self._remote = b"" if storage.is_local else text
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
        self._unwritten += "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if self.storage.is_local or time.monotonic() >= self._due:
            self.flush()
        return lines

    def flush(self) -> None:
        """Write what was not written yet: at the end, or before others read it."""
        if not self._unwritten:
            return
        began, new = time.monotonic(), self._unwritten.encode()
        with suppress(StorageError):
            if self.storage.is_local:
                self.storage.append(self.path, new)
            else:
                self.storage.write(self.path, self._remote + new)
                self._remote += new
            self._unwritten = ""
        now = time.monotonic()
        self._due = now + max(self._every_s, SHARE * (now - began))


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
