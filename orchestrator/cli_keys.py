"""This file is where the commands over API keys read their options."""

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from orchestrator.cli_output import DebugOption, JsonOption, StorageOption, reporting, storage_root

if TYPE_CHECKING:
    from serving.keys import Keys

DAY_S = 24 * 3600.0

app = typer.Typer(help="Make, list, rotate and revoke the keys of the HTTP interface.", no_args_is_help=True)
KeyId = Annotated[str, typer.Argument(help="The key's id, such as rb_1a2b3c4d5e6f.", metavar="ID")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for, for people.", metavar="NAME")],
    tenant: Annotated[
        str, typer.Option(help="Whose it is: a tenant sees its own subjects alone.", metavar="TENANT")
    ] = "default",
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", help="images, trainings or admin; all of them when none is given."),
    ] = None,
    days: Annotated[
        float | None, typer.Option(help="Days that it is valid; for ever by default.", min=0)
    ] = None,
    per_minute: Annotated[
        float | None, typer.Option(help="Requests a minute, instead of the ingress's own.", min=0.01)
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Requests at a time, instead of the ingress's own.", min=1)
    ] = None,
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a key. Its token is printed once, and cannot be read again.

    Example:

      raybooth keys create shop --tenant acme --scope images --days 90
    """
    with reporting(as_json, debug) as output:
        from serving.keys import SCOPES

        expires_s = None if days is None else days * DAY_S
        key, token = _keys(storage).create(name, tenant, scopes or SCOPES, expires_s, per_minute, at_once)
        output.result = {**key.as_json(), "token": token}
        output.say(f"key {key.prefix} of {key.tenant}: {', '.join(key.scopes)}")
        output.say(f"its token, which is shown only now: {token}")


@app.command("list")
def list_keys(storage: StorageOption = "", as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the keys, without their tokens.

    Example:

      raybooth keys list
    """
    with reporting(as_json, debug) as output:
        found = _keys(storage).all()
        output.result = {"keys": [key.as_json() for key in found]}
        table = Table("id", "name", "tenant", "scopes", "created", "expires", "", box=None, pad_edge=False)
        for key in found:
            ends = _day(key.expires) if key.expires else ""
            state = "revoked" if key.revoked else ""
            table.add_row(
                key.prefix, key.name, key.tenant, " ".join(key.scopes), _day(key.created), ends, state
            )
        if found:
            output.console.print(table)
        else:
            output.say("there are no keys yet: raybooth keys create NAME")


@app.command()
def rotate(
    key: KeyId,
    hours: Annotated[float, typer.Option(help="Hours that the token before stays valid.", min=0)] = 24,
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Give a key a new token; the one before stays valid for a while.

    Example:

      raybooth keys rotate rb_1a2b3c4d5e6f --hours 1
    """
    with reporting(as_json, debug) as output:
        found, token = _keys(storage).rotate(key, hours * 3600)
        output.result = {**found.as_json(), "token": token}
        output.say(f"the new token of {found.prefix}, which is shown only now: {token}")


@app.command()
def revoke(
    key: KeyId, storage: StorageOption = "", as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Withdraw a key for good; seconds later it opens nothing.

    Example:

      raybooth keys revoke rb_1a2b3c4d5e6f
    """
    with reporting(as_json, debug) as output:
        found = _keys(storage).revoke(key)
        output.result = found.as_json()
        output.say(f"{found.prefix} is revoked")


def _keys(storage: str) -> "Keys":
    from cluster.storage import Storage
    from serving.keys import Keys

    return Keys(Storage(storage_root(storage)), time.time)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
