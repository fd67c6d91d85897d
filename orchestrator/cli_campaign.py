"""This file is where the commands about campaigns read their options."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli_output import DebugOption, JsonOption, Output, StorageOption, reporting, storage_root
from orchestrator.cli_train import Address, BaseModel, RecipeOption, Sets, base_flags, with_recipe

if TYPE_CHECKING:
    from cluster.storage import Storage
    from orchestrator.ledger import Ledger
    from orchestrator.manifest import CampaignSpec

MOST_TOLD = 20  # reasons of failures; the report has all

app = typer.Typer(
    no_args_is_help=True, help="Train many subjects as one campaign, and see what becomes of each."
)

Manifest = Annotated[
    str,
    typer.Argument(
        help="campaign.yaml, a CSV or Parquet file, or a folder of folders of photos; a path or a URI.",
        metavar="MANIFEST",
    ),
]
Campaign = Annotated[str, typer.Argument(help="Name of the campaign.", metavar="NAME")]
Subjects = Annotated[
    list[str] | None, typer.Argument(help="Subjects; all when none is named.", metavar="SUBJECT...")
]
Name = Annotated[
    str, typer.Option("--name", help="Name of the campaign; the manifest's or its file's by default.")
]
ClassNoun = Annotated[
    str, typer.Option("--class", help="Class noun of subjects that give none.", metavar="NOUN")
]
LedgerOption = Annotated[
    str,
    typer.Option(
        "--ledger",
        envvar="RAYBOOTH_LEDGER",
        help="Database of the record: sqlite:///FILE or postgresql://...; by default a file in the storage root.",
        metavar="URI",
    ),
]
Watch = Annotated[
    bool, typer.Option("--watch/--no-watch", help="Show a live table where there is a terminal.")
]
Detach = Annotated[
    bool, typer.Option("--detach", "-d", help="Leave it running on the cluster, or in the background here.")
]


PartialOk = Annotated[
    bool,
    typer.Option(
        "--partial-ok",
        help="Exit with 0 although some subjects did not succeed: for what would only start it again.",
    ),
]


@contextmanager
def _record(storage: str, ledger: str) -> "Iterator[tuple[Storage, Ledger]]":
    from cluster.storage import Storage
    from orchestrator.ledger import Ledger, ledger_uri

    root = Storage(storage_root(storage))
    with Ledger(ledger_uri(root.uri, ledger or None)) as opened:
        yield root, opened


def _record_alone(storage: str, ledger: str) -> "Ledger":
    """The record without its storage, which takes longer to open."""
    from orchestrator.ledger import Ledger, ledger_uri

    return Ledger(ledger_uri(storage_root(storage), ledger or None))


def load(
    manifest: str,
    name: str,
    class_noun: str,
    base: str,
    sets: list[str] | None,
    recipe: str,
    storage: str,
) -> "CampaignSpec":
    """The campaign that a manifest and options describe."""
    from orchestrator.manifest import load_campaign

    flags = with_recipe(recipe, storage, base_flags(base))
    return load_campaign(manifest, name or None, class_noun or None, flags, sets or [])


@app.command("plan")
def plan(
    manifest: Manifest,
    name: Name = "",
    class_noun: ClassNoun = "",
    base: BaseModel = "",
    recipe: RecipeOption = "",
    sets: Sets = None,
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what `run` would do: subjects, prior sets, banks, steps. Photos are checked, nothing is started.

    Example:

      raybooth campaign plan campaign.yaml --storage s3://bucket/booth
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage
        from orchestrator.campaign_plan import plan_campaign
        from orchestrator.progress import open_stages

        spec = load(manifest, name, class_noun, base, sets, recipe, storage)
        with open_stages().stage("checking subjects", len(spec.rows)) as stage:
            planned = plan_campaign(spec, Storage(storage_root(storage)), on_subject=stage.advance)
        output.result = planned.as_json()
        for line in planned.lines():
            output.say(line)


@app.command("run")
def run(
    manifest: Manifest,
    name: Name = "",
    class_noun: ClassNoun = "",
    base: BaseModel = "",
    recipe: RecipeOption = "",
    sets: Sets = None,
    detach: Detach = False,
    watch: Watch = True,
    partial_ok: PartialOk = False,
    storage: StorageOption = "",
    ledger: LedgerOption = "",
    address: Address = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train every subject of a manifest. The same command again goes on; what has succeeded is not trained twice.

    A subject that fails does not stop the others (exit code 3). Subjects that were added or changed since are trained
    when the command is run again.

    Examples:

      raybooth campaign run campaign.yaml

      raybooth campaign run subjects.csv --class dog --set train.steps=300 --set schedule.gangs=2 --json

      raybooth campaign run s3://bucket/tonight.parquet --storage s3://bucket/booth --address ray://head:10001 --detach
    """
    with reporting(as_json, debug) as output:
        spec = load(manifest, name, class_noun, base, sets, recipe, storage)
        with _record(storage, ledger) as (root, record):
            from orchestrator.submission import enroll

            enrolled = enroll(spec, record, root)
            for text, names in (
                ("are new", enrolled.added),
                ("have changed and are trained anew", enrolled.changed),
                ("are no longer listed and left as they are", enrolled.dropped),
            ):
                if names:
                    output.say(f"{spec.name}: {len(names)} subjects {text}")
            _go(output, spec.name, record, root, address, detach, watch)
            output.exit_code = 0 if partial_ok and output.exit_code == 3 else output.exit_code


@app.command("resume")
def resume(
    campaign: Campaign,
    detach: Detach = False,
    watch: Watch = True,
    storage: StorageOption = "",
    ledger: LedgerOption = "",
    address: Address = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Go on with a campaign that was stopped, from what is on record of it.

    Example:

      raybooth campaign resume tonight
    """
    with reporting(as_json, debug) as output, _record(storage, ledger) as (root, record):
        _go(output, campaign, record, root, address, detach, watch)


@app.command("retry")
def retry(
    campaign: Campaign,
    subjects: Subjects = None,
    detach: Detach = False,
    watch: Watch = True,
    storage: StorageOption = "",
    ledger: LedgerOption = "",
    address: Address = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Queue subjects again that failed or were cancelled, and go on with the campaign.

    Example:

      raybooth campaign retry tonight rex tom
    """
    with reporting(as_json, debug) as output, _record(storage, ledger) as (root, record):
        names = record.requeue(campaign, subjects or None)
        output.say(f"{campaign}: queued again: {', '.join(names) or 'none'}")
        if holder := record.holder(campaign):
            output.say(f"{holder} goes on with them")
            output.result = {"campaign": campaign, "queued": names, "controller": holder}
            return
        _go(output, campaign, record, root, address, detach, watch)


def _go(
    output: Output, campaign: str, record: "Ledger", root: "Storage", address: str, detach: bool, watch: bool
) -> None:
    """Run a campaign that is on record, here or elsewhere."""
    if detach:
        from orchestrator.detached import detach as leave_running

        where = leave_running(campaign, record.uri, root, address or None)
        output.result = {"campaign": campaign, "state": "running", "controller": where}
        output.say(f"{campaign} runs on: {where}")
        output.say(f"  see it: raybooth campaign status {campaign} --watch")
        return
    import os

    from orchestrator.campaign import run_campaign
    from orchestrator.campaign_watch import CampaignWatch
    from training.imports import forgo

    forgo()
    stream = None if watch else open(os.devnull, "w")  # noqa: SIM115, PTH123
    with CampaignWatch(stream) as shown:
        outcome = run_campaign(campaign, record, root, address or None, shown)
    output.result = outcome.as_json()
    failed = [subject for subject in outcome.subjects if subject["state"] != "succeeded"]
    there = len(outcome.subjects) - len(failed)
    output.say(f"{campaign} {outcome.state}: {there} of {len(outcome.subjects)} subjects succeeded")
    for subject in failed[:MOST_TOLD]:
        reason = subject["reason"] or {}
        said = ". ".join(str(reason[part]) for part in ("what", "seen", "do") if reason.get(part))
        output.say(f"  {subject['name']} {subject['state']}: {said}")
    if len(failed) > MOST_TOLD:
        output.say(f"  and {len(failed) - MOST_TOLD} more: see the report")
    if outcome.gate:
        output.say(f"  gate: {outcome.gate['passed']} passed, {len(outcome.gate['held_back'])} held back")
        for held in outcome.gate["held_back"][:MOST_TOLD]:
            output.say(f"    {held['name']} {held['version']}: {'; '.join(held['objections'])}")
    output.say(f"  report: {outcome.report}")
    output.exit_code = outcome.exit_code


@app.command("status")
def status(
    campaign: Annotated[
        str, typer.Argument(help="A campaign; all are listed without one.", metavar="NAME")
    ] = "",
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on showing it until it has ended.")
    ] = False,
    storage: StorageOption = "",
    ledger: LedgerOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show where a campaign stands, or all campaigns.

    Examples:

      raybooth campaign status

      raybooth campaign status tonight --watch

      raybooth campaign status tonight --json
    """
    with reporting(as_json, debug) as output, _record_alone(storage, ledger) as record:
        from orchestrator.campaign_status import show_all, show_one

        output.result = show_one(record, campaign, watch, as_json) if campaign else show_all(record)


@app.command("logs")
def logs(
    campaign: Campaign,
    subject: Annotated[str, typer.Argument(help="A subject; the campaign's own history without one.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it has ended.")] = False,
    storage: StorageOption = "",
    ledger: LedgerOption = "",
    debug: DebugOption = False,
) -> None:
    """Print what happened to a subject: its states, and its events as JSON lines.

    Example:

      raybooth campaign logs tonight rex -f
    """
    with reporting(False, debug), _record(storage, ledger) as (root, record):
        from orchestrator.campaign_status import print_logs

        print_logs(record, root, campaign, subject or None, follow)


@app.command("cancel")
def cancel(
    campaign: Campaign,
    subjects: Subjects = None,
    storage: StorageOption = "",
    ledger: LedgerOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Cancel a campaign, or some of its subjects. Workers are free within seconds; `retry` goes on from checkpoints.

    Examples:

      raybooth campaign cancel tonight

      raybooth campaign cancel tonight rex
    """
    with reporting(as_json, debug) as output, _record_alone(storage, ledger) as record:
        asked = record.ask(campaign, "cancel", subjects or None)
        output.result = {"campaign": campaign, "cancelled": asked.names, "controller": asked.holder}
        by = f"{asked.holder} sees to it" if asked.holder else "done"
        output.say(f"{campaign}: {len(asked.names)} subjects are cancelled: {by}")
