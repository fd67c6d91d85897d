"""This file is where a controller holds its campaign: one at a time, and one that has lost it stops."""

from collections.abc import Mapping
from contextlib import suppress
from threading import Event, Thread
from types import TracebackType
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, delete, select, update

from cluster.errors import SystemFailure, UserError
from cluster.owner import is_gone, shown, this_process
from orchestrator import moves
from orchestrator.database import Database
from orchestrator.tables import CLAIMS, WISHES


class ClaimLost(SystemFailure):
    """Another controller has the campaign now: whoever learns this stops, and records nothing more."""


class Claim:
    """A campaign that is held, made by `Ledger.claim`. As a context manager it renews itself and lets go in the end."""

    def __init__(self, database: Database, campaign: str, token: str, ttl_s: float) -> None:
        self.campaign = campaign
        self.token = token
        self._database = database
        self._ttl_s = ttl_s
        self._lost = Event()
        self._over = Event()
        self._thread: Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether a renewal found that another controller has it."""
        return self._lost.is_set()

    def renew(self) -> None:
        """Say that the controller lives; with `with`, a thread does.

        Raises:
            ClaimLost: Another controller has taken the campaign.
        """
        with self._database.writing(self.campaign) as connection:
            self.fence(connection)

    def fence(self, connection: Connection) -> None:
        """Renew inside a transaction, which may write what only the holder may; raises as `renew`."""
        now = self._database.now(connection)
        mine = (CLAIMS.c.campaign == self.campaign) & (CLAIMS.c.token == self.token)
        if connection.execute(update(CLAIMS).where(mine).values(heartbeat_at=now)).rowcount:
            return
        self._lost.set()
        other = _claimed(connection, self.campaign)
        raise ClaimLost(
            f"campaign {self.campaign} is no longer held by this controller",
            f"it was not heard of for {self._ttl_s:g} s, and {shown(other['owner'])} has taken it"
            if other and other["owner"]
            else "its claim was ended",
            f"watch the one that goes on: raybooth campaign status {self.campaign} --watch",
        )

    def release(self) -> None:
        """Let go of the campaign. What was asked and not seen to is done here; nothing if the claim is lost."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        with self._database.writing(self.campaign) as connection, suppress(ClaimLost):
            self.fence(connection)
            clear(connection, self.campaign)
            see_to_wishes(connection, self.campaign, self._database.now(connection))

    def __enter__(self) -> "Claim":
        self._thread = Thread(target=self._renew_on, name=f"claim-{self.campaign}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except SystemFailure:  # the database does not answer: the claim runs out by itself
            if error is None:
                raise

    def _renew_on(self) -> None:
        while not self._over.wait(self._ttl_s / 4) and not self.lost:
            # A database that does not answer may answer the next time; a lost claim is told by `lost`.
            with suppress(SystemFailure):
                self.renew()


def take(database: Database, campaign: str, ttl_s: float) -> Claim:
    """Hold a campaign that is on record.

    Raises:
        UserError: Another controller has it and was heard of lately. One of this machine that is gone has it no more.
    """
    claim = Claim(database, campaign, uuid4().hex, ttl_s)
    with database.writing(campaign) as connection:
        now = database.now(connection)
        other = holder(connection, campaign, now)
        if other:
            ago = max(now - other["heartbeat_at"], 0)
            raise UserError(
                f"campaign {campaign} is being run already",
                f"by {shown(other['owner'])}, heard of {ago:.0f} s ago",
                f"watch it: raybooth campaign status {campaign} --watch",
            )
        see_to_wishes(connection, campaign, now)
        held = {"token": claim.token, "owner": {**this_process(), "ttl_s": ttl_s}, "heartbeat_at": now}
        connection.execute(update(CLAIMS).where(CLAIMS.c.campaign == campaign).values(held))
    return claim


def holder(connection: Connection, campaign: str, now: float) -> Mapping[str, Any] | None:
    """The claim of the controller that has the campaign, as its row; `None` when there is none or it has ended."""
    found = _claimed(connection, campaign)
    if found is None or found["owner"] is None or is_gone(found["owner"]):
        return None
    # Either way: after the clock was set back, a heartbeat in the future would hold for as long.
    return found if abs(now - found["heartbeat_at"]) < found["owner"]["ttl_s"] else None


def clear(connection: Connection, campaign: str) -> None:
    """Nobody holds the campaign: one that believes it does finds out when it records."""
    gone = {"token": None, "owner": None, "heartbeat_at": None}
    connection.execute(update(CLAIMS).where(CLAIMS.c.campaign == campaign).values(gone))


def see_to_wishes(connection: Connection, campaign: str, now: float) -> None:
    """Do what was asked of a controller that ended before it came to it, so that no later one is surprised by it."""
    for row in connection.execute(
        select(WISHES).where(WISHES.c.campaign == campaign).order_by(WISHES.c.id)
    ).all():
        if row.wish == "cancel":
            moves.cancel(connection, campaign, row.run_ids, now)
    connection.execute(delete(WISHES).where(WISHES.c.campaign == campaign))


def _claimed(connection: Connection, campaign: str) -> Mapping[str, Any] | None:
    found = connection.execute(select(CLAIMS).where(CLAIMS.c.campaign == campaign)).mappings().one_or_none()
    return None if found is None else dict(found)
