"""This file is where one process at a time holds something in an object store that knows no locks.

The store need only be strongly consistent, as all are today: what was written is read and listed at once. Whoever
wants the lock writes a claim of its own beside those of others and lists them. Of two who do so at the same time at
least one sees the other, because each writes before it lists; whoever sees another withdraws and tries again later.
Alone, it holds the lock, and says so in its claim, with a count that it raises again and again. A claim whose bytes an
observer saw unchanged for a whole `ttl_s`, by the observer's own clock, is of a process that is gone, and is removed;
so is one that was old already when the observer came.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from uuid import uuid4

from cluster.errors import SystemFailure
from cluster.objects import Objects
from cluster.owner import is_gone, this_process

TTL_S = 60.0  # longer than a call to the store is tried again, so that one bad half minute loses nothing
OLD = 2  # times as old, by the store's clock, is surely gone, even where several machines are that clock
RENEWALS = 10  # in that time; an observer waits for one of them to be sure that a holder lives
_LONGEST_PAUSE_S = 2.0


@contextmanager
def claimed(
    objects: Objects,
    path: str,
    on_wait: Callable[[], None] = lambda: None,
    on_alive: Callable[[], None] = lambda: None,
    ttl_s: float = TTL_S,
) -> Iterator[None]:
    """Hold `path` alone among all processes that reach the store.

    Args:
        objects: The store.
        path: Under which claims lie.
        on_wait: Called once when another process holds it, before waiting; that one may turn out to be gone.
        on_alive: Called when the process that holds it was seen to live.
        ttl_s: After how long the claim of a process that is gone ends. All who share `path` give the same.

    Raises:
        SystemFailure: The claim could not be renewed for so long that another process may have taken it.
    """
    claim = _Claim(objects, path, ttl_s)
    claim.acquire(on_wait, on_alive)
    try:
        yield
    finally:
        claim.release()
    claim.check()


@dataclass
class _Seen:
    """A claim of another process, as an observer knows it."""

    data: bytes
    since: float
    """When these bytes were first seen."""
    alive: bool
    """It was seen to change, or to come."""

    @property
    def holds(self) -> bool:
        try:
            return bool(json.loads(self.data)["count"])
        except (ValueError, TypeError, KeyError):
            return False


class _Claim:
    """A claim of this process, and what it knows of others'."""

    def __init__(self, objects: Objects, path: str, ttl_s: float) -> None:
        self._objects, self._path, self._ttl_s = objects, path, ttl_s
        self._name = uuid4().hex
        self._owner = this_process()
        self._count = 0
        self._renewed = 0.0
        self._lost = self._listed = False
        self._others: dict[str, _Seen] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)

    def acquire(self, on_wait: Callable[[], None], on_alive: Callable[[], None]) -> None:
        """Return when this process holds the path."""
        pause, told = 0.05, False
        while not self._taken():
            holders = [seen for seen in (self._others or {}).values() if seen.holds]
            if holders and not told:
                told = True
                on_wait()
            if any(seen.alive for seen in holders):
                on_alive()
            pause = min(2 * pause, _LONGEST_PAUSE_S, self._ttl_s / RENEWALS)
            time.sleep(random.uniform(0, pause))  # by chance, so that of many who wait one comes to be alone
        self._thread.start()

    def release(self) -> None:
        """Let go of it."""
        self._lost |= _now() - self._renewed > self._ttl_s
        self._ended.set()
        self._thread.join()
        with suppress(OSError):  # then it ends by itself
            self._objects.remove(self._mine)

    def check(self) -> None:
        """Raise when the claim may have been another's meanwhile."""
        if self._lost:
            raise SystemFailure(
                f"the lock {self._objects.full(self._path)} was lost",
                f"it could not be renewed for {self._ttl_s:.0f} s, so that another process may have taken it",
                "see that the storage can be reached and run the same command again to go on",
            )

    @property
    def _mine(self) -> str:
        return f"{self._path}/{self._name}"

    def _taken(self) -> bool:
        """One try: whether nobody else was there before and after this claim was.

        The first one is made whoever is there: the time of this claim shows which others are old.
        """
        if self._others is not None and self._observe():
            return False
        came = _now()
        try:
            self._write(0)
            if not self._observe() and self._listed:
                self._renewed = _now()
                self._write(1)
                if _now() - came < self._ttl_s / 2:  # else others may have found it dead meanwhile
                    return True
            self._objects.remove(self._mine)
        except BaseException:
            with suppress(OSError):
                self._objects.remove(self._mine)
            raise
        return False

    def _write(self, count: int) -> None:
        self._count = count
        self._objects.write(self._mine, json.dumps({**self._owner, "count": count}).encode())

    def _observe(self) -> bool:
        """Look at the claims of others, remove those of processes that are gone; whether any is left."""
        before, now, found = self._others, _now(), dict[str, _Seen]()
        times = self._objects.times(self._path)
        self._listed = self._name in times
        for name in times.keys() - {self._name}:
            try:
                data = self._objects.read(f"{self._path}/{name}")
            except (FileNotFoundError, IsADirectoryError):
                continue
            seen = (before or {}).get(name)
            if seen is None:
                seen = _Seen(data, now, alive=before is not None)
            elif seen.data != data:
                seen = _Seen(data, now, alive=True)
            age = times.get(self._name, 0.0) - times[name]  # both by the clock of the store
            if now - seen.since > self._ttl_s or age > OLD * self._ttl_s or _owner_is_gone(data):
                self._objects.remove(f"{self._path}/{name}")
            else:
                found[name] = seen
        self._others = found
        return bool(found)

    def _keep(self) -> None:
        """Renew until the end. A claim that is too old is given up: others may have removed it."""
        while not self._ended.wait(self._ttl_s / RENEWALS):
            began = _now()
            if began - self._renewed < self._ttl_s * 3 / 4:  # later, it could come back to life
                with suppress(OSError):
                    self._write(self._count + 1)
                    if _now() - self._renewed < self._ttl_s:
                        self._renewed = began
            elif began - self._renewed > self._ttl_s:
                self._lost = True
                return


def _now() -> float:
    """Seconds of a clock that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _owner_is_gone(data: bytes) -> bool:
    try:
        return is_gone(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError):
        return False  # not whole, or of another version: its time will tell
