"""This file is where the defaults of a base's family, a method and an optimizer stand that differ from the recipe's.

Sources: the DreamBooth paper, diffusers' recommendations, and for `pocket` our own runs.
"""

import re
from collections.abc import Mapping
from typing import Any

from training.basekind import KINDS
from training.part_settings import ATTENTION, OF_TEXT
from training.recipe import Method
from training.section import merge

# 28 steps and guidance 7 are what diffusers' pipeline of SD3 takes, and its script adapts these layers
_SD3: Mapping[str, Any] = {
    "prior": {"sampler": "euler", "steps": 28, "guidance": 7.0},
    "engine": {"gradient_checkpointing": True},
    "validate": {"steps": 28, "guidance": 7.0},
}

DEFAULTS: Mapping[tuple[str, Method], Mapping[str, Any]] = {
    ("sd", "lora"): {},
    ("sd", "full"): {
        "train": {"lr": 2e-6, "pairs_per_step": 2, "text_encoder": {"train": True, "lr": 2e-6}},
    },
    # guidance 5 is what diffusers' pipeline of SDXL takes; at 1024 pixels activations are what fills a GPU
    ("sdxl", "lora"): {
        "prior": {"guidance": 5.0},
        "engine": {"gradient_checkpointing": True},
        "validate": {"guidance": 5.0},
    },
    ("sdxl", "full"): {
        "prior": {"guidance": 5.0},
        "train": {"lr": 2e-6},
        "engine": {"gradient_checkpointing": True},
        "validate": {"guidance": 5.0},
    },
    ("sd3", "lora"): {
        **_SD3,
        "train": {"lora": {"targets": [f"attn.{name}" for name in (*ATTENTION, *OF_TEXT)]}},
    },
    ("sd3", "full"): {**_SD3, "train": {"lr": 2e-6}},
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


# 3, 3.5 or 35, and neither 30 nor 3d
_NAMED_3 = re.compile(r"(?:SD|(?<![a-zA-Z])(?i:sd|stable[-_]?diffusion))[-_]?[vV]?35?(?![0-9a-zD])")
_NAMED_XL = re.compile(r"XL(?![a-z])|(?:^|[^a-zA-Z])(?:sd)?xl(?![a-zA-Z])|[a-z]xl(?=[-_]v?\d)")


def base_family(model: str, revision: str | None = None) -> str:
    """The family whose defaults apply to a base: `pocket`, `sd` for any Stable Diffusion 1.x/2.x, `sdxl`, or `sd3`.

    It is that of the base's model_index.json; a base that is not here (yet) is of what its name says.
    """
    if model == "pocket":
        return "pocket"
    from training.basefolder import glance  # which imports the hub's client

    index = glance(model, revision)
    if index is None:
        return "sd3" if _NAMED_3.search(model) else "sdxl" if _NAMED_XL.search(model) else "sd"
    return next((kind.family for kind in KINDS if kind.pipeline == index.get("_class_name")), "sd")


def with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` laid over the defaults of its base family, method and optimizer; not yet validated."""
    base, train = raw.get("base"), raw.get("train")
    at = base if isinstance(base, Mapping) else {}
    method = train.get("method", "lora") if isinstance(train, Mapping) else "lora"
    optimizer = train.get("optimizer") if isinstance(train, Mapping) else None
    named = optimizer.get("name") if isinstance(optimizer, Mapping) else None
    revision = at.get("revision")
    family = base_family(str(at.get("model", "pocket")), revision if isinstance(revision, str) else None)
    table: dict[str, Mapping[str, Any]] = {
        name: d for (owner, name), d in DEFAULTS.items() if owner == family
    }
    under = merge(table.get(str(method), {}), OF_OPTIMIZER.get(str(named), {}))
    tokens = train.get("new_tokens") if isinstance(train, Mapping) else None
    if named == "prodigy" and isinstance(tokens, Mapping) and tokens.get("count"):
        under = merge(under, {"train": {"new_tokens": {"lr": 1.0}}})  # one rate for all, as it finds one
    return merge(under, raw)
