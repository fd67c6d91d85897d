"""This file is where `raybooth evaluate` reads its options."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import UserError
from orchestrator.cli_campaign import LedgerOption
from orchestrator.cli_draw import MAX_SEED, read_lines
from orchestrator.cli_output import DebugOption, JsonOption, StorageOption, reporting, storage_root
from orchestrator.cli_train import Address

if TYPE_CHECKING:
    from cluster.storage import Storage
    from orchestrator.evaluation import Evaluated, Evaluation, Settings

SOME_FAILED = 3  # the exit code

Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        help="auto, object, live, pocket, or a text file with one a line; auto goes by class and base.",
        metavar="SET|FILE",
    ),
]
Dino = Annotated[
    str, typer.Option("--dino", help="Embedder of pictures: pocket, a folder or a hub id.", metavar="MODEL")
]
Clip = Annotated[
    str, typer.Option("--clip", help="CLIP that embeds pictures and words, likewise.", metavar="MODEL")
]


def evaluate(
    names: Annotated[
        list[str], typer.Argument(help="NAME, NAME@VERSION or a campaign.", metavar="NAME|CAMPAIGN...")
    ],
    prompts: Prompts = "auto",
    n: Annotated[int, typer.Option("-n", "--num-images", min=1, max=1000, help="Images per prompt.")] = 4,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first image; the others count up.")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 25,
    guidance: Annotated[
        float | None, typer.Option("--guidance-scale", "--guidance", min=1.0, help="Guidance scale.")
    ] = None,
    dino: Dino = "",
    clip: Clip = "",
    actors: Annotated[int | None, typer.Option(min=1, help="Drawing actors, as for `batch`.")] = None,
    storage: StorageOption = "",
    ledger: LedgerOption = "",
    address: Address = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score trained subjects: nearness to photos and prompts, what became of the class, copies of photos.

    Draws the paper's 25 prompts, and the class by the subject's weights and by the base. What was drawn before is not
    drawn again. Writes evaluation.json and a page with the pictures, and logs the scores to the run in MLflow.

    Examples:

      raybooth evaluate rex

      raybooth evaluate rex@v1 rex@v2 -n 2 --json

      raybooth evaluate my-campaign --prompts prompts.txt --clip openai/clip-vit-large-patch14
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage
        from orchestrator.evaluate import evaluate as score
        from orchestrator.progress import open_stages

        settings = read_settings(prompts, n, seed, steps, guidance, dino, clip)
        root = Storage(storage_root(storage))
        root.check_writable()
        chosen = choose(names, root, ledger)
        result = score(root, chosen, settings, open_stages(), address or None, actors)
        output.result = result.as_json(root)
        for line in told(result, root):
            output.say(line)
        output.exit_code = SOME_FAILED if result.failed else 0


def read_settings(
    prompts: str, n: int, seed: int, steps: int, guidance: float | None, dino: str, clip: str
) -> "Settings":
    """How to evaluate, as options say it."""
    from orchestrator.evaluation import Settings
    from orchestrator.protocol import SETS

    chosen: tuple[str, ...] | str = prompts
    if prompts not in ("auto", *SETS):
        if not Path(prompts).is_file():
            raise UserError(
                f"--prompts {prompts} is no set of prompts and no file",
                "",
                f"give auto, {', '.join(SETS)}, or a text file",
            )
        chosen = tuple(dict.fromkeys(read_lines(Path(prompts), "prompts")))
        if not chosen:
            raise UserError(f"{prompts} has no prompt", "", "write one a line")
    return Settings(chosen, n, seed, steps, guidance, dino=dino or None, clip=clip or None)


def choose(names: list[str], storage: "Storage", ledger: str) -> list[tuple[str, str]]:
    """The name and version of each subject that is named, or succeeded in a campaign that is.

    Raises:
        UserError: There is no such subject or campaign, or both are called so, or a campaign has none that succeeded.
    """
    from cluster.registry import Registry
    from orchestrator.ledger import Ledger, ledger_uri

    registry, found = Registry(storage), list[tuple[str, str]]()
    known = set(registry.names())
    with Ledger(ledger_uri(storage.uri, ledger or None)) as record:
        campaigns = {campaign.name for campaign in record.campaigns()}
        for word in names:
            name, _, version = word.partition("@")
            if name in known and (version or name not in campaigns):
                found.append((name, registry.resolve(name, version or None)[0]))
            elif name in known:
                raise UserError(
                    f"{name} is a subject and a campaign", "", f"say {name}@champion for the subject"
                )
            elif name in campaigns and not version:
                done = [(row.name, str(row.version)) for row in record.runs(name, "succeeded")]
                if not done:
                    raise UserError(f"no subject of the campaign {name} succeeded", "", "see its status")
                found += done
            else:
                registry.resolve(name, version or None)  # says what there is
    return list(dict.fromkeys(found))


def told(result: "Evaluated", storage: "Storage") -> list[str]:
    """What was found, for people."""
    lines = [
        line for one in result.done for line in _of(one, storage.full(result.pages[one.subject, one.version]))
    ]
    return [
        *lines,
        *(f"{name} {version} failed: {error}" for (name, version), error in result.failed.items()),
    ]


def _of(one: "Evaluation", page: str) -> list[str]:
    from orchestrator.evaluation_page import NAMES

    lines = [f"{one.subject} {one.version}, a {one.class_noun}"]
    scores = one.scores
    for key, found in scores.metrics.items():
        notes = []
        if key in scores.base:
            notes.append(f"untouched base {scores.base[key].value:.3f}")
        if key in scores.ceiling:
            notes.append(f"photos to each other {scores.ceiling[key].value:.3f}")
        if key == "pres" and scores.drift:
            notes.append(f"{scores.drift.value:+.3f} to the base's")
        within = f"({found.low:.3f} to {found.high:.3f})"
        lines.append(f"  {NAMES[key][0]:<7} {found.value:.3f}  {within}  {', '.join(notes)}".rstrip())
    return [*lines, f"  page: {page}"]
