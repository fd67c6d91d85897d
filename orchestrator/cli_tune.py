"""This file is where `raybooth tune` reads its options."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import UserError, did_you_mean
from orchestrator.cli_campaign import ClassNoun, load
from orchestrator.cli_evaluate import Clip, Dino
from orchestrator.cli_output import DebugOption, JsonOption, StorageOption, reporting, storage_root
from orchestrator.cli_train import Address, BaseModel, RecipeOption, Sets

SEARCHES, SCHEDULERS = ("optuna", "random", "grid"), ("asha", "pbt", "none")


def tune(
    subjects: Annotated[
        str,
        typer.Argument(
            help="The subjects to try recipes on, as `campaign run` takes them.", metavar="SUBJECTS"
        ),
    ],
    space: Annotated[Path, typer.Option("--space", help="What may vary: a YAML file.", metavar="FILE")],
    trials: Annotated[int, typer.Option(min=1, max=100_000, help="Recipes to try.")] = 32,
    name: Annotated[str, typer.Option("--name", help="Name of the study; the manifest's by default.")] = "",
    search: Annotated[
        str,
        typer.Option(help="optuna (the default), random (of pbt the default) or grid.", show_default=False),
    ] = "",
    scheduler: Annotated[
        str,
        typer.Option(
            help="asha stops recipes that fall behind; with pbt they go on from where the best ones are, with other "
            "settings; none trains all to the end."
        ),
    ] = "asha",
    steps: Annotated[int, typer.Option(min=0, help="Most steps of a recipe; 0 takes train.steps.")] = 0,
    n: Annotated[int, typer.Option("-n", "--num-images", min=1, max=64, help="Images per prompt.")] = 2,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Drawn on the way; repeatable.", metavar="PROMPT")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the search.")] = 0,
    gangs: Annotated[int, typer.Option(min=1, max=1000, help="Recipes tried at a time.")] = 1,
    class_noun: ClassNoun = "",
    base: BaseModel = "",
    recipe: RecipeOption = "",
    sets: Sets = None,
    dino: Dino = "",
    clip: Clip = "",
    storage: StorageOption = "",
    address: Address = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Search for the recipe that makes the subjects right, and write it down for `--recipe`.

    Recipes are scored on the way by a few drawings: DINO + CLIP-T - drift of the class, a mean over the subjects. The
    same command again goes on after a crash. The base stays loaded between recipes.

    Examples:

      raybooth tune ./photos --class dog --space space.yaml --trials 32

      raybooth tune campaign.yaml --space space.yaml --trials 8 --search random --steps 200 --json

      raybooth tune campaign.yaml --space space.yaml --trials 8 --scheduler pbt
    """
    with reporting(as_json, debug) as output:
        from cluster.storage import Storage
        from orchestrator.population import course_of
        from orchestrator.progress import open_stages
        from orchestrator.space import read_space
        from orchestrator.study_spec import StudySpec
        from orchestrator.tuning import run_study

        search = search or ("random" if scheduler == "pbt" else "optuna")
        for value, known, option in ((search, SEARCHES, "--search"), (scheduler, SCHEDULERS, "--scheduler")):
            if value not in known:
                raise UserError(f"{option} {value} is not known", "", did_you_mean(value, known))
        found = load(subjects, name, class_noun, base, sets, recipe, storage)
        for row in found.rows:
            if row.error:
                raise row.error
        runs = tuple(row.run for row in found.rows if row.run)
        spec = StudySpec(
            name=found.name,
            runs=runs,
            space=read_space(space),
            trials=trials,
            search=search,
            scheduler=scheduler,
            steps=steps,
            seed=seed,
            num_images=n,
            prompts=tuple(prompts or ()),
            gangs=gangs,
            dino=dino or None,
            clip=clip or None,
        )
        outcome = run_study(spec, Storage(storage_root(storage)), open_stages(), address or None)
        output.result = outcome.as_json()
        told = ", ".join(f"{key} {value}" for key, value in course_of(outcome.values).items())
        output.say(f"{outcome.study}: best of {outcome.trials} recipes is {told}, worth {outcome.worth:.3f}")
        if outcome.gain:
            gain, verdict = outcome.gain, "better" if outcome.better else "no better"
            within = f"{gain['low']:+.3f} to {gain['high']:+.3f}"
            output.say(f"  {verdict} than the recipe that was varied: {gain['value']:+.3f} ({within})")
        output.say(f"  recipe: {outcome.recipe}")
        output.say(f"  report: {outcome.page}")
