"""This file is where what a gang says is written down, and where its thread is watched."""

import json
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from cluster.mailbox import Event
from cluster.storage import Storage


class EventLog:
    """`events.jsonl` of a run: what happened, each step once even when a restart repeats some."""

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage, self.path = storage, path
        self.last_step = 0
        if storage.exists(path):
            whole, _, torn = storage.read(path).decode(errors="replace").rpartition("\n")
            if torn:  # the driver was killed while it wrote
                storage.write(path, f"{whole}\n".encode() if whole else b"")
            said = [json.loads(line) for line in whole.splitlines()]
            self.last_step = max((int(s["step"]) for s in said if s["event"] == "step"), default=0)

    def add(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Write events; returns the figures of those steps that were not written before."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        for event in events:
            if event.kind == "step" and event.payload["step"] <= self.last_step:
                continue
            lines.append({"time": now, "event": event.kind, **event.payload})
            if event.kind == "step":
                self.last_step = int(event.payload["step"])
                rows.append(dict(event.payload))
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            self.storage.append(self.path, text.encode())
        return rows


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
