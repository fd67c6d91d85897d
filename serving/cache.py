"""This file is where subjects are kept in memory: by bytes, the longest unused go first, those in use stay.

A thread of its own loads, one after the other in the order in which they were first asked for, so nothing that is slow
happens where images are drawn.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What is kept."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        ...


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value", bound=Sized)


@dataclass
class _Kept(Generic[Value]):
    value: Value | None = None
    pins: int = 0
    then: list[Callable[[Value | Exception], None]] = field(default_factory=list)


@dataclass(frozen=True)
class CacheStats:
    """What happened so far."""

    bytes: int
    entries: int
    hits: int
    misses: int
    evictions: int


class Cache(Generic[Key, Value]):
    """Values by key.

    Args:
        budget_bytes: What all values together may take. One that is asked for while those in use leave no room waits
            until they do; one that is larger than all of it is kept while it is alone.
        load: Reads a value; its errors go to those who asked.
        size: What a value will take, about, before it is read.
    """

    def __init__(
        self, budget_bytes: int, load: Callable[[Key], Value], size: Callable[[Key], int] = lambda key: 0
    ) -> None:
        self._budget, self._load, self._size = budget_bytes, load, size
        self._kept: OrderedDict[Key, _Kept[Value]] = OrderedDict()  # the longest unused first
        self._wanted: deque[Key] = deque()
        self._changed = threading.Condition()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._closed = False
        threading.Thread(target=self._read, name="cache", daemon=True).start()

    def pin(self, key: Key, then: Callable[[Value | Exception], None]) -> None:
        """Have a value, and keep it until `unpin`.

        Args:
            key: Of the value.
            then: Called with it, at once when it is there, else later by the loading thread; or with the error, and
                then nothing is pinned.
        """
        with self._changed:
            kept = self._kept.get(key)
            if kept is None:
                kept = self._kept[key] = _Kept()
                self._wanted.append(key)
                self._misses += 1
                self._changed.notify_all()
            else:
                self._hits += kept.value is not None
                self._misses += kept.value is None
            self._kept.move_to_end(key)
            kept.pins += 1
            value = kept.value
            if value is None:
                kept.then.append(then)
        if value is not None:
            then(value)

    def unpin(self, key: Key, value: Value) -> None:
        """Give back what `pin` gave; it stays until its room is wanted."""
        with self._changed:
            kept = self._kept.get(key)
            if kept is not None and kept.value is value:  # else it was forgotten meanwhile
                kept.pins -= 1
            self._changed.notify_all()

    def forget(self, key: Key) -> None:
        """Let a value go at once, also while it is in use: whoever has it may finish, nobody gets it anew."""
        with self._changed:
            kept = self._kept.get(key)
            if kept is not None and kept.value is not None:
                del self._kept[key]
                self._bytes -= kept.value.nbytes
                self._changed.notify_all()

    def resident(self) -> list[Key]:
        """What is there."""
        with self._changed:
            return [key for key, kept in self._kept.items() if kept.value is not None]

    def stats(self) -> CacheStats:
        """The counts of the moment."""
        with self._changed:
            return CacheStats(
                self._bytes,
                sum(kept.value is not None for kept in self._kept.values()),
                self._hits,
                self._misses,
                self._evictions,
            )

    def close(self) -> None:
        """End the thread; nothing is loaded any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read(self) -> None:
        while True:
            with self._changed:
                while not (self._wanted or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                key = self._wanted[0]
            try:
                found: Value | Exception = self._fetch(key)
            except Exception as error:
                found = error
            with self._changed:
                self._wanted.popleft()
                kept = self._kept[key]
                told, kept.then = kept.then, []
                if isinstance(found, Exception):
                    del self._kept[key]
                else:
                    kept.value = found
                    self._bytes += found.nbytes
                    self._make_room(0)
            for then in told:
                then(found)

    def _fetch(self, key: Key) -> Value:
        wanted = self._size(key)
        with self._changed:
            while not self._make_room(wanted) and not self._closed:
                self._changed.wait()
        return self._load(key)

    def _make_room(self, wanted: int) -> bool:
        """Let go of what nobody uses until `wanted` bytes fit; whether they do, or are alone."""
        for key in list(self._kept):
            if self._bytes + wanted <= self._budget:
                break
            value = self._kept[key].value
            if value is not None and not self._kept[key].pins:
                del self._kept[key]
                self._bytes -= value.nbytes
                self._evictions += 1
        return self._bytes + wanted <= self._budget or self._bytes == 0
