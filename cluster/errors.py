"""This file is where the errors that people read are defined: what happened, what was seen, what to do."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class RayboothError(Exception):
    """An error for people. Positional and stored, so that it survives pickling between processes.

    Args:
        what: What happened, one clause without a full stop.
        seen: What was seen, the evidence; empty when `what` says it all.
        do: What to do next.
    """

    exit_code = 1
    state = "failed"

    def __init__(self, what: str, seen: str = "", do: str = "") -> None:
        super().__init__(what, seen, do)
        self.what = what
        self.seen = seen
        self.do = do

    def __str__(self) -> str:
        return ". ".join(part.rstrip(".") for part in (self.what, self.seen, self.do) if part)

    def as_json(self) -> dict[str, str]:
        """The error object of the `--json` contract."""
        return {"what": self.what, "seen": self.seen, "do": self.do}


class UserError(RayboothError):
    """The user's mistake: a spec, a photo, a name. Exit code 2."""

    exit_code = 2


class SystemFailure(RayboothError):
    """Our fault or the cluster's: a lost worker, a full disk, a broken file. Exit code 1."""


def failure_of(error: Mapping[str, Any]) -> RayboothError:
    """The error that `as_json` and its `exit_code` were made of, whichever process raised it."""
    kind = UserError if error.get("exit_code") == UserError.exit_code else SystemFailure
    return kind(*(str(error.get(part, "")) for part in ("what", "seen", "do")))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to do about an unknown word: the nearest known one, or all of them; empty when none is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" if names else ""
