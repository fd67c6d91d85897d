"""This file is where the commands that draw read their options."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import UserError
from orchestrator.cli_output import DebugOption, JsonOption, Output, StorageOption, reporting, storage_root

if TYPE_CHECKING:
    from cluster.storage import Storage
    from serving.credentials import Credentials

MAX_SEED = 2**63 - 1001  # torch takes 63 bits, and up to 1000 images count up from here


def generate(
    subject: Annotated[str, typer.Argument(help="NAME, NAME@VERSION or base.", metavar="NAME[@VERSION]")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; {subject} is the subject.", metavar="PROMPT...")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--num-images", min=1, max=1000, help="Images per prompt.")] = 4,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first image; the others count up.")
    ] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder that takes the PNGs.")] = Path("out"),
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="A text file, one prompt a line.", metavar="FILE")
    ] = None,
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
    eta: Annotated[float, typer.Option(min=0.0, max=1.0, help="Noise of DDIM: 0 none, 1 as DDPM.")] = 0.0,
    base: Annotated[
        str, typer.Option("--base", help="Base to draw with when the subject is `base`.")
    ] = "pocket",
    c2pa: Annotated[
        bool,
        typer.Option("--c2pa", help="Sign a C2PA manifest into each PNG; its bytes then carry the time."),
    ] = False,
    certificate: Annotated[
        Path | None,
        typer.Option(
            "--c2pa-certificate", help="The signer's chain in PEM; else one is made for development."
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--c2pa-key", help="The signer's private key in PEM, PKCS#8.")
    ] = None,
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw guided images of a trained subject as PNGs.

    Image i of a prompt depends on the prompt, the settings and SEED + i alone: not on -n, the path or the time.

    Examples:

      raybooth generate rex "a photo of {subject} on the beach"

      raybooth generate rex@v2 --prompts prompts.txt -n 8 --seed 7 --out out/ --json

      raybooth generate base "a photo of a dog"
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage
        from orchestrator.progress import open_stages
        from serving.generate import generate as draw
        from serving.provenance import Provenance
        from training.imports import forgo

        forgo()
        wanted = [*(prompts or []), *(read_lines(prompts_file, "prompts") if prompts_file else [])]
        if not wanted:
            raise UserError(
                "no prompt was given", "", 'add one, such as "a photo of {subject}", or --prompts FILE'
            )
        name, _, version = subject.partition("@")
        root = Storage(storage_root(storage))
        provenance = Provenance(credentials=_credentials(root, output, certificate, key) if c2pa else None)
        if not c2pa and (certificate or key):
            raise UserError("credentials were given, but nothing is signed", "", "add --c2pa")
        with open_stages().stage(f"drawing {subject}", len(wanted) * n) as stage:
            result = draw(
                root,
                name,
                version or None,
                wanted,
                n=n,
                seed=seed,
                negative_prompt=negative_prompt,
                steps=steps,
                guidance=guidance,
                sampler=sampler,
                eta=eta,
                out=out,
                base=base,
                on_images=stage.at,
                provenance=provenance,
            )
        output.result = {"images": [str(p) for p in result.images], "seeds": result.seeds}
        if result.grid:
            output.result["grid"] = str(result.grid)
        output.say(f"{len(result.images)} images in {out.absolute()}")
        if result.grid:
            output.say(f"  all of them: {result.grid}")


def _credentials(
    root: "Storage", output: Output, certificate: Path | None, key: Path | None
) -> "Credentials":
    """With what manifests are signed; says so when nobody vouches for it."""
    from serving.credentials import DEVELOPMENT, open_credentials

    credentials = open_credentials(root, certificate, key)
    if credentials.development:
        output.say(
            f"signed with a certificate made for development, which nobody trusts: {root.full(DEVELOPMENT)}"
        )
    return credentials


def read_lines(file: Path, what: str) -> list[str]:
    """The prompts or names of a text file: one a line, blank lines and `#` comments skipped."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the {what} file {file} cannot be read", str(error), "give a UTF-8 text file"
        ) from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder that takes the contact sheet.")] = Path(
        "demo-out"
    ),
    method: Annotated[str, typer.Option("--method", help="lora or full.")] = "full",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train the shipped subject and write a contact sheet: photos, class prior, before and after.

    Example:

      raybooth demo --out demo-out
    """
    with reporting(as_json, debug) as output:
        from orchestrator.demo import run_demo
        from orchestrator.progress import open_stages

        result = run_demo(out, method, open_stages())
        output.result = {"sheet": str(result.sheet), **result.outcome.as_json()}
        output.say(f"the contact sheet: {result.sheet}")
