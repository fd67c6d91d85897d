"""This file is where a study is mirrored in MLflow: a run of its own, and one below it for every trial."""

from collections.abc import Callable, Mapping
from typing import Any

from cluster.storage import Storage
from orchestrator.bench import Record
from orchestrator.mlflow_tracker import MlflowTracker
from orchestrator.study_spec import StudyOutcome, StudySpec
from orchestrator.tracking import tracking_uri

_FIGURES = ("worth", "dino", "clip_t", "drift")


def mirror_study(
    spec: StudySpec,
    outcome: StudyOutcome,
    trials: Mapping[str, Record],
    recipe: str,
    storage: Storage,
    note: Callable[[str], None],
) -> str | None:
    """The id of the study's run; `None`, and a note, where MLflow failed: the record is ours.

    Its page stays out of MLflow: it shows subjects, and would outlive their deletion.

    Args:
        spec: The study.
        outcome: What was found.
        trials: Their records, by key.
        recipe: The best one, as YAML.
        storage: Root.
        note: Takes a line for people.
    """
    track = spec.runs[0].track
    uri, tags = tracking_uri(storage, track.mlflow), {"raybooth.study": spec.name}
    settings = {"trials": outcome.trials, "search": spec.search, "scheduler": spec.scheduler}

    def run(title: str, params: Mapping[str, Any], parent: str | None) -> MlflowTracker:
        return MlflowTracker(
            uri, track.experiment, storage, title, params, tags, None, parent, system_metrics=False
        )

    try:
        parent = run(f"study {spec.name}", {**settings, **outcome.values}, None)
        for key, record in trials.items():
            child = run(f"{spec.name}.{key}", record["values"], parent.run_id)
            for row in record["rows"]:
                child.measure(int(row["step"]), {name: row[name] for name in _FIGURES})
            child.finish("succeeded")
        figures = {"worth": outcome.worth, "steps_spent": float(outcome.steps_spent)}
        parent.measure(0, figures | ({"gain": outcome.gain["value"]} if outcome.gain else {}))
        parent.document("report", "recipe.yaml", recipe.encode())
        parent.finish("succeeded")
    except Exception as error:
        note(f"MLflow missed the study: {[*str(error).splitlines(), ''][0]}")
        return None
    return parent.run_id
