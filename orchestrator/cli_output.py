"""This file is where results and errors reach people (stderr) and programs (the last line of stdout)."""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.errors import RayboothError, SystemFailure

INTERRUPTED = 130  # what a shell expects of a command ended by Ctrl-C

StorageOption = Annotated[
    str,
    typer.Option(
        "--storage", envvar="RAYBOOTH_STORAGE", help="Storage root: a folder or a URI.", metavar="URI"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Make the last line of stdout one JSON object.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DEFAULT_STORAGE = "./raybooth-data"


@dataclass
class Output:
    """What a command found out: `result` is printed as JSON when asked for."""

    as_json: bool
    result: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0
    """Of a command that did its work, and not all of it succeeded."""
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))

    def say(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, markup=False)


@contextmanager
def reporting(as_json: bool, debug: bool) -> Iterator[Output]:
    """Runs a command: prints its result, or its error in three parts, and exits with the contract's code."""
    output = Output(as_json)
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # DeepSpeed would tell the terminal that it found no GPU
    try:
        yield output
    except RayboothError as error:
        _fail(output, error, debug, error.exit_code)
    except KeyboardInterrupt:
        stopped = SystemFailure("interrupted", "", "run the same command again to go on")
        _fail(output, stopped, debug=False, code=INTERRUPTED)
    except (typer.Exit, typer.Abort, SystemExit):
        raise
    except Exception as error:
        said = [line for line in str(error).splitlines() if line.strip()] or [""]
        seen = f"{type(error).__name__}: {said[-1].strip()}"  # of a traceback in a message, the last line
        advice = "" if debug else "run again with --debug for the traceback, and report it"
        _fail(output, SystemFailure("something went wrong inside raybooth", seen, advice), debug, 1)
    else:
        if as_json:
            print(json.dumps(output.result, ensure_ascii=False), flush=True)
        if output.exit_code:
            raise typer.Exit(output.exit_code)


def _fail(output: Output, error: RayboothError, debug: bool, code: int) -> None:
    if debug:
        traceback.print_exc(file=sys.stderr)
    output.console.print("error: ", style="bold red", end="")
    output.say(error.what)
    if error.seen:
        output.say(f"  seen: {error.seen}")
    if error.do:
        output.say(f"  do:   {error.do}")
    if output.as_json:
        print(json.dumps({"state": error.state, "error": error.as_json()}, ensure_ascii=False), flush=True)
    sys.stderr.flush()
    raise typer.Exit(code)


def storage_root(option: str) -> str:
    """The storage root a command was given, or the default below the current folder."""
    return option or os.environ.get("RAYBOOTH_STORAGE") or DEFAULT_STORAGE
