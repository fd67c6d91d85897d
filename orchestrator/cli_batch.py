"""This file is where `raybooth batch` reads its options."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import UserError
from orchestrator.cli_draw import MAX_SEED, read_lines
from orchestrator.cli_output import DebugOption, JsonOption, StorageOption, reporting, storage_root

if TYPE_CHECKING:
    from cluster.registry import Registry

SOME_FAILED = 3  # the exit code


def batch(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; {subject} is the subject.", metavar="PROMPT...")
    ] = None,
    subjects: Annotated[
        str,
        typer.Option(
            "--subjects",
            "-s",
            help="NAME[@VERSION],... or `all`, or a text file with one a line.",
            metavar="NAMES|all|FILE",
        ),
    ] = "",
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="A text file, one prompt a line.", metavar="FILE")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--num-images", min=1, max=1000, help="Images per prompt.")] = 4,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first image; the others count up.")
    ] = 0,
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder or URI that takes the images.", metavar="URI")
    ] = "batch",
    form: Annotated[
        str, typer.Option("--format", help="png: an object an image; parquet: many in one.")
    ] = "png",
    negative_prompt: Annotated[str, typer.Option("--negative-prompt", help="What should not be there.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 25,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance-scale", "--guidance", min=1.0, help="Guidance scale; 1 is without guidance."
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="ddim, ddpm, euler, euler-a, plms, dpm++2m, unipc or lcm; by default the base's own.",
            show_default=False,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            min=1, help="Drawing actors, each with the base loaded: as many as GPUs, or 1 without any."
        ),
    ] = None,
    storage: StorageOption = "",
    address: Annotated[
        str, typer.Option("--address", help="Ray cluster to join; else a private one is started.")
    ] = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw many subjects with many prompts, each image once.

    The same command again draws what is missing: nothing when all is there, the new ones when subjects or prompts
    were added. A subject that cannot be drawn does not stop the others (exit code 3). index.parquet lists the images.

    Examples:

      raybooth batch --subjects rex,tom@v2 --prompts prompts.txt -n 4 --out images/

      raybooth batch --subjects all "a photo of {subject}" --out s3://bucket/images --format parquet --json
    """
    with reporting(as_json, debug) as output:
        from cluster.registry import Registry
        from cluster.storage import Storage
        from orchestrator.batch import run_batch
        from orchestrator.progress import open_stages
        from orchestrator.wanted import Wanted

        wanted = [*(prompts or []), *(read_lines(prompts_file, "prompts") if prompts_file else [])]
        if not wanted:
            raise UserError(
                "no prompt was given", "", 'add one, such as "a photo of {subject}", or --prompts FILE'
            )
        root = Storage(storage_root(storage))
        chosen = choose_subjects(subjects, Registry(root))
        target = Storage(out)
        target.check_writable()
        settings = Wanted(tuple(wanted), n, seed, steps, guidance, sampler, negative_prompt)
        result = run_batch(root, target, chosen, settings, open_stages(), form, actors, address or None)
        output.result = {**result.as_json(), "out": target.uri}
        if result.index:
            output.result["index"] = target.full(result.index)
            output.result["sheets"] = [target.full(path) for path in result.sheets.values()]
        output.say(f"{result.drawn} images drawn, {result.there} were there: {target.uri}")
        for (name, version), error in result.failed.items():
            output.say(f"  {name} {version} failed: {error}")
        for path in result.sheets.values():
            output.say(f"  {target.full(path)}")
    if output.result.get("failed"):
        raise typer.Exit(SOME_FAILED)


def choose_subjects(text: str, registry: "Registry") -> list[tuple[str, str]]:
    """The name and version of each subject that `--subjects` means, each once.

    Raises:
        UserError: One of them is not registered, or none is named.
    """
    file = Path(text)
    lines = read_lines(file, "subjects") if text and file.is_file() else [text]
    words = [word.strip() for line in lines for word in line.split(",") if word.strip()]
    if not words:
        raise UserError("no subject was named", "", "give --subjects NAME,NAME@VERSION or --subjects all")
    if words == ["all"]:
        served = registry.served()
        if not served:
            raise UserError(
                "there is no subject to draw",
                f"{registry.storage.uri} has none that is served",
                "train one first: raybooth train DIR --class NOUN --name NAME",
            )
        return list(served.items())
    found = [(name, version) for name, _, version in (word.partition("@") for word in words)]
    return list(dict.fromkeys((name, registry.resolve(name, version or None)[0]) for name, version in found))
