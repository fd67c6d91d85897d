"""This file is where long work shows where it stands: a bar with an ETA on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_EVERY_S = 15.0  # a log line per stage at most this often: a CI log should be readable


class Stage(Protocol):
    """One stage of long work, such as drawing class images."""

    def advance(self, detail: str = "") -> None:
        """One more unit is done; `detail` is shown beside the bar."""
        ...

    def at(self, done: int, detail: str = "") -> None:
        """`done` units are done, counted from the start of the stage, not of this process."""
        ...


class Stages(Protocol):
    """Shows the stages of a command, one after the other, on stderr."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """A stage of `total` units; its bar is finished when the block ends well."""
        ...

    def note(self, text: str) -> None:
        """A line for people."""
        ...


def open_stages() -> Stages:
    """Bars when stderr is a terminal, lines when it is not."""
    return _Bars() if sys.stderr.isatty() else Lines(sys.stderr)


class _Bars:
    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            yield _Bar(progress, progress.add_task(title, total=total, detail=""))

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def advance(self, detail: str = "") -> None:
        self.progress.update(self.task, advance=1, detail=detail)

    def at(self, done: int, detail: str = "") -> None:
        self.progress.update(self.task, completed=done, detail=detail)


class Lines:
    """Stages as lines, for what is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        line = _Line(self, title, total)
        yield line
        self.note(f"{title}: {line.done}/{total} in {time.monotonic() - line.began:.0f} s")

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class _Line:
    def __init__(self, lines: Lines, title: str, total: int) -> None:
        self.lines, self.title, self.total = lines, title, total
        self.done = 0
        self.first: tuple[int, float] | None = None  # units and time that the speed is counted from
        self.began = self.said = time.monotonic()

    def advance(self, detail: str = "") -> None:
        self.first = self.first or (0, self.began)
        self.at(self.done + 1, detail)

    def at(self, done: int, detail: str = "") -> None:
        self.done, now = done, time.monotonic()
        first, since = self.first = self.first or (done, now)
        if now - self.said < LOG_EVERY_S or done <= first:
            return
        self.said = now
        eta_s = (now - since) / (done - first) * (self.total - done)
        self.lines.note(f"{self.title}: {done}/{self.total}, eta {eta_s:.0f} s {detail}".rstrip())
