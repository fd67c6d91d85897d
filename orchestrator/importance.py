"""This file is where it is asked how much each setting of a study mattered."""

from collections.abc import Mapping

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from orchestrator.bench import Record
from orchestrator.space import Space
from orchestrator.study import distributions

FEWEST = 6  # trials below which any answer would be chance


def importances(trials: Mapping[str, Record], space: Space) -> dict[str, float]:
    """The share of each setting in what makes the better trials better; empty where there are too few.

    Source: Watanabe et al. 2023, "PED-ANOVA"; of all trials, also those that were stopped, by their best worth.
    """
    known = distributions(space)
    if len(trials) < FEWEST or len(known) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for record in trials.values():
        worth = max(float(row["worth"]) for row in record["rows"])
        values = {key: record["values"][key] for key in known if key in record["values"]}
        if len(values) == len(known):
            study.add_trial(create_trial(params=values, distributions=dict(known), value=worth))
    if len(study.trials) < FEWEST:
        return {}
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {key: float(value) for key, value in found.items()}
