"""This file is where the defaults of a base's family, a method and an optimizer stand that differ from the recipe's.

Sources: the DreamBooth paper, diffusers' recommendations, and for `pocket` our own runs.
"""

from collections.abc import Mapping
from typing import Any

from training.recipe import ATTENTION, Method
from training.section import merge

DEFAULTS: Mapping[tuple[str, Method], Mapping[str, Any]] = {
    ("sd", "lora"): {},
    ("sd", "full"): {
        "train": {"lr": 2e-6, "pairs_per_step": 2, "text_encoder": {"train": True, "lr": 2e-6}},
    },
    ("pocket", "lora"): {
        "prior": {"num_images": 32, "steps": 25, "guidance": 4.0},
        "train": {
            "steps": 200,
            "lr": 1.5e-3,
            "pairs_per_step": 4,
            # with the attention alone, 300 steps of so small a model do not hold a subject
            "lora": {"rank": 32, "alpha": 32.0, "targets": [*ATTENTION, "ff.net.0.proj", "ff.net.2"]},
        },
        "checkpoint": {"every": 100},
        "validate": {"guidance": 4.0},
    },
    ("pocket", "full"): {
        "prior": {"num_images": 32, "steps": 25, "guidance": 4.0},
        "train": {
            "steps": 200,
            "lr": 2e-4,
            "pairs_per_step": 4,
            "text_encoder": {"train": True, "lr": 2e-4},
        },
        "checkpoint": {"every": 100},
        "validate": {"guidance": 4.0},
    },
}

# Prodigy finds the rate itself, and ours multiply it
OF_OPTIMIZER: Mapping[str, Mapping[str, Any]] = {
    "prodigy": {"train": {"lr": 1.0, "text_encoder": {"lr": 1.0}}},
}


def base_family(model: str) -> str:
    """The family whose defaults apply to a base: `pocket`, or `sd` for any Stable Diffusion 1.x/2.x."""
    return "pocket" if model == "pocket" else "sd"


def with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` laid over the defaults of its base family, method and optimizer; not yet validated."""
    base, train = raw.get("base"), raw.get("train")
    model = base.get("model", "pocket") if isinstance(base, Mapping) else "pocket"
    method = train.get("method", "lora") if isinstance(train, Mapping) else "lora"
    optimizer = train.get("optimizer") if isinstance(train, Mapping) else None
    named = optimizer.get("name") if isinstance(optimizer, Mapping) else None
    family = base_family(str(model))
    table: dict[str, Mapping[str, Any]] = {
        name: d for (owner, name), d in DEFAULTS.items() if owner == family
    }
    return merge(merge(table.get(str(method), {}), OF_OPTIMIZER.get(str(named), {})), raw)
