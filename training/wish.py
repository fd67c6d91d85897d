"""This file is where it is named what a rank may ask of a run that is under way."""

from collections.abc import Callable
from enum import IntEnum


class Wish(IntEnum):
    """What is wished at a step. One rank's wish counts for all: they agree on it and act after the same step."""

    NONE = 0
    CHECKPOINT = 1
    """Save a checkpoint now and go on."""
    LEAVE = 2
    """Save a checkpoint now and end without publishing; the run stays open."""
    DROP = 3
    """End now without a checkpoint: nobody wants the run any more."""


class Dropped(Exception):
    """A run ended because nobody wants it any more.

    Args:
        step: Steps it had done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


Wishes = Callable[[], Wish]
"""Polled by every rank once per step: cheap and local. What was told is not told again."""


def no_wish() -> Wish:
    """For a run that nobody watches."""
    return Wish.NONE
