"""This file is where people look at campaigns from outside: their standing, and what happened to a subject."""

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.errors import UserError, did_you_mean
from orchestrator.campaign_watch import CampaignWatch
from orchestrator.ledger import Ledger
from orchestrator.pace import span
from orchestrator.records import ENDED, CampaignRow, RunRow
from orchestrator.table import reasons, status_view

if TYPE_CHECKING:
    from cluster.storage import Storage

LOOK_S = 0.5  # how often the record is looked at while it is watched
ROWS = 100  # of a table that is printed; --json has all


def show_all(ledger: Ledger) -> dict[str, Any]:
    """Show all campaigns as a table; returns the same for `--json`."""
    table = Table(
        "campaign", "state", "subjects", "succeeded", "failed", "worker time", "controller", box=None
    )
    told: list[dict[str, Any]] = []
    for campaign in ledger.campaigns():
        counts = ledger.counts(campaign.name)
        told.append(_campaign(ledger, campaign, counts))
        table.add_row(
            campaign.name,
            campaign.state,
            str(sum(counts.values())),
            str(counts.get("succeeded", 0)),
            str(counts.get("failed", 0)),
            span(campaign.worker_seconds),
            ledger.holder(campaign.name) or "",
        )
    Console(stderr=True, highlight=False).print(table if told else "no campaign is on record")
    return {"campaigns": told}


def show_one(ledger: Ledger, name: str, watch: bool, as_json: bool) -> dict[str, Any]:
    """Show one campaign's runs; with `watch` until it has ended. Returns the same for `--json`, else its standing."""
    console = Console(stderr=True, highlight=False)
    if watch:
        _watch(ledger, name, console)
    campaign, counts = ledger.campaign(name), ledger.counts(name)
    # of 10,000 runs, reading all takes longer than the rest of the command
    parts = [ledger.runs(name)] if as_json else [ledger.runs(name, state, ROWS) for state in counts]
    found = {row.id: row for part in parts for row in part}  # one may change its state between two looks
    rows = sorted(found.values(), key=lambda row: row.position)
    told = reasons(rows, counts, ROWS) if watch else status_view(campaign, rows, counts, console.width, ROWS)
    console.print(told)
    standing = _campaign(ledger, campaign, counts)
    return {**standing, "subjects": [_run(row) for row in rows]} if as_json else standing


def _watch(ledger: Ledger, name: str, console: Console) -> None:
    """Show a campaign's runs until it has ended."""
    with CampaignWatch(console=console) as shown:
        while True:
            campaign, rows = ledger.campaign(name), ledger.runs(name)
            shown.show(campaign, rows)
            over = all(row.state in ENDED for row in rows) or campaign.state == "stopped"
            if over and not ledger.holder(name):
                return
            time.sleep(LOOK_S)


def print_logs(ledger: Ledger, storage: "Storage", name: str, subject: str | None, follow: bool) -> None:
    """Print a subject's states and the events of its run, oldest first, as JSON lines.

    Args:
        ledger: The record.
        storage: The campaign's root.
        name: Of the campaign.
        subject: Whose; `None` prints the states of all subjects.
        follow: Go on until it has ended.

    Raises:
        UserError: There is no such campaign or subject.
    """
    names = [row.name for row in ledger.runs(name)]
    if subject is not None and subject not in names:
        raise UserError(f"the campaign {name} has no subject {subject!r}", "", did_you_mean(subject, names))
    said: dict[int, int] = {}
    lines = 0
    while True:
        rows = [row for row in ledger.runs(name) if subject in (None, row.name)]
        for row in rows:
            moments = ledger.history(row.id)
            for moment in moments[said.get(row.id, 0) :]:
                told = {
                    "time": _iso(moment.at),
                    "subject": row.name,
                    "state": moment.state,
                    "phase": moment.phase,
                }
                print(
                    json.dumps(told | ({"reason": dict(moment.reason)} if moment.reason else {})), flush=True
                )
            said[row.id] = len(moments)
        if subject is not None:
            lines = _print_events(storage, rows[0], lines)
        stopped = ledger.campaign(name).state == "stopped" and not ledger.holder(name)
        if not follow or stopped or all(row.state in ENDED for row in rows):
            return
        time.sleep(LOOK_S)


def _print_events(storage: "Storage", row: RunRow, after: int) -> int:
    """Print the lines of a run's log but for the first `after`; returns how many there are."""
    path = f"runs/{row.name}/{row.version}/events.jsonl"
    if row.version is None or not storage.exists(path):
        return after
    lines = storage.read(path).decode(errors="replace").splitlines()
    for line in lines[after:]:
        print(line, flush=True)
    return max(after, len(lines))


def _campaign(ledger: Ledger, campaign: CampaignRow, counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "campaign": campaign.name,
        "state": campaign.state,
        "reason": dict(campaign.reason) if campaign.reason else None,
        "storage": campaign.storage_uri,
        "counts": dict(counts),
        "worker_seconds": round(campaign.worker_seconds, 1),
        "created": _iso(campaign.created_at),
        "finished": _iso(campaign.finished_at) if campaign.finished_at else None,
        "controller": ledger.holder(campaign.name),
    }


def _run(row: RunRow) -> dict[str, Any]:
    kept = (
        "name",
        "state",
        "phase",
        "step",
        "steps",
        "version",
        "artifact",
        "attempts",
        "gang",
        "rate",
        "prior_key",
    )
    losses = {"loss_subject": row.loss_subject, "loss_class": row.loss_class}
    return {
        **{key: getattr(row, key) for key in kept},
        **losses,
        "reason": dict(row.reason) if row.reason else None,
        "metrics": dict(row.metrics) if row.metrics else None,
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
