"""This file is where it is named what a replica is asked for, what it answers, and how it refuses.

It imports neither torch nor Ray: the ingress, which draws nothing, starts with it alone. Everything here survives
pickling between processes.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.errors import RayboothError
from training.request import DrawRequest

PRISTINE = "base"  # the name that draws with the base itself


@dataclass(frozen=True)
class ImageOrder:
    """One image, asked of a replica. Its prompt may still say `{subject}` and `{class}`."""

    id: str
    """Names it while it is drawn; asked twice with the same id, it is drawn twice."""
    subject: str
    """A registered subject, or `base`."""
    version: str
    """Of the artifact, already resolved; empty for the base."""
    request: DrawRequest
    """The prompt, the seed, the settings."""
    deadline_s: float | None = None
    """Seconds from now after which nobody wants it any more; `None` waits for ever."""
    progress: bool = False
    """Whether somebody wants to hear of its steps; a word costs more than many a step."""
    preview_every: int = 0
    """Steps between previews, small PNGs of what the image is becoming; 0 is none."""


@dataclass(frozen=True)
class Joined:
    """The row takes part in the batch from now on."""

    waited_s: float


@dataclass(frozen=True)
class Stepped:
    """A denoising step of the row is done."""

    step: int
    """Steps done, from 1."""
    steps: int
    preview: bytes = b""
    """A PNG, when one was due."""


@dataclass(frozen=True)
class Drawn:
    """The image is there; nothing more follows."""

    png: bytes
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was drawn: subject, version, artifact hash, base revision, prompt in words, seed, settings, seconds."""


Event = Joined | Stepped | Drawn


class Refused(RayboothError):
    """A replica takes no more, or gives up; the same may be asked again."""


class QueueFull(Refused):
    """Too many rows wait already.

    Args:
        waiting: Rows that wait.
        retry_after_s: When there should be room.
    """

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__("the queue is full", f"{waiting} images wait", f"try again in {retry_after_s:.0f} s")
        self.args = (waiting, retry_after_s)
        self.retry_after_s = retry_after_s


class DeadlinePassed(Refused):
    """An image was not ready in time.

    Args:
        after_s: How long it was waited for.
        step: Steps it had done.
        steps: Steps it wanted.
    """

    def __init__(self, after_s: float, step: int, steps: int) -> None:
        super().__init__(
            "the image was not ready in time",
            f"after {after_s:.1f} s it had done {step} of {steps} steps",
            "ask for fewer steps, or give it longer",
        )
        self.args = (after_s, step, steps)


class Draining(Refused):
    """The replica goes away and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("the replica is going away", "", "ask again: another one answers")
        self.args = ()


class ReplicasLost(Refused):
    """Every replica that began an image was lost before it was done.

    Args:
        number: Of them.
    """

    def __init__(self, number: int) -> None:
        super().__init__("the replicas that drew the image were lost", f"{number} of them", "ask again")
        self.args = (number,)


class Artist(Protocol):
    """Who draws: one engine in this process, or replicas behind a handle."""

    def draw(self, order: ImageOrder) -> AsyncIterator[Event]:
        """Draw one image; ends after `Drawn`. Closing the iterator gives the image up within a step.

        Raises:
            UserError: The prompt is too long for the base, the sampler cannot do what is asked.
            Refused: Not now: the queue is full, the deadline has passed, the replica goes away.
            SystemFailure: The artifact is missing or damaged, or something of ours failed.
        """
        ...

    async def stats(self) -> Mapping[str, float]:
        """What there is to say of the moment: rows running and waiting, subjects resident, images drawn."""
        ...
