"""This file is where the command that asks pictures where they come from reads its options."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import UserError
from orchestrator.cli_output import DebugOption, JsonOption, Output, reporting


def inspect(
    files: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WebP.", metavar="FILE...")],
    trust: Annotated[
        Path | None,
        typer.Option(
            "--trust", help="Certificates in PEM that you trust to vouch for signers.", metavar="FILE"
        ),
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            "--storage", help="Look the watermark up among the subjects of this root.", metavar="URI"
        ),
    ] = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what pictures say of themselves: parameters, watermark, C2PA manifest.

    Examples:

      raybooth inspect out/rex-v1-a-photo-of-subject-s0.png

      raybooth inspect found.jpg --storage ./raybooth-data --json
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage
        from serving.inspection import artifacts_with, inspect_picture

        anchors = _read(trust).decode("utf-8", "replace") if trust else ""
        root = Storage(storage) if storage else None
        output.result["files"] = found = []
        for file in files:
            seen = inspect_picture(_read(file), str(file), anchors).as_json()
            mark = seen["watermark"]
            if root and mark:
                seen["artifacts"] = artifacts_with(root, mark["tag"])
            found.append({"file": str(file.absolute()), **seen})
            _tell(output, file, seen)


def _tell(output: Output, file: Path, seen: dict[str, Any]) -> None:
    """A few lines for people."""
    output.say(f"{file}: {seen['format']}, {seen['width']} x {seen['height']}")
    for key, value in (seen["parameters"] or {"parameters": "none"}).items():
        output.say(f"  {key}: {value if value != '' else '-'}")
    mark = seen["watermark"]
    if mark:
        agrees = {True: ", as the parameters say", False: ", NOT what the parameters say", None: ""}
        output.say(f"  mark in the picture: raybooth {mark['tag']}{agrees[seen['agrees']]}")
    else:
        output.say("  mark in the picture: none that can be read")
    if "artifacts" in seen:
        output.say(f"  drawn by: {', '.join(seen['artifacts']) or 'no subject of this root'}")
    manifest = seen["c2pa"]
    if manifest is None:
        output.say("  C2PA: none")
        return
    output.say(f"  C2PA: {manifest['state']} {', '.join(manifest['problems'])}".rstrip())
    if manifest.get("signed_by"):
        output.say(f"    signed by {manifest['signed_by']} ({manifest['organisation']})")
        output.say(f"    {manifest['generator']}, {manifest['source_type']}")
        output.say(f"    facts: {manifest['facts']}")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read", str(error)) from error
