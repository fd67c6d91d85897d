"""This file is where it is told what the trials of a study share: their runs, and where what is found of them lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage
from orchestrator.space import sections
from orchestrator.spec import parse_run
from training import checkpoint
from training.gang import GangShape
from training.prompt import CLASS_PROMPT
from training.recipe import Run
from training.section import merge

DRAW_STEPS = 15  # denoising steps of a drawing that is only scored
Record = dict[str, Any]
# Of what a trial tells Tune at a rung
WORTH, STEP, KEY, RUNG, LOST = "worth", "step", "key", "rung", "lost"


@dataclass(frozen=True)
class Bench:
    """What all trials of a study share; plain values, as it travels to the trials' processes."""

    study: str
    storage_uri: str
    specs: tuple[Mapping[str, Any], ...]
    """The run of each subject, by alias, with the recipe that values are laid on."""
    prompts: tuple[str, ...]
    """Of the drawings that are scored at a rung; the class is drawn besides."""
    num_images: int
    rungs: tuple[int, ...]
    """Steps at which trials are scored, the last one at their end."""
    dino: str
    clip: str
    shape: GangShape
    device: str
    population: bool = False
    """Whether members take over one another's histories: then the scheduler ends none of them."""


def study_path(study: str) -> str:
    """Where a study lies."""
    return f"studies/{study}"


def trial_path(study: str, key: str) -> str:
    """The record of a trial."""
    return f"{study_path(study)}/trials/{key}.json"


def read_trial(storage: Storage, study: str, key: str) -> Record | None:
    """What is on record of a trial."""
    try:
        found: Record = storage.read_json(trial_path(study, key))
    except FileNotFoundError:
        return None
    return found


def version_of(study: str, key: str) -> str:
    """What a trial's runs are called beside a subject's versions."""
    return f"{study}.{key}"


def trial_run(bench: Bench, spec: Mapping[str, Any], values: Mapping[str, Any]) -> Run:
    """The run of a subject with a trial's values.

    Raises:
        UserError: They cannot be used together.
    """
    trained = {
        "train": {"steps": bench.rungs[-1], "stop": None},  # a scheduler ends it
        "checkpoint": {"every": bench.rungs[-1], "keep": 1, "keep_best": False},
        "validate": {
            "every": bench.rungs[-1],
            "samples": 1,
            "prompts": [*bench.prompts, CLASS_PROMPT],
            "num_images": bench.num_images,
            "steps": DRAW_STEPS,
            "unguided": False,
        },
    }
    return parse_run(merge(merge(spec, sections(values)), trained))


def grid_path(name: str, study: str, key: str, step: int) -> str:
    """The drawings of a subject at a rung: a row for each prompt, the class last."""
    return f"runs/{name}/{version_of(study, key)}/samples/step_{step:06d}.png"


def forget(storage: Storage, bench: Bench, key: str) -> None:
    """Delete the checkpoints of a trial that goes on no more; its drawings stay for the report."""
    for spec in bench.specs:
        checkpoint.delete(storage, f"runs/{spec['subject']['name']}/{version_of(bench.study, key)}")
