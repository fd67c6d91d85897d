"""This file is where a database is opened for the ledger, brought to the schema this code knows, and spoken to."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from cluster.errors import SystemFailure, UserError
from orchestrator.tables import REVISION

BUSY_S = 30.0  # another process may be enrolling ten thousand runs
OUTAGE_S = 30.0  # a restart of PostgreSQL, or a change to its standby
_DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}


class Database:
    """SQLite or PostgreSQL, at the newest schema. Threads and processes may use it at once.

    Args:
        uri: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`.

    Raises:
        UserError: The URI cannot be used, or a newer raybooth wrote the database.
        SystemFailure: The database does not answer.
    """

    def __init__(self, uri: str) -> None:
        url = _checked(uri)
        self.shown = _shown(url)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._engine = _sqlite(url) if self.is_sqlite else _postgres(url, self.shown)
        self._writing = self._engine.execution_options(writes=True)
        self._patience_s = 0.0
        try:
            self._bring_up_to_date()
        except BaseException:
            self.close()
            raise
        self._patience_s = OUTAGE_S

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that writes nothing."""
        with _told(self.shown), self._begun(self._engine) as connection:
            yield connection

    @contextmanager
    def writing(self, name: str) -> Iterator[Connection]:
        """A transaction that has the word `name` (a campaign's) to itself until it ends."""
        with _told(self.shown), self._begun(self._writing) as connection:
            if not self.is_sqlite:  # which lets only one write at all
                number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
                connection.execute(select(func.pg_advisory_xact_lock(number)))
            yield connection

    @contextmanager
    def _begun(self, engine: Engine) -> Iterator[Connection]:
        """A transaction, as soon as the database answers. One that was begun is never repeated: it may be done."""
        patient_until = time.monotonic() + self._patience_s
        while True:
            try:
                connection = engine.connect()
                break
            except OperationalError:
                if time.monotonic() >= patient_until:
                    raise
                time.sleep(0.2)
        with connection, connection.begin():
            yield connection

    def now(self, connection: Connection) -> float:
        """Seconds since the epoch, by the one clock that all who use this database share."""
        if self.is_sqlite:
            return time.time()
        return float(connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def _bring_up_to_date(self) -> None:
        """Compare the revision, and migrate only if it is not ours: Alembic takes long to import."""
        with self.reading() as connection:
            if _revision(connection) == REVISION:
                return
        with self.writing("schema") as connection:
            found = _revision(connection)
            if found == REVISION:
                return  # another process was faster
            if not upgrade(connection):
                raise UserError(
                    f"the ledger {self.shown} was written by a newer raybooth",
                    f"its schema is {found}, this one knows up to {REVISION}",
                    "upgrade raybooth, or name another ledger",
                )


def upgrade(connection: Connection, revision: str = "head", migrations: Path | None = None) -> bool:
    """Take the schema to a revision, inside the connection's transaction.

    Args:
        connection: In a transaction.
        revision: One of ours.
        migrations: Folder of an Alembic environment; `None` is the one that raybooth has.

    Returns:
        Whether the schema that is there is known; if not, nothing was done.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(migrations or Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if _revision(connection) not in (None, *known):
        return False
    command.upgrade(config, revision)
    return True


def _revision(connection: Connection) -> str | None:
    """The revision of the schema that is there; `None` in an empty database."""
    if not connection.dialect.has_table(connection, "alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def _checked(uri: str) -> URL:
    """The URI with the driver that we use.

    Raises:
        UserError: It names no database that we know. A password in it is not repeated.
    """
    do = "write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError) as error:
        raise UserError("the ledger's URI cannot be read", "", do) from error
    driver = _DRIVERS.get(url.get_backend_name())
    if driver is None:
        raise UserError(f"the ledger cannot be in {url.get_backend_name()}", f"{_shown(url)}", do)
    if driver == "sqlite" and url.database in (None, "", ":memory:"):
        raise UserError("the ledger needs a file", f"{uri} is gone with its process", "write sqlite:///FILE")
    return url.set(drivername=driver)


def _shown(url: URL) -> str:
    """The URI for people: no password, wherever it is written."""
    secret = [key for key in url.query if "password" in key]
    return url.difference_update_query(secret).render_as_string(hide_password=True).replace("+psycopg", "")


def _postgres(url: URL, shown: str) -> Engine:
    try:
        return create_engine(url, pool_pre_ping=True)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the ledger {shown} needs a driver", str(error), "pip install 'raybooth[postgres]'"
        ) from error


def _sqlite(url: URL) -> Engine:
    """An engine on a SQLite file: readers do not wait for a writer, and writers wait for each other."""
    file = Path(str(url.database))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the ledger {file} cannot be made", str(error), "name another file") from error
    engine = create_engine(url, connect_args={"timeout": BUSY_S})

    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver would begin transactions where it sees fit
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    def begins(connection: Connection) -> None:
        # A write that begins as a read fails when another wrote meanwhile, however long it would wait.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begins)
    return engine


@contextmanager
def _told(shown: str) -> Iterator[None]:
    """Failures of the database as failures of ours."""
    try:
        yield
    except DBAPIError as error:
        seen = (
            str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
        )
        raise SystemFailure(
            f"the ledger {shown} cannot be used",
            seen,
            "see that the database answers, and run the same command again",
        ) from error
