"""This file is where prompts and images are let through or refused, by checks that the operator names.

No check configured: everything passes, and the log says so once. Configured: nothing passes that a check did not allow.
A check that raises, answers something else or is not done in time refuses, and the image is thrown away.
"""

import importlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Protocol, Self, cast

from pydantic import Field

from cluster.errors import RayboothError, SystemFailure, UserError
from serving.verdict import Verdict
from training.png import Finish, Pixels
from training.section import Section

TIMEOUT_S = 5.0  # a word list takes microseconds, a classifier on a CPU one second
MAX_STUCK = (
    4  # checks that never came back, each of them a thread: from then on nothing is asked, all is refused
)

log = logging.getLogger(__name__)


class SafetyCheck(Protocol):
    """What an operator may plug in. It is called from several threads, each call in one of its own."""

    def prompt(self, prompt: str, negative_prompt: str) -> Verdict:
        """Judge a prompt, in words, before anything is drawn."""
        ...

    def image(self, pixels: Pixels) -> Verdict:
        """Judge an image [H, W, 3] uint8 before anybody sees it."""
        ...


class CheckSettings(Section):
    """One check."""

    factory: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`module:factory`: a function of this installation that takes `options` by name and returns a check."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its arguments."""


class SafetySettings(Section):
    """Which checks there are. Only the operator's configuration says so, never a request."""

    checks: tuple[CheckSettings, ...] = ()
    """All must allow; the first that refuses is the one that is named."""
    timeout_s: float = Field(default=TIMEOUT_S, gt=0, allow_inf_nan=False)
    """How long a check may take over one prompt or image."""


class Unsafe(UserError):
    """A check refused.

    Args:
        subject: `prompt` or `image`.
        reason: The check's reason code.
    """

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(
            f"the {subject} was refused by the safety check", f"reason: {reason}", "ask for something else"
        )
        self.args = (subject, reason)
        self.subject, self.reason = subject, reason


class SafetyUnavailable(SystemFailure):
    """A check could not decide, and what is not allowed is refused.

    Args:
        subject: `prompt` or `image`.
        seen: What kept it; for the operator, so it names no prompt.
    """

    def __init__(self, subject: str, seen: str) -> None:
        super().__init__(
            f"the safety check could not judge the {subject}, so it is refused", seen, "try again later"
        )
        self.args = (subject, seen)
        self.subject = subject


class SafetyGuard:
    """Asks every check, and refuses when one does not say yes.

    Args:
        checks: By the name that errors and counts use.
        timeout_s: How long a check may take.
    """

    def __init__(self, checks: Mapping[str, SafetyCheck], timeout_s: float = TIMEOUT_S) -> None:
        self._checks, self._timeout_s = dict(checks), timeout_s
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._stuck = 0
        self._lock = threading.Lock()
        if not self._checks:
            log.warning("no safety check is configured: prompts and images are not checked")

    @classmethod
    def of(cls, settings: SafetySettings) -> Self:
        """The guard with the configured checks.

        Raises:
            UserError: A check cannot be loaded: without it nothing may start.
        """
        checks = {f"{number}:{check.factory}": _load(check) for number, check in enumerate(settings.checks)}
        return cls(checks, settings.timeout_s)

    @property
    def checks(self) -> tuple[str, ...]:
        """The names of the checks that are asked; with none, everything is allowed."""
        return tuple(self._checks)

    def prompt(self, prompt: str, negative_prompt: str = "") -> None:
        """Return if the prompt is allowed.

        Raises:
            Unsafe: A check refused it.
            SafetyUnavailable: A check could not decide.
        """
        self._all("prompt", lambda check: check.prompt(prompt, negative_prompt))

    def image(self, pixels: Pixels) -> None:
        """Return if the image [H, W, 3] uint8 is allowed.

        Raises:
            Unsafe: A check refused it.
            SafetyUnavailable: A check could not decide.
        """
        self._all("image", lambda check: check.image(pixels))

    def counts(self) -> dict[tuple[str, str, str], int]:
        """How often each (`prompt` or `image`, `allowed`, `refused` or `failed`, reason code) came about."""
        with self._lock:
            return dict(self._counts)

    def _all(self, subject: str, ask: Callable[[SafetyCheck], Verdict]) -> None:
        for name, check in self._checks.items():
            verdict = self._asked(subject, name, lambda check=check: ask(check))  # type: ignore[misc]
            self._count(subject, "allowed" if verdict.allowed else "refused", verdict.reason)
            if not verdict.allowed:
                raise Unsafe(subject, verdict.reason)

    def _asked(self, subject: str, name: str, ask: Callable[[], Verdict]) -> Verdict:
        """The answer of one check, which has a thread of its own: it cannot be ended, but it can be left."""
        with self._lock:
            full = self._stuck >= MAX_STUCK
        if full:
            raise self._failed(subject, name, "stuck", f"{MAX_STUCK} checks never came back")
        call = _Call(ask)
        threading.Thread(target=call.run, name="safety-check", daemon=True).start()
        try:
            verdict = call.answer.get(timeout=self._timeout_s)
        except Empty:
            with self._lock:
                self._stuck += 1
            call.when_back(self._came_back)
            raise self._failed(subject, name, "timeout", f"not done after {self._timeout_s:g} s") from None
        if isinstance(verdict, BaseException):
            raise self._failed(subject, name, "error", f"it raised {type(verdict).__name__}") from verdict
        if type(verdict) is not Verdict or verdict.allowed not in (True, False):
            raise self._failed(subject, name, "error", f"it answered {type(verdict).__name__}, no verdict")
        return verdict

    def _came_back(self) -> None:
        with self._lock:
            self._stuck -= 1

    def _failed(self, subject: str, name: str, code: str, seen: str) -> SafetyUnavailable:
        self._count(subject, "failed", code)
        log.error("safety check %s on a %s: %s", name, subject, seen)
        return SafetyUnavailable(subject, seen)

    def _count(self, subject: str, outcome: str, reason: str) -> None:
        with self._lock:
            self._counts[subject, outcome, reason] += 1


def guarded(guard: SafetyGuard, finish: Finish) -> Finish:
    """What makes the PNG of an image that is allowed, and raises for one that is not."""

    def checked(pixels: Pixels, facts: Mapping[str, Any]) -> bytes:
        guard.image(pixels)
        return finish(pixels, facts)

    return checked


class _Call:
    """One question to one check, which may be answered when nobody waits any more."""

    def __init__(self, ask: Callable[[], Verdict]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._done = False
        self._then: Callable[[], None] | None = None
        self.answer: SimpleQueue[Any] = SimpleQueue()

    def run(self) -> None:
        """Ask; whatever is raised is an answer too, or a thread would die and its waiter wait."""
        try:
            found: object = self._ask()
        except BaseException as error:
            found = error
        self.answer.put(found)
        with self._lock:
            self._done = True
            then = self._then
        if then:
            then()

    def when_back(self, then: Callable[[], None]) -> None:
        """Call `then` once when the check comes back, or now if it has."""
        with self._lock:
            done = self._done
            if not done:
                self._then = then
        if done:
            then()


def _load(settings: CheckSettings) -> SafetyCheck:
    """The check that a factory makes."""
    module, _, name = settings.factory.partition(":")
    try:
        check = getattr(importlib.import_module(module), name)(**settings.options)
    except RayboothError:
        raise
    except Exception as error:  # whatever keeps a check away keeps the service down
        seen = f"{type(error).__name__}: {error}"
        raise UserError(
            f"the safety check {settings.factory} cannot be loaded", seen, "see safety.checks"
        ) from error
    missing: Sequence[str] = [
        part for part in ("prompt", "image") if not callable(getattr(check, part, None))
    ]
    if missing:
        seen = f"it has no {' and no '.join(missing)}"
        raise UserError(f"{settings.factory} makes no safety check", seen, "see serving.safety.SafetyCheck")
    return cast(SafetyCheck, check)
