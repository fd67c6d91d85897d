"""This file is where a manifest meets what is on record of its campaign. The transaction is the caller's."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from cluster.errors import UserError
from orchestrator.moves import AFRESH, MOST_IDS, moment
from orchestrator.records import Enrolled, NewRun
from orchestrator.tables import CAMPAIGNS, CLAIMS, HISTORY, RUNS, SPECS

_SPENT = ("worker_seconds", "cpu_seconds", "gpu_seconds")

_BLANK: Mapping[str, Any] = {
    **AFRESH,
    "step": 0,
    "version": None,
    "fingerprint": None,
    "prior_key": None,
    "group_no": None,
    "width": None,
    "metrics": None,
    "artifact": None,
    "mlflow_run_id": None,
    "prior_drawn": 0,
    "loss_subject": None,
    "loss_class": None,
    "started_at": None,
}
_FACTS = ("position", "class_noun", "tenant", "priority", "steps")  # may change without a run's starting anew


def enroll(
    connection: Connection,
    name: str,
    storage_uri: str,
    manifest: Mapping[str, Any],
    runs: Sequence[NewRun],
    now: float,
) -> Enrolled:
    """Put a campaign and its runs on record, or what is new about them; see `Ledger.enroll`."""
    twice = [run for run, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise UserError(
            f"campaign {name} lists subjects twice",
            ", ".join(twice[:20]),
            "give each subject one row and name",
        )
    is_new = _campaign(connection, name, storage_uri, manifest, now)
    before = _runs(connection, name)
    digests = {run.name: _digest(run) for run in runs}
    rows = {run.name: _row(run, position, digests[run.name], now) for position, run in enumerate(runs)}
    added = [run for run in rows if run not in before]
    changed = [run for run in rows if run in before and before[run].digest != digests[run]]
    kept = [run for run in rows if run in before and before[run].digest == digests[run]]
    dropped = [run for run in before if run not in rows]

    if added:
        connection.execute(insert(RUNS), [{**rows[run], "campaign": name} for run in added])
        before |= _runs(connection, name)
    ids = {run: before[run].id for run in before}
    _write(connection, [{**rows[run], "the_run": ids[run]} for run in changed])
    moved = [{fact: rows[run][fact] for fact in _FACTS} | {"the_run": ids[run]} for run in kept]
    have = [tuple(getattr(before[run], fact) for fact in _FACTS) for run in kept]
    _write(connection, [new for new, old in zip(moved, have, strict=True) if tuple(new.values())[:-1] != old])
    last = [{"position": len(rows) + i, "the_run": ids[run]} for i, run in enumerate(dropped)]
    _write(
        connection,
        [row for row, run in zip(last, dropped, strict=True) if before[run].position != row["position"]],
    )

    anew = {*added, *changed}
    fresh = [run for run in runs if run.name in anew]
    _specs(connection, {ids[run.name]: run.spec for run in fresh})
    if fresh:
        connection.execute(insert(HISTORY), [moment(ids[run.name], now, rows[run.name]) for run in fresh])
        if not is_new:
            again = {"state": "queued", "reason": None, "finished_at": None}
            connection.execute(update(CAMPAIGNS).where(CAMPAIGNS.c.name == name).values(again))
    return Enrolled(added, changed, kept, dropped)


def _campaign(
    connection: Connection, name: str, storage_uri: str, manifest: Mapping[str, Any], now: float
) -> bool:
    """The campaign's own row; returns whether it is new."""
    where = connection.execute(select(CAMPAIGNS.c.storage_uri).where(CAMPAIGNS.c.name == name)).scalar()
    if where is None:
        row = {"name": name, "storage_uri": storage_uri, "state": "queued", "manifest": manifest}
        connection.execute(insert(CAMPAIGNS), {**row, "created_at": now, **dict.fromkeys(_SPENT, 0.0)})
        connection.execute(insert(CLAIMS), {"campaign": name})
    elif where != storage_uri:
        raise UserError(
            f"there is a campaign {name} already, in another storage",
            f"it is in {where}, this one would be in {storage_uri}",
            f"give this one another name, or --storage {where}",
        )
    else:
        connection.execute(update(CAMPAIGNS).where(CAMPAIGNS.c.name == name).values(manifest=manifest))
    return where is None


def _runs(connection: Connection, name: str) -> dict[str, Any]:
    """What is on record, by name, in its order."""
    columns = (RUNS.c.id, RUNS.c.name, RUNS.c.digest, *(RUNS.c[fact] for fact in _FACTS))
    rows = connection.execute(select(*columns).where(RUNS.c.campaign == name).order_by(RUNS.c.position))
    return {row.name: row for row in rows}


def _row(run: NewRun, position: int, digest: str, now: float) -> dict[str, Any]:
    facts = {fact: position if fact == "position" else getattr(run, fact) for fact in _FACTS}
    failed = (
        {"state": "failed", "reason": dict(run.reason), "finished_at": now} if run.reason is not None else {}
    )
    return {**_BLANK, **facts, "name": run.name, "digest": digest, **failed}


def _digest(run: NewRun) -> str:
    """Of what the run is to be: the same for the same recipe, however its sections are ordered."""
    what = json.dumps([run.spec, run.reason], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def _write(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        connection.execute(update(RUNS).where(RUNS.c.id == bindparam("the_run")), rows)


def _specs(connection: Connection, specs: Mapping[int, Mapping[str, Any] | None]) -> None:
    ids = list(specs)
    for start in range(0, len(ids), MOST_IDS):
        connection.execute(delete(SPECS).where(SPECS.c.run_id.in_(ids[start : start + MOST_IDS])))
    there = [{"run_id": run_id, "spec": spec} for run_id, spec in specs.items() if spec is not None]
    if there:
        connection.execute(insert(SPECS), there)
