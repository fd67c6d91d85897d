"""This file is where the commands over prior sets read their options."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.errors import UserError
from orchestrator.cli_output import DebugOption, JsonOption, StorageOption, reporting, storage_root

app = typer.Typer(
    help="List the class-prior sets that subjects share, and look at one.", no_args_is_help=True
)


@app.command("list")
def list_sets(storage: StorageOption = "", as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the stored sets.

    Example:

      raybooth prior list
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage

        root = Storage(storage_root(storage))
        sets = {key: root.manifest(f"priors/{key}") for key in root.names("priors")}
        output.result = {"priors": [_summary(key, found) for key, found in sets.items() if found]}
        table = Table("key", "class", "images", "prompt", "sampler", "base", box=None, pad_edge=False)
        for row in output.result["priors"]:
            sampler = f"{row['sampler']} {row['steps']} steps, guidance {row['guidance']}"
            table.add_row(row["key"], row["class"], str(row["images"]), row["prompt"], sampler, row["base"])
        if output.result["priors"]:
            output.console.print(table)
        else:
            output.say("no class images were drawn here yet; train draws what it needs")


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="Key of the set, from `prior list`; its first digits will do.")],
    sheet: Annotated[
        Path | None, typer.Option(help="Write its images as one picture.", metavar="PNG")
    ] = None,
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a set was drawn with, and its images.

    Example:

      raybooth prior show 3f2a --sheet dogs.png
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage

        root = Storage(storage_root(storage))
        keys = [found for found in root.names("priors") if key and found.startswith(key)]
        manifest = root.manifest(f"priors/{keys[0]}") if len(keys) == 1 else None
        if manifest is None:
            seen = f"{len(keys)} keys begin with it" if keys else "no key begins with it"
            raise UserError(f"{key!r} names no single prior set", seen, "see raybooth prior list")
        output.result = {
            **_summary(keys[0], manifest),
            "spec": manifest["spec"],
            "shards": manifest["shards"],
        }
        for name, value in manifest["spec"].items():
            output.say(f"  {name}: {value}")
        if sheet:
            from training.png import decode_png, encode_png, grid
            from training.prior import prior_pngs

            images = [decode_png(png) for png in prior_pngs(root, keys[0], manifest["count"])]
            sheet.write_bytes(encode_png(grid(images, columns=8), None))
            output.result["sheet"] = str(sheet.absolute())
            output.say(f"{len(images)} images: {sheet.absolute()}")


def _summary(key: str, manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return {
        "key": key,
        "class": manifest["class"],
        "images": manifest["count"],
        "base": manifest["model"],
        **{name: spec[name] for name in ("prompt", "sampler", "steps", "guidance", "seed")},
    }
