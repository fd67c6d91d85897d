"""What is in use stays, what is not goes when its room is wanted, and every pin is answered once."""

import queue
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from serving.cache import Cache


@dataclass(frozen=True)
class Value:
    name: str
    nbytes: int = 10


class Library:
    """Values that are read when they are let."""

    def __init__(self, budget: int) -> None:
        self.read: list[str] = []
        self.may = threading.Semaphore(0)
        self.free = True
        self.cache: Cache[str, Value] = Cache(budget, self._load, lambda key: 10)

    def _load(self, key: str) -> Value:
        if not self.free:
            self.may.acquire()
        if key == "torn":
            raise OSError("torn")
        self.read.append(key)
        return Value(key)

    def pin(self, key: str) -> "queue.SimpleQueue[Any]":
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.cache.pin(key, said.put)
        return said


@pytest.fixture
def library() -> Library:
    return Library(20)


def test_a_value_is_read_once_however_many_ask(library: Library) -> None:
    library.free = False
    asked = [library.pin("a") for _ in range(3)]
    library.may.release()
    values = [said.get(timeout=10) for said in asked]
    assert values == [Value("a")] * 3 and library.read == ["a"]
    assert library.pin("a").get_nowait() is values[0]
    assert (library.cache.stats().hits, library.cache.stats().misses) == (1, 3)


def test_the_longest_unused_goes_when_room_is_wanted(library: Library) -> None:
    for key in ("a", "b", "a"):
        library.cache.unpin(key, library.pin(key).get(timeout=10))
    library.pin("c").get(timeout=10)
    assert library.cache.resident() == ["a", "c"]
    assert (library.cache.stats().evictions, library.cache.stats().bytes) == (1, 20)


def test_what_is_in_use_stays_and_who_comes_waits_for_its_room(library: Library) -> None:
    a, b = (library.pin(key).get(timeout=10) for key in "ab")
    waiting = library.pin("c")
    with pytest.raises(queue.Empty):
        waiting.get(timeout=0.05)
    library.cache.unpin("b", b)
    assert waiting.get(timeout=10) == Value("c")
    assert library.cache.resident() == ["a", "c"]
    assert library.pin("a").get_nowait() is a


def test_one_that_is_larger_than_everything_is_kept_alone() -> None:
    library = Library(5)
    a = library.pin("a").get(timeout=10)
    waiting = library.pin("b")
    with pytest.raises(queue.Empty):
        waiting.get(timeout=0.05)
    library.cache.unpin("a", a)
    assert waiting.get(timeout=10) == Value("b") and library.cache.resident() == ["b"]


def test_an_error_goes_to_who_asked_and_the_next_one_tries_again(library: Library) -> None:
    assert isinstance(library.pin("torn").get(timeout=10), OSError)
    assert isinstance(library.pin("torn").get(timeout=10), OSError)
    assert library.pin("a").get(timeout=10) == Value("a")
    assert library.cache.stats().bytes == 10


def test_what_is_forgotten_is_read_anew_and_an_old_pin_does_not_count(library: Library) -> None:
    old = library.pin("a").get(timeout=10)
    library.cache.forget("a")
    assert library.cache.resident() == [] and library.cache.stats().bytes == 0
    new = library.pin("a").get(timeout=10)
    library.cache.unpin("a", old)
    assert new is not old and library.read == ["a", "a"]
    library.pin("b").get(timeout=10)
    waiting = library.pin("c")  # a is still pinned by its new holder
    with pytest.raises(queue.Empty):
        waiting.get(timeout=0.05)
