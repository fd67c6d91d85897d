"""This file is where the command line starts; it imports neither torch nor Ray."""

import atexit
import gc
import json
import os
import sys
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from orchestrator.cli_batch import batch
from orchestrator.cli_campaign import app as campaign_app
from orchestrator.cli_deploy import app as services_app
from orchestrator.cli_deploy import deploy
from orchestrator.cli_draw import demo, generate
from orchestrator.cli_evaluate import evaluate
from orchestrator.cli_export import export, import_
from orchestrator.cli_inspect import inspect
from orchestrator.cli_jobs import app as jobs_app
from orchestrator.cli_keys import app as keys_app
from orchestrator.cli_prior import app as prior_app
from orchestrator.cli_serve import serve
from orchestrator.cli_subjects import app as subjects_app
from orchestrator.cli_submit import submit
from orchestrator.cli_train import doctor, plan, schema, train
from orchestrator.cli_tune import tune

app = typer.Typer(
    name="raybooth",
    help="Fine-tune a text-to-image model on many subjects on Ray, and draw guided images of each.\n\n"
    "Try it: [bold]raybooth demo[/bold]. Your own: [bold]raybooth train ./rex --class dog[/bold], then "
    '[bold]raybooth generate rex "a photo of {subject} on the beach"[/bold].',
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"raybooth {version('raybooth')}")
        raise typer.Exit()


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Holds the options that stand before a command."""


app.command()(train)
app.command()(generate)
app.command()(inspect)
app.command()(batch)
app.command()(export)
app.command("import")(import_)
app.command()(evaluate)
app.command()(tune)
app.command()(serve)
app.add_typer(campaign_app, name="campaign")
app.command()(submit)
app.add_typer(jobs_app, name="jobs")
app.command()(deploy)
app.add_typer(services_app, name="services")
app.add_typer(subjects_app, name="subjects")
app.add_typer(prior_app, name="prior")
app.add_typer(keys_app, name="keys")
app.command()(plan)
app.command()(schema)
app.command()(demo)
app.command()(doctor)


def main() -> None:
    """The console script. A wrong option is a user's mistake like any other: `--json` reports it too."""
    # most of what a command makes stays until its end: looking for garbage at Python's default pace, every 700
    # objects, takes a sixth of the time of `campaign status`, and 0.3 s of importing torch and Ray
    gc.set_threshold(50_000)
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer keeps its copy of click's exceptions to itself
            raise
        error.show()  # type: ignore[attr-defined]
        if "--json" in sys.argv:
            mistake = {"what": str(error), "seen": " ".join(sys.argv[1:]), "do": "see --help"}
            print(json.dumps({"state": "failed", "error": mistake}, ensure_ascii=False))
        code = 2
    _leave(code if isinstance(code, int) else 0)


def _leave(code: int) -> NoReturn:
    """End this process with a code.

    Python would first take its modules down, which takes half a second and, beside the threads that Ray, Arrow and
    torch have running, now and then ends a command that has done its work with a segmentation fault.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever reads it may be gone
            stream.flush()
    os._exit(code)
