"""This file is where the commands that train, and say what training would do, read their options."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli_output import DebugOption, JsonOption, StorageOption, reporting, storage_root

if TYPE_CHECKING:
    from training.recipe import Run

Images = Annotated[
    list[str] | None,
    typer.Argument(help="A folder of photos, photo files, or one run.yaml.", metavar="DIR|FILE..."),
]
ClassNoun = Annotated[
    str, typer.Option("--class", help="The subject's class noun, such as dog.", metavar="NOUN")
]
Name = Annotated[str, typer.Option("--name", help="Name of the subject; the folder's name by default.")]
BaseModel = Annotated[
    str, typer.Option("--base", help="pocket, a folder in diffusers layout, or HUB_ID\\[@REV].")
]
Method = Annotated[str, typer.Option("--method", help="lora or full.")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="A run.yaml; flags go before it.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, such as train.steps=150; repeatable.", metavar="K=V"),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", help="A recipe that a study found: its name, or a YAML file.", metavar="NAME|FILE"
    ),
]
MinWorkers = Annotated[
    int | None,
    typer.Option(
        "--min-workers",
        help="Start with as few workers, and go on with them, while there is no room for all.",
        min=1,
    ),
]
NewVersion = Annotated[
    bool, typer.Option("--new-version", help="Train again although this very version is there.")
]
Address = Annotated[
    str,
    typer.Option(
        "--address", envvar="RAY_ADDRESS", help="Ray cluster to join; none starts a private local one."
    ),
]

DEFAULT_BASE = "pocket"  # the one in the box, whatever folder of that name lies here


def _spec(
    images: list[str] | None,
    class_noun: str,
    name: str,
    base: str,
    method: str,
    config: Path | None,
    sets: list[str] | None,
    min_workers: int | None,
    recipe: str,
    storage: str,
) -> "Run":
    """The run that the options describe; a single YAML in the place of photos is a `--config`."""
    from orchestrator.spec import load_run

    if config is None and images and len(images) == 1 and images[0].endswith((".yaml", ".yml")):
        config, images = Path(images[0]), None
    flags = _flags(images, class_noun, name, base, method, config)
    if min_workers is not None:
        flags["cluster"] = {"min_workers": min_workers}
    flags = with_recipe(recipe, storage, flags)
    return load_run(config, flags, sets or [])


def with_recipe(recipe: str, storage: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Flags laid over the recipe that `--recipe` names; empty names none."""
    if not recipe:
        return flags
    from orchestrator.recipes import read_recipe
    from training.section import merge

    return merge(read_recipe(recipe, storage_root(storage)), flags)


def _flags(
    images: list[str] | None, class_noun: str, name: str, base: str, method: str, config: Path | None
) -> dict[str, Any]:
    """The options as a nested spec; only what was given."""
    subject: dict[str, Any] = {}
    if images:
        subject["images"] = list(images)
    if class_noun:
        subject["class"] = class_noun
    if name:
        subject["name"] = name
    if images and config is None:
        subject = {**_told_by_folder(images), **subject}
    flags: dict[str, Any] = {"subject": subject} if subject else {}
    flags |= base_flags(base)
    if method:
        flags["train"] = {"method": method}
    return flags


def base_flags(base: str) -> dict[str, Any]:
    """The option `--base` as a nested spec; empty when it was not given."""
    if not base:
        return {}
    # workers have another working folder than the one a path was typed in
    folder = Path(base).expanduser()
    is_folder = folder.exists() and base != DEFAULT_BASE
    model, _, revision = (str(folder.resolve()), "", "") if is_folder else base.partition("@")
    return {"base": {"model": model, **({"revision": revision} if revision else {})}}


def _told_by_folder(images: list[str]) -> dict[str, str]:
    """What the name of a folder of photos, or of that of the first photo, says of the subject."""
    from orchestrator.folders import subject_in

    first = Path(images[0]).expanduser().absolute()
    told = subject_in(first.name if first.is_dir() or not first.suffix else first.parent.name)
    return {**told, "name": told["name"] or "subject"}


def train(
    images: Images = None,
    class_noun: ClassNoun = "",
    name: Name = "",
    base: BaseModel = "",
    method: Method = "",
    config: Config = None,
    recipe: RecipeOption = "",
    sets: Sets = None,
    min_workers: MinWorkers = None,
    new_version: NewVersion = False,
    storage: StorageOption = "",
    address: Address = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train one subject from 3-5 photos.

    The same command again goes on after a crash, and does nothing after success.

    Examples:

      raybooth train ./rex --class dog

      raybooth train a.jpg b.jpg c.jpg --class teapot --name pot --method full --set train.steps=400

      raybooth train run.yaml --storage s3://bucket/booth --json

      raybooth train ./rex --class dog --recipe my-study
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage

        run = _spec(images, class_noun, name, base, method, config, sets, min_workers, recipe, storage)
        root = Storage(storage_root(storage))
        from orchestrator.progress import open_stages
        from orchestrator.train import train_subject
        from training.imports import forgo

        forgo()
        outcome = train_subject(run, root, open_stages(), address or None, new_version)
        output.result = outcome.as_json()
        if outcome.already_there:
            output.say(
                f"{outcome.subject} {outcome.version} is trained already: nothing to do (--new-version trains)"
            )
        else:
            output.say(f"{outcome.subject} {outcome.version} is ready in {outcome.seconds:.0f} s")
        output.say(f"  artifact: {outcome.artifact}")
        output.say(f'  draw it:  raybooth generate {outcome.subject} "a photo of {{subject}}"')


def plan(
    images: Images = None,
    class_noun: ClassNoun = "",
    name: Name = "",
    base: BaseModel = "",
    method: Method = "",
    config: Config = None,
    recipe: RecipeOption = "",
    sets: Sets = None,
    min_workers: MinWorkers = None,
    new_version: NewVersion = False,
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what `train` would do - stages, steps, what is cached, sizes - without starting Ray.

    Examples:

      raybooth plan ./rex --class dog --set train.steps=400

      raybooth plan run.yaml --json
    """
    with reporting(as_json, debug) as output:
        from cluster.machine import sees_gpu
        from cluster.storage import Storage
        from orchestrator.plan import plan_run

        run = _spec(images, class_noun, name, base, method, config, sets, min_workers, recipe, storage)
        device = "cuda" if sees_gpu() and run.cluster.gpus_per_worker != 0 else "cpu"
        planned = plan_run(run, Storage(storage_root(storage)), new_version, device)
        output.result = planned.as_json()
        for line in planned.lines():
            output.say(line)


def schema(
    campaign: Annotated[bool, typer.Option("--campaign", help="Of campaign.yaml instead.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Of serve.yaml instead.")] = False,
) -> None:
    """Print the JSON Schema of run.yaml, campaign.yaml or serve.yaml, for editors.

    Examples:

      raybooth schema > run.schema.json

      raybooth schema --campaign > campaign.schema.json

      raybooth schema --serve > serve.schema.json
    """
    import json

    if serve:
        from orchestrator.service import ServiceSpec

        print(json.dumps(ServiceSpec.model_json_schema(), indent=2))
        return
    from orchestrator.campaign_settings import campaign_schema
    from orchestrator.spec import run_schema

    print(json.dumps(campaign_schema() if campaign else run_schema(), indent=2))


def doctor(
    base: Annotated[str, typer.Option("--base", help="The base to look at.")] = "pocket",
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Also start a private Ray.")] = True,
    storage: StorageOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Examine this machine: versions, memory, storage, base, Ray.

    Example:

      raybooth doctor --storage ./raybooth-data
    """
    with reporting(as_json, debug) as output:
        from cluster.errors import UserError
        from orchestrator.doctor import examine

        findings = []
        for finding in examine(storage_root(storage), base, ray):
            findings.append(finding)
            output.say(f"{'ok  ' if finding.ok else 'BAD '} {finding.name:<10} {finding.seen}")
        output.result = {"findings": [finding.as_json() for finding in findings]}
        bad = [finding for finding in findings if not finding.ok]
        if bad:
            seen = "; ".join(f"{finding.name}: {finding.seen}" for finding in bad)
            raise UserError("this machine is not ready", seen, "; ".join(finding.do for finding in bad))
