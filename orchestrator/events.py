"""This file is where what a gang says is written down, and where its thread is watched."""

import json
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from cluster.storage import Storage


class EventLog:
    """`events.jsonl` of a run: what happened, each step once even when a restart repeats some."""

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage, self.path = storage, path
        self.last_step = 0
        if storage.exists(path):
            for line in storage.read(path).decode().splitlines():
                self.last_step = max(self.last_step, int(json.loads(line).get("step", 0)))

    def add(self, kind: str, payload: Mapping[str, Any]) -> list[dict[str, float]]:
        """Write an event; of `steps` only those not written before, which are returned."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows: list[dict[str, float]] = []
        if kind == "steps":
            rows = [dict(row) for row in payload["rows"] if row["step"] > self.last_step]
            lines = [{"time": now, "event": "step", **row} for row in rows]
            self.last_step = max([self.last_step, *(int(row["step"]) for row in rows)])
        else:
            lines = [{"time": now, "event": kind, **payload}]
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
