"""The commands over keys print a token once, and what they made opens the door."""

import json
import time

import pytest
from typer.main import get_command

from cluster.storage import Storage
from orchestrator.cli import app
from serving.keys import Keys


@pytest.fixture
def command(storage: Storage, capsys: pytest.CaptureFixture[str]):
    def run(*words: str) -> dict:
        with_storage = [*words, "--json", "--storage", storage.uri]
        code = get_command(app).main(with_storage, standalone_mode=False)
        said = capsys.readouterr()
        return {**json.loads(said.out.splitlines()[-1]), "code": code, "told": said.err}

    return run


def test_a_key_is_made_listed_rotated_and_revoked(command, storage: Storage) -> None:
    made = command("keys", "create", "shop", "--tenant", "acme", "--scope", "images", "--days", "1")
    assert made["token"] in made["told"] and made["scopes"] == ["images"]
    [listed] = command("keys", "list")["keys"]
    assert listed["prefix"] == made["prefix"] and listed["expires"] > time.time() and "token" not in listed
    again = command("keys", "rotate", made["prefix"], "--hours", "0")
    keys = Keys(storage, time.time, hold_s=0)
    assert keys.opened_by(made["token"]) is None
    opened = keys.opened_by(again["token"])
    assert opened is not None and opened.tenant == "acme"
    assert command("keys", "revoke", made["prefix"])["revoked"]
    assert keys.opened_by(again["token"]) is None


def test_a_scope_that_there_is_not_is_a_users_mistake(command) -> None:
    answer = command("keys", "create", "x", "--scope", "image")
    assert answer["code"] == 2 and "did you mean images" in answer["error"]["do"]
