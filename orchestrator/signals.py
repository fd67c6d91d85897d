"""This file is where signals from outside reach a run: SIGUSR1 saves a checkpoint, SIGTERM saves one and leaves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cluster.errors import SystemFailure


class Interrupted(SystemFailure):
    """The run was ended from outside and can go on. The exit code is what a shell expects after SIGTERM."""

    exit_code = 128 + signal.SIGTERM
    state = "interrupted"


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the main thread stands, as Ctrl-C is: nothing that catches errors catches it."""


class Signals:
    """What was signalled to this process and not yet done."""

    def __init__(self) -> None:
        self.save = False
        """SIGUSR1: save a checkpoint and go on."""
        self.leave = False
        """SIGTERM."""
        self._patient = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear the signals within a `with`. In another thread than the main one there are none to hear.

        Raises:
            Interrupted: SIGTERM ended what is inside.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
        try:
            self.listen()
            yield
        except (Terminated, SystemExit) as end:
            if (
                isinstance(end, SystemExit) and end.code != signal.SIGTERM
            ):  # Ray's answer to it, while it starts
                raise
            seen = "" if isinstance(end, SystemExit) else str(end)
            raise Interrupted("terminated", seen, "run the same command again to go on") from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals over; again after Ray has started, which takes SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._save)
            signal.signal(signal.SIGTERM, self._terminate)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Within this, the first SIGTERM only sets `leave`: there is something to save. A second one ends it."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _save(self, number: int, frame: FrameType | None) -> Any:
        self.save = True

    def _terminate(self, number: int, frame: FrameType | None) -> Any:
        again, self.leave = self.leave, True
        if again or not self._patient:
            raise Terminated()
