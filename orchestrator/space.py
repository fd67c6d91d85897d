"""This file is where the recipes that a study may try are described: `space.yaml`, and what is drawn of it.

A space maps settings to choices: `[8, 16]` is a choice, `{low: 1e-4, high: 2e-3, log: true}` a range. Values of one
trial are a flat mapping such as `{"train.lr": 0.001}`.
"""

import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import UserError
from cluster.storage import sha256
from orchestrator.spec import read_config
from orchestrator.tracking import flatten

Values = Mapping[str, Any]
LEVELS = 3  # of a range in a grid
_MADE_BEFORE = (
    "it changes the images that all trials share; vary train.* and prior.weight, and set the rest with --set"
)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, unit: float) -> float | int:
        """The number at `unit` of the way from 0 to 1, by ratio where the range is logarithmic."""
        if self.log:
            found = math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        else:
            found = self.low + unit * (self.high - self.low)
        found = min(max(found, self.low), self.high)
        return round(found) if self.whole else float(f"{found:.4g}")


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    options: tuple[Any, ...]


Space = Mapping[str, Range | Choice]


def read_space(path: Path) -> Space:
    """The space of a YAML file.

    Raises:
        UserError: It cannot be read, or a setting in it cannot be varied.
    """
    return parse_space(read_config(path))


def parse_space(raw: Mapping[str, Any]) -> Space:
    """A space from nested sections or dotted keys; raises as `read_space`."""
    found = {key: _parsed(key, value) for key, value in _leaves(raw).items()}
    if not found:
        raise UserError("the space is empty", "", "name a setting, such as train.lr: {low: 1e-4, high: 1e-3}")
    for key in found:
        section, _, setting = key.partition(".")
        if key == "train.steps":
            raise UserError(
                "train.steps cannot be in the space",
                "trials are scored on their way, and the best number of steps is found by that",
                "give the most with --steps",
            )
        if not (section == "train" and setting) and key != "prior.weight":
            raise UserError(f"{key} cannot be in the space", "", _MADE_BEFORE)
    return found


def _leaves(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Choices and ranges by dotted key: a mapping with `low` in it is a range and no section."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, Mapping) and "low" not in value and "high" not in value:
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _parsed(key: str, value: Any) -> Range | Choice:
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return Choice(tuple(value))
    if isinstance(value, Mapping) and set(value) <= {"low", "high", "log", "int"}:
        low, high = _number(value.get("low")), _number(value.get("high"))
        log, known = bool(value.get("log")), low is not None and high is not None
        if known and low < high and (low > 0 or not log):  # type: ignore[operator]
            return Range(low, high, log, bool(value.get("int")))  # type: ignore[arg-type]
    raise UserError(
        f"{key} of the space cannot be used",
        f"it is {value!r}",
        "give a list of values, or {low: 1e-4, high: 1e-3, log: true}, with low below high (and above 0 with log)",
    )


def _number(value: Any) -> float | None:
    """YAML reads 1e-4 as a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def in_numbers(space: Space, keys: Collection[str]) -> Space:
    """The space with numbers for the texts that YAML makes of `[1e-4, 3e-4]`, in choices of these settings."""
    return {
        key: Choice(tuple(map(_told_number, one.options))) if isinstance(one, Choice) and key in keys else one
        for key, one in space.items()
    }


def _told_number(value: Any) -> Any:
    found = _number(value) if isinstance(value, str) else None
    return value if found is None else found


def including(space: Space, values: Values) -> Space:
    """The space widened so that it holds a recipe, such as the one that the others are compared with."""
    wider = dict(space)
    for key, value in values.items():
        one = wider[key]
        if isinstance(one, Choice) and value not in one.options:
            wider[key] = Choice((value, *one.options))
        elif isinstance(one, Range) and isinstance(value, int | float):
            wider[key] = replace(one, low=min(one.low, value), high=max(one.high, value))
    return wider


def draw(space: Space, number: int, seed: int) -> list[dict[str, Any]]:
    """So many random recipes, always the same for a seed, the first ones the same for any number."""
    found = []
    for trial in range(number):
        rng = np.random.default_rng([seed, trial])
        values: dict[str, Any] = {}
        for key, one in space.items():
            unit = float(rng.random())
            values[key] = (
                one.at(unit) if isinstance(one, Range) else one.options[int(unit * len(one.options))]
            )
        found.append(values)
    return found


def every(space: Space) -> list[dict[str, Any]]:
    """The grid: every combination, with three numbers of each range."""
    columns = [
        [one.at(level / (LEVELS - 1)) for level in range(LEVELS)] if isinstance(one, Range) else one.options
        for one in space.values()
    ]
    return [dict(zip(space, row, strict=True)) for row in itertools.product(*columns)]


def key_of(values: Values) -> str:
    """What a recipe is called in storage: ten hex digits, whoever draws it in whatever order."""
    return sha256(json.dumps(dict(sorted(values.items())), sort_keys=True).encode())[:10]


def sections(values: Values) -> dict[str, Any]:
    """The nested sections of dotted settings."""
    out: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split(".")
        inner = out
        for part in parents:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return out


def values_at(recipe: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """What a recipe says of the settings of a space."""
    flat = flatten(recipe)
    return {key: flat[key] for key in space if key in flat}
