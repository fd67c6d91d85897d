"""This file is where it is named what a controller hears of the work of its campaign."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import RayboothError, UserError
from cluster.mailbox import BAD_INPUT, SYSTEM
from cluster.objects import StorageError


@dataclass(frozen=True)
class Fact:
    """Something that happened to run `run`, by its id in the ledger."""

    run: int


@dataclass(frozen=True)
class Checked(Fact):
    """Its photos are read and stored; nothing about it can be the user's mistake any more."""

    version: str
    fingerprint: str
    prior_key: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ready(Fact):
    """Everything it is trained on is encoded."""

    prior_drawn: int = 0
    """Class images that had to be drawn for it, counted with one run of their class alone."""


@dataclass(frozen=True)
class Began(Fact):
    """Its workers start from step `step`."""

    step: int


@dataclass(frozen=True)
class Stepped(Fact):
    """Its last step so far, as `events.jsonl` has it."""

    row: Mapping[str, Any]


@dataclass(frozen=True)
class Published(Fact):
    """Its artifact is there, not yet on record."""

    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Registered(Fact):
    """Its artifact is on record: the run has succeeded."""

    version: str
    artifact: str
    metrics: Mapping[str, float]
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class Failed(Fact):
    """It came to an error; whether it is tried again is not decided here."""

    kind: str
    """Such as `bad_input`, `memory`, `gang_killed`, `system`."""
    what: str
    seen: str = ""
    do: str = ""

    @classmethod
    def of(cls, run: int, error: BaseException) -> "Failed":
        """From an error that was raised, of storage too."""
        if isinstance(error, StorageError):
            error = error.failure()
        if isinstance(error, RayboothError):
            kind = BAD_INPUT if isinstance(error, UserError) else SYSTEM
            return cls(run, kind, error.what, error.seen, error.do)
        line, *_ = [*str(error).strip().splitlines(), ""]
        return cls(
            run,
            SYSTEM,
            "something went wrong inside raybooth",
            f"{type(error).__name__}: {line}",
            "report it",
        )

    @property
    def reason(self) -> dict[str, str]:
        """As the ledger keeps it."""
        return {"kind": self.kind, "what": self.what, "seen": self.seen, "do": self.do}


@dataclass(frozen=True)
class Stopped(Fact):
    """It ended because it was asked to: `kept` says whether with a checkpoint."""

    kept: bool


@dataclass(frozen=True)
class Said(Fact):
    """A line for people."""

    text: str


@dataclass(frozen=True)
class Measured(Fact):
    """How many runs such as this one are best trained together."""

    width: int
    figures: Mapping[str, Any] = field(default_factory=dict)
