"""This file is where a run's fields change on record, and its history with them. The transaction is the caller's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, update

from orchestrator.records import ENDED, RUN_STATES, Change, RunRow
from orchestrator.tables import CAMPAIGNS, HISTORY, RUNS, SPECS

MOST_IDS = 5000  # in one statement: PostgreSQL's protocol counts parameters with 16 bits
CHANGEABLE = frozenset(field.name for field in fields(RunRow)) - {"id", "position", "name"}
AFRESH: Mapping[str, Any] = {
    "state": "queued",
    "phase": None,
    "attempts": 0,
    "kills": 0,
    "smaller": 0,
    "reason": None,
    "gang": None,
    "rate": None,
    "finished_at": None,
}
"""A run that is tried anew, from where it is."""


def change(connection: Connection, campaign: str, changes: Sequence[Change], now: float) -> None:
    """Put changes on record in their order.

    Raises:
        ValueError: A field or a state that does not exist, or a run of another campaign.
    """
    ids = list(dict.fromkeys(change.run_id for change in changes))
    before = _before(connection, campaign, ids)
    _check(changes, before)
    after: dict[int, dict[str, Any]] = {run_id: {} for run_id in ids}
    moments: list[dict[str, Any]] = []
    for one in changes:
        merged = after[one.run_id]
        state = merged.get("state", before[one.run_id]["state"])
        merged |= {key: _storable(value) for key, value in one.fields.items()}
        if merged.get("state", state) != state:
            known = {**before[one.run_id], **merged}
            moments.append(moment(one.run_id, now, known))
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run_id, merged in after.items():
        if merged:
            alike.setdefault(tuple(sorted(merged)), []).append({**merged, "the_run": run_id})
    for rows in alike.values():
        connection.execute(update(RUNS).where(RUNS.c.id == bindparam("the_run")), rows)
    if moments:
        connection.execute(insert(HISTORY), moments)


def cancel(connection: Connection, campaign: str, run_ids: Sequence[int] | None, now: float) -> None:
    """Cancel runs that have not ended, there being no controller; all of them and the campaign if `None`."""
    reason = {
        "what": "cancelled",
        "seen": "",
        "do": f"queue it again with: raybooth campaign retry {campaign}",
        "kind": "cancelled",
    }
    unended = [row.id for row in standing(connection, campaign) if row.state not in ENDED]
    wanted = set(unended if run_ids is None else run_ids)
    ids = [run_id for run_id in unended if run_id in wanted]
    ended = {
        "state": "cancelled",
        "phase": None,
        "gang": None,
        "rate": None,
        "reason": reason,
        "finished_at": now,
    }
    change(connection, campaign, [Change(run_id, ended) for run_id in ids], now)
    if ids and len(ids) == len(unended):
        state = "cancelled" if run_ids is None else "failed"
        known = CAMPAIGNS.c.name == campaign
        connection.execute(update(CAMPAIGNS).where(known).values(state=state, finished_at=now))


def requeue(connection: Connection, campaign: str, run_ids: Sequence[int], now: float) -> None:
    """Queue runs again, from their last checkpoints and in the banks that they had."""
    change(connection, campaign, [Change(run_id, AFRESH) for run_id in run_ids], now)


def standing(connection: Connection, campaign: str) -> Sequence[Any]:
    """`id, name, state, has_spec` of every run, in the manifest's order."""
    known = select(RUNS.c.id, RUNS.c.name, RUNS.c.state, SPECS.c.run_id.is_not(None).label("has_spec"))
    known = known.select_from(RUNS.outerjoin(SPECS)).where(RUNS.c.campaign == campaign)
    return connection.execute(known.order_by(RUNS.c.position)).all()


def moment(run_id: int, at: float, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the history."""
    return {
        "run_id": run_id,
        "at": at,
        "state": row["state"],
        "phase": row["phase"],
        "attempt": row["attempts"],
        "reason": row["reason"],
    }


def _before(connection: Connection, campaign: str, ids: Sequence[int]) -> dict[int, Mapping[str, Any]]:
    """What a moment is made of, for those of the campaign."""
    columns = (RUNS.c.id, RUNS.c.campaign, RUNS.c.state, RUNS.c.phase, RUNS.c.attempts, RUNS.c.reason)
    found: dict[int, Mapping[str, Any]] = {}
    for start in range(0, len(ids), MOST_IDS):
        # asked for the campaign too, SQLite would read all of its runs by that index, every time
        rows = connection.execute(select(*columns).where(RUNS.c.id.in_(ids[start : start + MOST_IDS])))
        found |= {row["id"]: row for row in rows.mappings() if row["campaign"] == campaign}
    return found


def _check(changes: Sequence[Change], known: Mapping[int, Any]) -> None:
    for one in changes:
        if not one.fields.keys() <= CHANGEABLE:
            raise ValueError(f"a run has no {', '.join(sorted(one.fields.keys() - CHANGEABLE))} to change")
        if one.fields.get("state", "queued") not in RUN_STATES:
            raise ValueError(f"{one.fields['state']!r} is no state of a run")
        if one.run_id not in known:
            raise ValueError(f"the campaign has no run {one.run_id}")


def _storable(value: Any) -> Any:
    """SQLite would take NaN for NULL, and PostgreSQL would not: a figure that is no number is none anywhere."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
