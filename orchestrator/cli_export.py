"""This file is where the commands that exchange artifacts with other programs read their options."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import UserError, did_you_mean
from orchestrator.cli_output import DebugOption, JsonOption, StorageOption, reporting, storage_root


def export(
    name: Annotated[
        str, typer.Argument(help="A subject, or one of its versions: NAME@v2.", metavar="NAME[@VERSION]")
    ],
    wanted: Annotated[
        str, typer.Option("--format", help="diffusers, single-file, kohya or comfy.")
    ] = "diffusers",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A folder; or a .safetensors file for all but diffusers.")
    ] = Path("export"),
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a LoRA as a whole pipeline, the base with it in it.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Extract a LoRA of this rank from whole weights.")
    ] = None,
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a subject as other programs read it. Nothing that is there is replaced.

    diffusers: a folder for `load_lora_weights` or `from_pretrained`. kohya: a LoRA file for kohya's scripts, ComfyUI
    and AUTOMATIC1111. single-file: a whole checkpoint for the same, with a LoRA merged into it. comfy: the LoRA file
    of a LoRA, else the checkpoint.

    Examples:

      raybooth export rex --format kohya --out loras/rex.safetensors

      raybooth export rex@v2 --format diffusers --merge --out rex-pipeline

      raybooth export tom --format comfy --rank 32 --out loras/
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage
        from orchestrator.export import FORMATS
        from orchestrator.export import export as write

        if wanted not in FORMATS:
            raise UserError(f"there is no format {wanted!r}", "", did_you_mean(wanted, FORMATS))
        subject, _, version = name.partition("@")
        done = write(Storage(storage_root(storage)), subject, version or None, wanted, out, merge, rank)
        output.result = asdict(done)
        output.say(
            f"{done.subject} {done.version} is in {done.path}; it is called {done.prompt!r} in a prompt"
        )
        if done.embedding is not None:
            output.say(f"its own tokens are in {done.embedding}, an embedding to be loaded beside it")
        if done.silent_velocity:
            output.say(
                "it predicts velocity, which a file of Stable Diffusion 1.x cannot say: tell who draws with it, "
                "ComfyUI by ModelSamplingDiscrete, AUTOMATIC1111 by a YAML beside it"
            )
        if done.error is not None and done.uncovered is not None:
            output.say(
                f"extracted at rank {done.rank}: {done.error:.1%} of the change of its layers is lost, and "
                f"{done.uncovered:.1%} of the whole change lies in parameters that a LoRA does not hold"
            )


def import_(
    file: Annotated[Path, typer.Argument(help="A LoRA in safetensors, of kohya's or diffusers' names.")],
    name: Annotated[str, typer.Option(help="Subject that gets it as a version.")],
    class_noun: Annotated[str, typer.Option("--class", help="The subject's class noun.", metavar="NOUN")],
    identifier: Annotated[str, typer.Option(help="The word that it was trained with.", metavar="WORD")],
    base: Annotated[
        str, typer.Option(help="What it was trained from: `pocket`, a folder or a hub id.")
    ] = "pocket",
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Register a LoRA of another program as a version, to be drawn and served like one that was trained here.

    Examples:

      raybooth import rex.safetensors --name rex --class dog --identifier ohwx
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage
        from orchestrator.importing import import_lora

        model, _, revision = base.partition("@")
        output.result = import_lora(
            Storage(storage_root(storage)), file, name, class_noun, identifier, model, revision or None
        )
        done = output.result
        before = "is there already as" if done["already"] else "is now"
        output.say(
            f"{file} {before} {name} {done['version']}: {done['layers']} layers of rank {done['rank']}"
        )
