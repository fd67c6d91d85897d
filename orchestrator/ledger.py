"""This file is where the record of campaigns is read and written: what is on it survives every process."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, delete, func, insert, select, update

from cluster.errors import UserError, did_you_mean
from cluster.owner import shown
from orchestrator import moves
from orchestrator.claims import Claim, clear, holder, take
from orchestrator.database import Database
from orchestrator.enrolment import enroll
from orchestrator.records import (
    CAMPAIGN_STATES,
    ENDED,
    Asked,
    CampaignRow,
    Change,
    Enrolled,
    Moment,
    NewRun,
    RunRow,
    Wish,
)
from orchestrator.tables import CAMPAIGNS, CLAIMS, HISTORY, RUNS, SPECS, WISHES

if TYPE_CHECKING:
    pass  # pyarrow, which reading the ledger does not need

_RUN = [RUNS.c[field.name] for field in fields(RunRow)]
_CAMPAIGN = [
    (CLAIMS if field.name in ("owner", "heartbeat_at") else CAMPAIGNS).c[field.name]
    for field in fields(CampaignRow)
]
_CHANGEABLE = {field.name for field in fields(CampaignRow)} - {"name", "storage_uri", "owner", "heartbeat_at"}


def ledger_uri(root: str, setting: str | None) -> str:
    """The URI of the ledger: the setting, else RAYBOOTH_LEDGER, else SQLite in the storage root.

    A remote root cannot hold a SQLite file, so there the file lies in the working folder.

    Args:
        root: The storage root, a folder or a URI; it need not be there.
        setting: What the user asked for.
    """
    is_local = "://" not in root or root.startswith("file://")
    folder = Path(root.removeprefix("file://")).expanduser().resolve() if is_local else Path.cwd()
    return setting or os.environ.get("RAYBOOTH_LEDGER") or f"sqlite:///{folder / 'campaigns.db'}"


class Ledger:
    """The record of all campaigns in a database, which threads and processes may use at once.

    Opening it brings the schema up to date.

    Args:
        uri: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`.

    Raises:
        UserError: The URI cannot be used, or a newer raybooth wrote the ledger.
        SystemFailure: The database does not answer; so does every method.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._database = Database(uri)

    @property
    def shown(self) -> str:
        """Where the ledger is, for people: without a password."""
        return self._database.shown

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def enroll(
        self, name: str, storage_uri: str, manifest: Mapping[str, Any], runs: Iterable[NewRun]
    ) -> Enrolled:
        """Put a campaign on record, or what is new in it, all or nothing.

        A run of another recipe than before is queued afresh, and one that cannot be used fails; the others keep what
        is on record of them, and take over a new tenant, priority or position. Runs that are no longer listed stay.

        Args:
            name: Of the campaign.
            storage_uri: Where everything of it lies.
            manifest: What is kept of it beside the runs.
            runs: In the manifest's order.

        Raises:
            UserError: The name is taken in another storage, a subject is listed twice, or a controller has the
                campaign at this moment.
        """
        listed = list(runs)
        with self._database.writing(name) as connection:
            now = self._database.now(connection)
            self._refuse_held(connection, name, "its subjects cannot be changed meanwhile")
            return enroll(connection, name, storage_uri, manifest, listed, now)

    def campaigns(self) -> list[CampaignRow]:
        """All campaigns, the newest last."""
        with self._database.reading() as connection:
            return self._campaigns(connection)

    def campaign(self, name: str) -> CampaignRow:
        """One campaign; raises UserError when there is none of that name."""
        with self._database.reading() as connection:
            self._known(connection, name)
            return self._campaigns(connection, name)[0]

    def runs(
        self, name: str, state: str | Collection[str] | None = None, most: int | None = None
    ) -> list[RunRow]:
        """The campaign's runs in the manifest's order: all, or those in one state or in several.

        Args:
            name: Of the campaign.
            state: One or several; `None` is all.
            most: How many; of more those that ended last, or that nobody has come to and that come first.
        """
        states = [state] if isinstance(state, str) else state
        wanted = select(*_RUN).where(RUNS.c.campaign == name).order_by(RUNS.c.position)
        if states is not None:
            wanted = wanted.where(RUNS.c.state.in_(states))
        if most is not None:
            lately = RUNS.c.finished_at.desc().nulls_last()
            wanted = wanted.order_by(None).order_by(lately, RUNS.c.position).limit(most)
        with self._database.reading() as connection:
            rows = [RunRow(*row) for row in connection.execute(wanted).all()]
        return rows if most is None else sorted(rows, key=lambda row: row.position)

    def spec(self, run_id: int) -> dict[str, Any]:
        """The recipe of a run; raises KeyError for one that has none, its row in the manifest being mistaken."""
        return self.specs([run_id])[run_id]

    def specs(self, run_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The recipes of many runs; one that has none is left out."""
        found: dict[int, dict[str, Any]] = {}
        with self._database.reading() as connection:
            for start in range(0, len(run_ids), moves.MOST_IDS):
                these = SPECS.c.run_id.in_(run_ids[start : start + moves.MOST_IDS])
                found |= {row.run_id: row.spec for row in connection.execute(select(SPECS).where(these))}
        return found

    def counts(self, name: str) -> dict[str, int]:
        """How many runs are in each state, only those with any."""
        counted = (
            select(RUNS.c.state, func.count().label("runs"))
            .where(RUNS.c.campaign == name)
            .group_by(RUNS.c.state)
        )
        with self._database.reading() as connection:
            return {row.state: row.runs for row in connection.execute(counted)}

    def history(self, run_id: int) -> list[Moment]:
        """The states that a run came into, the oldest first."""
        columns = [HISTORY.c[field.name] for field in fields(Moment)]
        wanted = select(*columns).where(HISTORY.c.run_id == run_id).order_by(HISTORY.c.id)
        with self._database.reading() as connection:
            return [Moment(*row) for row in connection.execute(wanted)]

    def claim(self, name: str, ttl_s: float = 30) -> Claim:
        """Be the campaign's one controller; use it with `with`.

        What was asked of a controller that was killed before it came to it is done here.

        Args:
            name: Of the campaign.
            ttl_s: After as many seconds without a word from this one, another may take the campaign.

        Raises:
            UserError: Another controller has it.
        """
        with self._database.reading() as connection:
            self._known(connection, name)
        return take(self._database, name, ttl_s)

    def holder(self, name: str) -> str | None:
        """The controller that has a campaign at this moment, for people; `None` when none has."""
        with self._database.reading() as connection:
            found = holder(connection, name, self._database.now(connection))
        return shown(found["owner"]) if found else None

    def record(self, claim: Claim, changes: Sequence[Change], **fields: Any) -> None:
        """Put changes of runs and fields of the campaign on record, all or none; a new state enters a run's history.

        Raises:
            ClaimLost: Another controller has the campaign; nothing was written.
        """
        if not fields.keys() <= _CHANGEABLE or fields.get("state", "queued") not in CAMPAIGN_STATES:
            raise ValueError(f"a campaign cannot have {fields}")
        with self._database.writing(claim.campaign) as connection:
            claim.fence(connection)
            moves.change(connection, claim.campaign, changes, self._database.now(connection))
            if fields:
                connection.execute(update(CAMPAIGNS).where(CAMPAIGNS.c.name == claim.campaign).values(fields))

    def record_campaign(self, claim: Claim, **fields: Any) -> None:
        """`record` without any run."""
        self.record(claim, [], **fields)

    def ask(self, name: str, wish: str, runs: Sequence[str] | None = None) -> Asked:
        """Ask that runs be cancelled, or with `None` the campaign: at once where no controller has it.

        Args:
            name: Of the campaign.
            wish: `cancel`.
            runs: Names; those that have ended are left out.

        Raises:
            UserError: There is no such campaign or run.
        """
        if wish != "cancel":
            raise ValueError(f"nobody sees to the wish {wish!r}")
        with self._database.writing(name) as connection:
            now = self._database.now(connection)
            unended = [row for row in self._named(connection, name, runs) if row.state not in ENDED]
            ids = None if runs is None else [row.id for row in unended]
            controller = holder(connection, name, now)
            if controller is None:
                clear(connection, name)  # should one be there after all, it learns of it
                moves.cancel(connection, name, ids, now)
            elif unended:
                self._wish(connection, name, wish, ids, now)
        return Asked([row.name for row in unended], shown(controller["owner"]) if controller else None)

    def wishes(self, claim: Claim) -> list[Wish]:
        """What was asked of this controller and is not done, the oldest first."""
        columns = [WISHES.c[field.name] for field in fields(Wish)]
        wanted = select(*columns).where(WISHES.c.campaign == claim.campaign).order_by(WISHES.c.id)
        with self._database.reading() as connection:
            return [Wish(*row) for row in connection.execute(wanted)]

    def done(self, claim: Claim, ids: Sequence[int]) -> None:
        """Wishes that were seen to; raises as `record`."""
        with self._database.writing(claim.campaign) as connection:
            claim.fence(connection)
            connection.execute(delete(WISHES).where(WISHES.c.id.in_(ids)))

    def requeue(self, name: str, runs: Sequence[str] | None = None) -> list[str]:
        """Queue failed and cancelled runs again, to go on from their last checkpoints.

        They are queued on record at once; a controller that has the campaign is told to look (`requeue`).

        Args:
            name: Of the campaign.
            runs: Names; `None` takes all that failed or were cancelled, but for mistaken rows of the manifest.

        Returns:
            Their names.

        Raises:
            UserError: A run has not failed, or its row in the manifest has a mistake.
        """
        with self._database.writing(name) as connection:
            now = self._database.now(connection)
            rows = self._named(connection, name, runs)
            again = [row for row in rows if row.state in ("failed", "cancelled") and row.has_spec]
            if runs is not None and len(again) < len(rows):
                others = [row for row in rows if row not in again]
                seen = ", ".join(
                    f"{row.name} {'is ' + row.state if row.has_spec else 'has no recipe'}" for row in others
                )
                raise UserError(
                    f"not all of these runs of {name} can be tried again",
                    seen,
                    "leave those out; correct a mistaken row in the manifest and run the campaign again",
                )
            ids = [row.id for row in again]
            moves.requeue(connection, name, ids, now)
            if ids and holder(connection, name, now):
                self._wish(connection, name, "requeue", ids, now)
            elif ids:
                queued = {"state": "queued", "reason": None, "finished_at": None}
                connection.execute(update(CAMPAIGNS).where(CAMPAIGNS.c.name == name).values(queued))
        return [row.name for row in again]

    def delete(self, name: str) -> None:
        """Forget a campaign; raises UserError when there is none, or while a controller has it."""
        with self._database.writing(name) as connection:
            self._known(connection, name)
            self._refuse_held(connection, name, "it cannot be forgotten meanwhile")
            connection.execute(delete(CAMPAIGNS).where(CAMPAIGNS.c.name == name))

    def _campaigns(self, connection: Connection, name: str | None = None) -> list[CampaignRow]:
        wanted = select(*_CAMPAIGN).select_from(CAMPAIGNS.join(CLAIMS))
        wanted = wanted.order_by(CAMPAIGNS.c.created_at, CAMPAIGNS.c.name)
        if name is not None:
            wanted = wanted.where(CAMPAIGNS.c.name == name)
        return [CampaignRow(*row) for row in connection.execute(wanted)]

    def _known(self, connection: Connection, name: str) -> None:
        names = set(connection.scalars(select(CAMPAIGNS.c.name)))
        if name not in names:
            do = did_you_mean(name, names) or "run one first: raybooth campaign run FILE"
            raise UserError(f"there is no campaign {name}", f"the ledger is {self.shown}", do)

    def _named(self, connection: Connection, name: str, runs: Sequence[str] | None) -> list[Any]:
        """Runs by their names, in the manifest's order; all when `None`."""
        self._known(connection, name)
        rows = moves.standing(connection, name)
        if runs is None:
            return list(rows)
        names = {row.name for row in rows}
        for run in runs:
            if run not in names:
                raise UserError(f"campaign {name} has no subject {run}", "", did_you_mean(run, names))
        wanted = set(runs)
        return [row for row in rows if row.name in wanted]

    def _refuse_held(self, connection: Connection, name: str, why: str) -> None:
        held = holder(connection, name, self._database.now(connection))
        if held:
            raise UserError(
                f"campaign {name} is being run: {why}",
                f"by {shown(held['owner'])}",
                f"wait for it, or end it: raybooth campaign cancel {name}",
            )

    def _wish(
        self, connection: Connection, name: str, wish: str, ids: Sequence[int] | None, now: float
    ) -> None:
        row = {"campaign": name, "wish": wish, "run_ids": None if ids is None else list(ids), "at": now}
        connection.execute(insert(WISHES), row)
