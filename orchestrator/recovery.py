"""This file is where it is decided what becomes of a run that did not succeed. No clock, no cluster, no record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import Any

MOST_KILLS = 3  # the fourth gang would die of it too, and every death costs a worker's start


class Kind(StrEnum):
    """What ended a try."""

    LOST_NODE = "lost_node"
    MEMORY = "memory"
    BAD_INPUT = "bad_input"
    DIVERGED = "diverged"
    STORAGE = "storage"
    SYSTEM = "system"
    GANG_KILLED = "gang_killed"
    CANCELLED = "cancelled"
    BUDGET = "budget"


class Size(IntEnum):
    """How far a run was made to need less memory; each includes those before it."""

    AS_ASKED = 0
    HALF_BANK = 1
    ALONE = 2
    CHECKPOINTING = 3
    """Activations are computed again instead of kept (`engine.gradient_checkpointing`)."""
    ACCUMULATING = 4
    """A step's pairs go through one after another (`train.accumulation`)."""


@dataclass(frozen=True)
class Failure:
    """Why a try ended."""

    kind: Kind
    reason: Mapping[str, Any]
    """`what, seen, do`."""


@dataclass(frozen=True)
class History:
    """How the run fared so far."""

    attempts: int
    """Tries begun that count, this one among them."""
    kills: int
    """Gangs that died of it before, or of its bank."""
    smaller: Size
    width: int
    """Of its bank."""
    members: int
    """Runs of its bank that still trained when this happened, itself among them."""
    most_attempts: int
    """`schedule.attempts`."""
    can: frozenset[Size] = frozenset()
    """Which of CHECKPOINTING and ACCUMULATING its recipe leaves room for."""


@dataclass(frozen=True)
class Again:
    """The run is queued again from its last checkpoint, with these fields on record."""

    attempts: int
    kills: int
    smaller: Size
    width: int


@dataclass(frozen=True)
class Fail:
    """The run has ended, as `failed` or `cancelled`."""

    reason: Mapping[str, Any]
    state: str = "failed"


@dataclass(frozen=True)
class SetAside:
    """The run has failed, and no gang is risked for it again until somebody asks for it."""

    reason: Mapping[str, Any]


Decision = Again | Fail | SetAside


def decide(failure: Failure, history: History) -> Decision:
    """What becomes of the run.

    A lost node costs it nothing. Out of memory it is tried once at each smaller size. A bad input or a diverged run
    would end the same again. Storage and other failures of ours are tried again as often as `schedule.attempts`
    says. A run that killed its gang three times is set aside; a bank that did is broken up, since any of its runs may
    be the one. A spent budget leaves it queued.
    """
    return _POLICY[failure.kind](failure, history)


def _free(failure: Failure, history: History) -> Decision:
    return _again(history, attempts=max(history.attempts - 1, 0))


def _counted(failure: Failure, history: History) -> Decision:
    if history.attempts >= history.most_attempts:
        tries = "once" if history.attempts == 1 else f"{history.attempts} times"
        return Fail(_reason(failure, f"tried {tries}"))
    return _again(history)


def _never(failure: Failure, history: History) -> Decision:
    return Fail(_reason(failure))


def _cancelled(failure: Failure, history: History) -> Decision:
    return Fail(_reason(failure), state="cancelled")


def _smaller(failure: Failure, history: History) -> Decision:
    attempts = max(history.attempts - 1, 0)  # every size is tried once, which is a limit of its own
    if history.width > 2 and history.smaller < Size.HALF_BANK:
        return _again(history, attempts=attempts, smaller=Size.HALF_BANK, width=history.width // 2)
    if history.width > 1:
        return _again(history, attempts=attempts, smaller=Size.ALONE, width=1)
    left = [
        size
        for size in (Size.CHECKPOINTING, Size.ACCUMULATING)
        if size > history.smaller and size in history.can
    ]
    if left:
        return _again(history, attempts=attempts, smaller=left[0])
    return Fail(_reason(failure, "no smaller way to train it is left" if history.smaller else ""))


def _killed(failure: Failure, history: History) -> Decision:
    attempts, kills = max(history.attempts - 1, 0), history.kills + 1
    if kills < MOST_KILLS:
        return _again(history, attempts=attempts, kills=kills)
    if history.members > 1:
        return _again(history, attempts=attempts, kills=0, smaller=max(history.smaller, Size.ALONE), width=1)
    return SetAside(_reason(failure, f"it ended its gang {kills} times"))


def _again(history: History, **changed: Any) -> Again:
    kept = Again(history.attempts, history.kills, history.smaller, history.width)
    return replace(kept, **changed)


def _reason(failure: Failure, also: str = "") -> dict[str, Any]:
    """The reason on record: the failure's, its kind, and how often it was tried."""
    seen = "; ".join(part for part in (str(failure.reason.get("seen", "")), also) if part)
    return {**failure.reason, "seen": seen, "kind": failure.kind.value}


_POLICY: Mapping[Kind, Callable[[Failure, History], Decision]] = {
    Kind.LOST_NODE: _free,
    Kind.MEMORY: _smaller,
    Kind.BAD_INPUT: _never,
    Kind.DIVERGED: _never,
    Kind.STORAGE: _counted,
    Kind.SYSTEM: _counted,
    Kind.GANG_KILLED: _killed,
    Kind.CANCELLED: _cancelled,
    Kind.BUDGET: _free,
}
