"""This file is where it is decided which replica draws a subject: one that knows it, unless that one is busy."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What is known of a replica."""

    ongoing: int
    """Images that it was given and that are not there yet."""
    warm: bool = False
    """Whether the subject is in its memory."""


def ranked(subject: str, replicas: Mapping[str, Load], busy: int) -> list[str]:
    """The replicas in the order in which to ask them.

    A replica that knows the subject is preferred, then the one that the subject's name points to, so that all who
    choose agree without a word between them. A hot subject spreads: a replica that is busy comes after all that
    are not. The same for the busy ones, of which the least busy is asked first.

    Args:
        subject: Its name; empty for the pristine base, which every replica knows.
        replicas: All there are, by name.
        busy: Images at which a replica's batch is full, and more only wait.
    """

    def order(name: str) -> tuple[int, int, int, int]:
        load = replicas[name]
        full = max(load.ongoing - busy + 1, 0)
        if not subject:
            return full, load.ongoing, 0, _pull(name, name)
        return full, 0, not load.warm, -_pull(subject, name)

    return sorted(replicas, key=order)


def _pull(subject: str, replica: str) -> int:
    """How strongly a subject is drawn to a replica (rendezvous hashing)."""
    return int.from_bytes(hashlib.sha256(f"{subject}\0{replica}".encode()).digest()[:8])
