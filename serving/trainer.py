"""This file is where it is named what the ingress needs of whoever trains and deletes: `orchestrator` is handed in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

TrainingStatus = Literal["starting", "processing", "succeeded", "failed", "canceled"]
ENDED = ("succeeded", "failed", "canceled")


@dataclass(frozen=True)
class TrainingOrder:
    """A subject that is to be trained."""

    id: str
    tenant: str
    subject: str
    """The stored name."""
    class_noun: str
    photos: tuple[str, ...]
    """Paths or URIs, which whoever trains can read."""
    params: Mapping[str, Any]
    """Settings of `serving.training_order.TrainingParams` that were given."""


@dataclass(frozen=True)
class TrainingState:
    """How a training stands. Times are seconds since the epoch."""

    status: TrainingStatus
    phase: str
    """Within the status, in the words of campaigns: `queued`, `preparing`, `training`, `publishing`, ..."""
    step: int
    steps: int
    held: bool
    """Whether something works on it at this moment."""
    rate: float | None = None
    """Steps per second."""
    version: str | None = None
    """Once it has succeeded."""
    reason: Mapping[str, Any] | None = None
    """`what, seen, do` of a failure."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    started: float | None = None
    finished: float | None = None


@dataclass(frozen=True)
class Happening:
    """Something that happened to a training."""

    at: float
    state: str
    phase: str | None
    attempt: int
    reason: Mapping[str, Any] | None


class Trainer(Protocol):
    """Who trains. Methods may block, and are called in threads. A training is known by its order's id."""

    def check(self, order: TrainingOrder) -> None:
        """Refuse what could not be trained; opens no photo.

        Raises:
            UserError: A setting cannot be used.
        """
        ...

    def enroll(self, order: TrainingOrder) -> None:
        """Put a training on record, where it survives every process; the same once more changes nothing."""
        ...

    def run(self, identity: str) -> None:
        """See that somebody works on a training; does nothing when somebody does, or it has ended."""
        ...

    def state(self, identity: str) -> TrainingState | None:
        """How it stands; `None` when there is no such training."""
        ...

    def history(self, identity: str) -> Sequence[Happening]:
        """What happened to it, the oldest first; it only grows."""
        ...

    def cancel(self, identity: str) -> None:
        """End it; what works on it finds out."""
        ...


@dataclass(frozen=True)
class Receipt:
    """What a deletion removed."""

    id: str
    subject: str
    """The stored name."""
    at: str
    """ISO 8601."""
    removed: tuple[str, ...]
    """Paths under the storage root, and what was removed elsewhere."""
    files: int
    """Under those paths."""
    kept: tuple[str, ...]
    """What still knows of the subject, and why."""


class Eraser(Protocol):
    """Who deletes subjects. Methods may block, and are called in threads."""

    def erase(self, subject: str) -> Receipt:
        """Remove everything of a subject, by its stored name.

        Raises:
            UserError: There is nothing of it, or it is being trained.
        """
        ...
