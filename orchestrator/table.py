"""This file is where the runs of a campaign are laid out as a table that fits a terminal."""

import heapq
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestrator.pace import left_of, span, taken_by
from orchestrator.records import CampaignRow, RunRow

COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("subject", "left"),
    ("phase", "left"),
    ("step", "left"),
    ("it/s", "right"),
    ("loss", "right"),
    ("prior", "right"),
    ("eta", "right"),
    ("gang", "left"),
    ("try", "right"),
    ("result", "left"),
)
_BY_NEED = ("prior", "it/s", "eta", "gang", "try")
BAR = 8  # cells
NAME_LEAST, NAME_MOST, PHASE_MOST, RESULT_LEAST = 12, 28, 16, 12
STYLES = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "bright_black",
    "training": "cyan",
    "publishing": "magenta",
    "preparing": "yellow",
    "queued": "bright_black",
}
_RANK = {
    "training": 0,
    "publishing": 1,
    "preparing": 2,
    "failed": 3,
    "succeeded": 4,
    "queued": 5,
    "cancelled": 6,
}


def campaign_table(rows: Sequence[RunRow], width: int = 100, limit: int | None = None) -> Table:
    """The table of the runs: who works comes first, then who failed and who succeeded lately, then who waits.

    Args:
        rows: Runs of the campaign.
        width: Columns of the terminal; the figures need about 80.
        limit: Rows at most; `None` shows all, in the manifest's order.
    """
    chosen = rows if limit is None else heapq.nsmallest(limit, rows, key=_interest)
    lines = [_cells(row) for row in chosen]
    heads = [name for name, _ in COLUMNS]
    used = [
        i for i, name in enumerate(heads) if name not in _BY_NEED or any(line[i].cell_len for line in lines)
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, wide in zip(used, _widths(lines, used, width), strict=True):
        justify = COLUMNS[i][1]
        table.add_column(heads[i], width=wide, no_wrap=True, overflow="ellipsis", justify=justify)
    for line in lines:
        table.add_row(*(line[i] for i in used))
    return table


def _widths(lines: Sequence[Sequence[Text]], used: Sequence[int], width: int) -> list[int]:
    """Every column as wide as its widest cell, but for the last, which takes what is left; a name gives way to it."""
    wide = [max([len(COLUMNS[i][0]), *(line[i].cell_len for line in lines)]) for i in used]
    wide[0], wide[1] = min(wide[0], NAME_MOST), min(wide[1], PHASE_MOST)
    room = width - sum(wide[:-1]) - len(wide)
    if room < RESULT_LEAST:
        wide[0] = max(wide[0] - (RESULT_LEAST - room), NAME_LEAST)
        room = RESULT_LEAST
    return [*wide[:-1], min(wide[-1], room)]


def _interest(row: RunRow) -> tuple[int, float]:
    """What sorts before is shown before."""
    lately = row.state in ("failed", "succeeded")
    return (_RANK[row.state], -(row.finished_at or 0.0) if lately else float(row.position))


def _cells(row: RunRow) -> list[Text]:
    style = STYLES[row.state]
    working = row.state in ("training", "publishing")
    return [
        Text(row.name),
        Text(row.state if row.phase is None else row.phase, style),
        _bar(row, style) if working else _stood(row),
        Text(f"{row.rate:.1f}" if row.state == "training" and row.rate else ""),
        Text(_loss(row.loss_subject)),
        Text(_loss(row.loss_class)),
        Text(_short(left_of(row))),
        Text(row.gang or "" if working else ""),
        Text(str(row.attempts) if row.attempts > 1 else "", "yellow"),
        _result(row, style),
    ]


def _bar(row: RunRow, style: str) -> Text:
    filled = round(BAR * min(row.step / row.steps, 1.0)) if row.steps else BAR
    bar = Text("━" * filled, style)
    bar.append("─" * (BAR - filled), "bright_black")
    return bar.append(f" {row.step}/{row.steps}", "default")


def _stood(row: RunRow) -> Text:
    """Where a run stands that nobody works on."""
    return Text(f"{row.step}/{row.steps}" if 0 < row.step < row.steps else "")


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _short(seconds: float | None) -> str:
    return span(seconds).removesuffix(" min")


def _result(row: RunRow, style: str) -> Text:
    if row.state == "succeeded":
        return Text(" in ".join(part for part in (row.version or "", _short(taken_by(row))) if part), style)
    return Text(reason_line(row.reason), style) if row.reason else Text("")


def reason_line(reason: Mapping[str, Any] | None) -> str:
    """What happened and what was seen, in one line."""
    said = [" ".join(str((reason or {}).get(part) or "").split()) for part in ("what", "seen")]
    return ": ".join(part for part in said if part)


def failure_lines(rows: Sequence[RunRow], most: int) -> list[Text]:
    """A line for each of the last failures, with its reason; the table's cells are too short for them."""
    failed = [row for row in rows if row.state == "failed"]
    lines = []
    for row in heapq.nsmallest(most, failed, key=_interest):
        line = Text.assemble((f"{row.name}: ", "bold red"), reason_line(row.reason), no_wrap=True)
        line.overflow = "ellipsis"
        lines.append(line)
    if len(failed) > most:
        lines.append(Text(f"and {len(failed) - most} more failed", "red"))
    return lines


def summary(
    campaign: CampaignRow, counts: Mapping[str, int], speed: float | None = None, left_s: float | None = None
) -> Text:
    """One line: how many runs are where, how fast they come on, and how long it takes.

    Args:
        campaign: What is on record of it.
        counts: How many of its runs are in each state.
        speed: Steps per second of all runs together; `None` when it is not known.
        left_s: Seconds until the last step; `None` when that is not known.
    """
    told = [Text(f"{counts.get('succeeded', 0)} of {sum(counts.values())} succeeded", STYLES["succeeded"])]
    others = [state for state in _RANK if state != "succeeded" and counts.get(state)]
    told += [Text(f"{counts[state]} {state}", STYLES[state]) for state in others]
    line = Text.assemble((f"{campaign.name}: ", "bold"), Text(", ").join(told))
    taken = (campaign.finished_at or time.time()) - campaign.created_at
    rest = [f"{speed:.1f} steps/s"] if speed else []
    rest += [span(taken), *([f"eta {span(left_s)}"] if left_s is not None else [])]
    return line.append(f"; {'; '.join(rest)}", "default")


def reasons(rows: Sequence[RunRow], counts: Mapping[str, int], limit: int) -> Group:
    """Of every failed run what happened, what was seen and what to do.

    Args:
        rows: Runs of the campaign, the failed ones among them.
        counts: How many of all of its runs are in each state.
        limit: Runs at most.
    """
    failed = [row for row in rows if row.state == "failed"][:limit]
    lines = []
    for row in failed:
        do = (row.reason or {}).get("do")
        lines.append(Text.assemble((f"{row.name}: ", "bold red"), reason_line(row.reason)))
        lines += [Text(f"  do: {do}")] if do else []
    if (more := counts.get("failed", 0) - len(failed)) > 0:
        lines.append(Text(f"and {more} more failed", "red"))
    return Group(*lines)


def status_view(
    campaign: CampaignRow, rows: Sequence[RunRow], counts: Mapping[str, int], width: int, limit: int
) -> Group:
    """How a campaign stands, for once: the table, the reasons of failures in full, and the counts.

    Args:
        campaign: What is on record of it.
        rows: Its runs; of more than `limit` in a state some of them will do.
        counts: How many of all are in each state.
        width: Columns of the terminal.
        limit: Rows at most.
    """
    few = len(rows) <= limit
    table = [campaign_table(rows, width, None if few else limit)] if rows else []
    return Group(*table, reasons(rows, counts, limit), summary(campaign, counts))
