"""This file is where an ingress process says that it lives, and finds out which others do not any more.

`ingress/ID.json` holds who it is and a count that it raises again and again. Another process takes it to be gone when
it knows so, both being on one machine, or when it saw the count unchanged for `PATIENCE` beats by its own clock.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from uuid import uuid4

from cluster.owner import is_gone, this_process
from cluster.storage import Storage

PATIENCE = 6
_FOLDER = "ingress"


class Presence:
    """This process among those that serve a storage root. Its methods read and write the storage.

    Args:
        storage: The root.
        beat_s: Seconds between two signs of life, the same for all.
        clock: Seconds of a clock that only goes on.
    """

    def __init__(self, storage: Storage, beat_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage, self._beat_s, self._clock = storage, beat_s, clock
        self.id = uuid4().hex
        self._count = 0
        self._seen: dict[str, tuple[bytes, float]] = {}

    def beat(self) -> None:
        """Say that this process lives."""
        self._count += 1
        self._storage.write_json(f"{_FOLDER}/{self.id}.json", {**this_process(), "count": self._count})

    def leave(self) -> None:
        """Say that it does not any more."""
        self._storage.remove(f"{_FOLDER}/{self.id}.json")

    def lives(self, other: str) -> bool:
        """Whether another process may still be there. One that is gone is forgotten."""
        if other == self.id:
            return True
        path = f"{_FOLDER}/{other}.json"
        try:
            data = self._storage.read(path)
        except FileNotFoundError:
            return False
        before, since = self._seen.get(other, (b"", 0.0))
        if data != before:
            since = self._clock()
            self._seen[other] = (data, since)
        gone = self._clock() - since > PATIENCE * self._beat_s
        with suppress(ValueError, KeyError, TypeError):  # of another version: its time will tell
            gone |= is_gone(json.loads(data))
        if gone:
            self._storage.remove(path)
            self._seen.pop(other, None)
        return not gone
