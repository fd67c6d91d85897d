"""This file is where it is told what of a recipe decides the tensors: the part that a run's fingerprint is made of."""

from typing import Any

from training.recipe import TRAINED_SECTIONS, Recipe

# Settings that came after the first release: at its default one is left out of what decides, and so no fingerprint of
# an earlier run changes. A setting comes before the section it lies in.
LATER = (
    "prior.target",
    "data.color",
    "data.rotate",
    "data.buckets",
    "prior.sizes",
    "train.lora.kind",
    "train.lora.dora",
    "train.text_encoder.stop_after",
    "train.new_tokens",
    "train.objective.multires_noise_iterations",
    "train.objective.multires_noise_discount",
    "train.objective.timesteps",
    "train.objective.logit_mean",
    "train.objective.logit_std",
    "train.objective",
    "train.templates",
    "train.captions",
    "train.stop",
    "train.changes",
    "train.optimizer",
)


def decisive(run: Recipe) -> dict[str, Any]:
    """What of a recipe decides the tensors, as JSON values; the same as ever for settings that were there ever."""
    kept: dict[str, Any] = run.model_dump(mode="json", by_alias=True, include=set(TRAINED_SECTIONS))
    plain = Recipe().model_dump(mode="json", by_alias=True)
    for path in LATER:
        *sections, name = path.split(".")
        ours, theirs = kept, plain
        for section in sections:
            ours, theirs = ours[section], theirs[section]
        if ours[name] == theirs[name]:
            del ours[name], theirs[name]
    return kept
