"""This file is where people watch a campaign: a live table on a terminal, a line per change in a log."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from orchestrator.pace import Pace, span, taken_by
from orchestrator.progress import LOG_EVERY_S, Lines, Stage
from orchestrator.records import CampaignRow, RunRow
from orchestrator.table import campaign_table, failure_lines, reason_line, summary

REFRESH_S = 0.2  # a table feels live at 5 Hz
SHARE = 0.1  # of the time at most is spent on showing
FEW = 60  # subjects whose every state is a line of the log; of more, only the first step and the end
FAILURES = 5  # lines of reasons under the live table
FULL = 60  # rows of the table that stays on the terminal

Facts = tuple[CampaignRow, Sequence[RunRow]]


class CampaignWatch:
    """Shows a campaign on stderr while it is open, and what came of it at the end.

    It serves as `Stages` too: notes stand above the table, and the bars of stages below it. Any thread may call it.

    Args:
        stream: Where to; `None` is stderr. What is no terminal gets lines.
        console: In place of one for `stream`.
    """

    def __init__(self, stream: TextIO | None = None, console: Console | None = None) -> None:
        console = console or Console(file=stream or sys.stderr, highlight=False)
        self._face: _LiveTable | _LogLines = (
            _LiveTable(console) if console.is_terminal else _LogLines(console.file)
        )
        self._facts: Facts | None = None
        self._pace = Pace()
        self._next = 0.0
        self._lock = threading.RLock()

    def __enter__(self) -> "CampaignWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def due(self) -> bool:
        """Whether `show` would show anything now: before that, nobody need gather the rows."""
        return time.monotonic() >= self._next

    def show(self, campaign: CampaignRow, rows: Sequence[RunRow]) -> None:
        """Show where the campaign stands; call it as often as you like.

        Args:
            campaign: What is on record of it.
            rows: All of its runs.
        """
        with self._lock:
            self._facts = campaign, rows
            if not self.due:
                return
            began = time.monotonic()
            self._pace.take(began, rows)
            self._face.show(self._facts, self._pace)
            now = time.monotonic()
            self._next = now + max(REFRESH_S, (now - began) / SHARE)

    def note(self, text: str) -> None:
        """A line for people."""
        with self._lock:
            self._face.note(text)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """A stage of `total` units, such as drawing class images."""
        with self._face.stage(title, total) as stage:
            yield stage

    def close(self) -> None:
        """Show the last facts, and leave the terminal."""
        with self._lock:
            if self._facts is not None:
                self._pace.take(time.monotonic(), self._facts[1])
            self._face.close(self._facts, self._pace)
            self._facts = None


class _Bar:
    """A stage as a line under the live table."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.detail = title, total, 0, ""
        self.first: tuple[int, float] | None = None  # units and time that the speed is counted from
        self.began = time.monotonic()

    def advance(self, detail: str = "") -> None:
        self.first = self.first or (0, self.began)
        self.at(self.done + 1, detail)

    def at(self, done: int, detail: str = "") -> None:
        self.first = self.first or (done, time.monotonic())
        self.done, self.detail = done, detail

    def line(self) -> Text:
        """As it stands now."""
        cells = 24
        filled = round(cells * min(self.done / self.total, 1.0)) if self.total else cells
        line = Text(f"{self.title}  ", no_wrap=True, overflow="ellipsis")
        line.append("━" * filled, "cyan").append("─" * (cells - filled), "bright_black")
        first, since = self.first or (0, self.began)
        speed = (self.done - first) / max(time.monotonic() - since, 1e-9)
        eta = f"eta {span((self.total - self.done) / speed)}" if speed > 0 else ""
        return line.append(f" {self.done}/{self.total}  {eta}  {self.detail}".rstrip())


class _LiveTable:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._bars: list[_Bar] = []

    def show(self, facts: Facts, pace: Pace) -> None:
        campaign, rows = facts
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        failures = failure_lines(rows, FAILURES)
        bars = [bar.line() for bar in list(self._bars)]
        around = len(failures) + len(bars) + 3  # the head of the table, and two lines of summary
        width, height = self._console.size
        parts: list[Any] = [campaign_table(rows, width, max(height - around - 1, 3)), *failures, *bars]
        self._live.update(
            Group(*parts, summary(campaign, _counts(rows), pace.speed, pace.left_s)), refresh=True
        )

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        bar = _Bar(title, total)
        self._bars.append(bar)
        try:
            yield bar
        finally:
            self._bars.remove(bar)

    def close(self, facts: Facts | None, pace: Pace) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if facts is None:
            return
        campaign, rows = facts
        shown = rows if len(rows) <= FULL else [row for row in rows if row.state != "succeeded"]
        limit = FULL if len(shown) > FULL else None
        parts: list[Any] = [campaign_table(shown, self._console.width, limit)] if shown else []
        self._console.print(Group(*parts, summary(campaign, _counts(rows))))


class _LogLines:
    def __init__(self, stream: Any) -> None:
        self._lines = Lines(stream)
        self._states: dict[int, tuple[str, int]] | None = None
        self._summed: Facts | None = None
        self._summed_at = 0.0

    def show(self, facts: Facts, pace: Pace) -> None:
        campaign, rows = facts
        before, self._states = self._states, {row.id: (_standing(row), row.attempts) for row in rows}
        if before is not None:
            for row in rows:
                if before.get(row.id) != self._states[row.id]:
                    self._tell(row, before.get(row.id), len(rows) <= FEW)
        now = time.monotonic()
        if before is None or now - self._summed_at >= LOG_EVERY_S:
            self._summed, self._summed_at = facts, now
            self.note(summary(campaign, _counts(rows), pace.speed, pace.left_s).plain)

    def _tell(self, row: RunRow, before: tuple[str, int] | None, few: bool) -> None:
        line = _change(row, before[0] if before else None)
        if line and (few or row.state not in ("queued", "preparing", "publishing") or row.reason):
            self.note(line)

    def note(self, text: str) -> None:
        with suppress(BrokenPipeError):  # who read the log is gone, the campaign goes on
            self._lines.note(text)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        with self._lines.stage(title, total) as stage:
            yield stage

    def close(self, facts: Facts | None, pace: Pace) -> None:
        if facts is not None:
            if facts is not self._summed:  # the last line tells how it stands at the end
                self._summed_at = float("-inf")
            self.show(facts, pace)


def _standing(row: RunRow) -> str:
    """Its state; until a gang says from which step it goes on, it only starts."""
    return "starting" if row.state == "training" and row.phase == "starting" else row.state


def _change(row: RunRow, before: str | None) -> str | None:
    """The line of a log for a run that came into a state; `None` when there is nothing to tell."""
    if _standing(row) == "starting":
        return None
    tried = f", attempt {row.attempts}" if row.attempts > 1 else ""
    if row.state == "training":
        place = f" on {row.gang}" if row.gang else ""
        return f"{row.name}: training from step {row.step} of {row.steps}{place}{tried}"
    if row.state == "succeeded":
        losses = [(word, value) for word, value in (("loss", row.loss_subject), ("prior", row.loss_class))]
        told = "".join(f", {word} {value:.3f}" for word, value in losses if value is not None)
        taken = f" in {span(taken_by(row))}" if taken_by(row) is not None else ""
        return f"{row.name}: succeeded as {row.version}{taken}{told}"
    if row.state == "failed":
        do = " ".join(str((row.reason or {}).get("do") or "").split())
        return f"{row.name}: failed: {reason_line(row.reason)}" + (f". {do}" if do else "")
    if row.state == "queued":
        if before == "preparing" and not row.reason:
            return f"{row.name}: ready, waits for a gang{tried}"
        again = before is not None and before != "queued"
        return f"{row.name}: queued again{tried}: {reason_line(row.reason)}".rstrip(": ") if again else None
    return f"{row.name}: {row.state}{tried}"


def _counts(rows: Sequence[RunRow]) -> Counter[str]:
    return Counter(row.state for row in rows)
