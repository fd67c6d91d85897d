"""What one worker of a gang hears while it trains."""

import time
from queue import Queue
from typing import Any

from training.listener import Listener
from training.wish import Wish


class Box:
    """A mailbox that asks what is put into it."""

    def __init__(self) -> None:
        self.words: Queue[list[str]] = Queue()
        self.after: list[int] = []

    def asked(self, after: int) -> list[str]:
        self.after.append(after)
        return self.words.get(timeout=20)


def hear(listener: Listener) -> Wish:
    """The next wish, once the thread has heard it."""
    until = time.monotonic() + 20
    while not (wish := listener()) and time.monotonic() < until:
        time.sleep(0.001)
    return wish


def test_each_wish_is_told_once_and_the_greater_of_two_wins() -> None:
    box: Any = Box()
    listener = Listener(box, lambda: False)
    assert listener() is Wish.NONE
    box.words.put(["checkpoint"])
    assert (hear(listener), listener()) == (Wish.CHECKPOINT, Wish.NONE)
    box.words.put(["leave", "checkpoint"])
    assert (hear(listener), listener()) == (Wish.LEAVE, Wish.NONE)
    box.words.put(["checkpoint"])
    assert hear(listener) is Wish.CHECKPOINT
    assert box.after[:3] == [0, 1, 3]


def test_a_node_that_is_taken_away_is_told_once_in_every_run() -> None:
    listener = Listener(Box(), lambda: True)  # type: ignore[arg-type]
    assert [listener(), listener()] == [Wish.LEAVE, Wish.NONE]
    listener.begin(1)
    assert listener() is Wish.LEAVE


def test_a_wish_is_not_carried_into_the_next_run() -> None:
    box: Any = Box()
    listener = Listener(box, lambda: False)
    box.words.put(["leave"])
    while len(box.after) < 2:
        time.sleep(0.001)
    listener.begin(1)
    assert listener() is Wish.NONE


def test_a_run_is_dropped_by_its_lease_and_slot_whenever_it_was_said() -> None:
    box: Any = Box()
    listener = Listener(box, lambda: False)
    box.words.put(["drop 1 0", "drop 2 3"])
    while len(box.after) < 2:
        time.sleep(0.001)
    listener.begin(0)
    assert (listener.of_one(), listener.dropped()) == (Wish.NONE, frozenset())
    listener.begin(1)
    assert (listener.of_one(), listener.of_one(), listener()) == (Wish.DROP, Wish.DROP, Wish.NONE)
    listener.begin(2)
    assert (listener.of_one(), listener.dropped()) == (Wish.NONE, frozenset({3}))
