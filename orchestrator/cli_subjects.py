"""This file is where the commands over registered subjects read their options."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli_output import DebugOption, JsonOption, StorageOption, reporting, storage_root

app = typer.Typer(
    help="List trained subjects, show one, choose which version is served.", no_args_is_help=True
)
SubjectName = Annotated[str, typer.Argument(help="Name of the subject.", metavar="NAME")]


@app.command("list")
def list_subjects(
    storage: StorageOption = "", as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """List the trained subjects.

    Example:

      raybooth subjects list --json
    """
    with reporting(as_json, debug) as output:
        from cluster.registry import Registry
        from cluster.storage import Storage

        registry = Registry(Storage(storage_root(storage)))
        shown = [registry.show(name) for name in registry.names()]
        output.result = {"subjects": shown}
        table = Table("subject", "class", "champion", "versions", "method", "base", box=None, pad_edge=False)
        for subject in shown:
            champion = subject["aliases"].get("champion", "")
            entry = subject["versions"].get(champion, {})
            cells = (entry.get(key, "") for key in ("method", "base"))
            table.add_row(
                subject["name"],
                entry.get("class", ""),
                champion,
                str(len(subject["versions"])),
                *map(str, cells),
            )
        if shown:
            output.console.print(table)
        else:
            output.say("no subject is trained here yet: raybooth train DIR --class NOUN")


@app.command()
def show(
    name: SubjectName, storage: StorageOption = "", as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Show a subject's versions.

    Example:

      raybooth subjects show rex
    """
    with reporting(as_json, debug) as output:
        from cluster.registry import Registry
        from cluster.storage import Storage

        root = Storage(storage_root(storage))
        subject = Registry(root).show(name)
        output.result = subject
        table = Table("version", "", "created", "method", "loss", "artifact", box=None, pad_edge=False)
        for version, entry in subject["versions"].items():
            aliases = " ".join(alias for alias, target in subject["aliases"].items() if target == version)
            loss = entry.get("metrics", {}).get("loss_subject")
            table.add_row(
                version,
                aliases,
                str(entry.get("created", "")),
                str(entry.get("method", "")),
                "" if loss is None else f"{loss:.4f}",
                root.full(entry["artifact"]),
            )
        output.console.print(table)


@app.command()
def promote(
    name: SubjectName,
    version: Annotated[str, typer.Argument(help="The version to serve, such as v2.", metavar="VERSION")],
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a version the champion: the one that is served.

    Example:

      raybooth subjects promote rex v2
    """
    with reporting(as_json, debug) as output:
        from cluster.registry import Registry
        from cluster.storage import Storage

        registry = Registry(Storage(storage_root(storage)))
        registry.promote(name, version)
        output.result = _mirrored(registry.show(name), output.say)
        output.say(f"{name}: {version} is champion")


@app.command()
def rollback(
    name: SubjectName, storage: StorageOption = "", as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Make the champion before this one champion again.

    Example:

      raybooth subjects rollback rex
    """
    with reporting(as_json, debug) as output:
        from cluster.registry import Registry
        from cluster.storage import Storage

        registry = Registry(Storage(storage_root(storage)))
        registry.rollback(name)
        output.result = _mirrored(registry.show(name), output.say)
        output.say(f"{name}: {output.result['aliases']['champion']} is champion again")


@app.command()
def delete(
    name: SubjectName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    storage: StorageOption = "",
    ledger: Annotated[
        str,
        typer.Option("--ledger", envvar="RAYBOOTH_LEDGER", help="Database of campaigns.", metavar="URI"),
    ] = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Delete a subject: photos, latents, checkpoints, artifacts, images, records. A receipt lists what went.

    Example:

      raybooth subjects delete rex --yes
    """
    with reporting(as_json, debug) as output:
        from dataclasses import asdict

        from cluster.storage import Storage
        from orchestrator.erasure import Erasure
        from orchestrator.ledger import ledger_uri

        root = Storage(storage_root(storage))
        if not yes:
            typer.confirm(f"Delete everything of {name}? It cannot be undone", abort=True, err=True)
        receipt = Erasure(root, ledger_uri(root.uri, ledger or None)).erase(name)
        output.result = asdict(receipt)
        for line in receipt.removed:
            output.say(f"removed {line}")
        for line in receipt.kept:
            output.say(f"kept: {line}")
        output.say(
            f"{name} is deleted, {receipt.files} files; receipt {root.full(f'receipts/{receipt.id}.json')}"
        )


def _mirrored(subject: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Moves MLflow's alias too, where the version was registered there; our own is moved already."""
    from orchestrator.mlflow_tracker import mirror_alias

    mlflow = subject["versions"][subject["aliases"]["champion"]]["mlflow"]
    if mlflow["version"]:
        try:
            mirror_alias(mlflow["uri"], subject["name"], mlflow["version"])
        except Exception as error:
            say(f"MLflow's alias could not be moved: {str(error).splitlines()[0]}")
    return subject
