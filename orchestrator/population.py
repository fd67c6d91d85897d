"""This file is where a population decides: who takes over whose history, and which settings become others with it.

A member's history is a flat mapping like that of any trial, with what changed on its way under `train.changes`: a
recipe that `train --recipe` follows from its first step. Every decision follows from the study's seed, the member and
the step, so a study that goes on decides again as it did.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from cluster.errors import UserError
from orchestrator.space import Choice, Range, Space, Values, key_of, sections
from orchestrator.spec import parse_run
from orchestrator.study_spec import StudySpec
from orchestrator.tracking import flatten
from training.change_settings import CHANGEABLE
from training.section import merge

CHANGES = "train.changes"
FEWEST = 4  # members: with fewer a quarter is nobody
RUNGS = 5
# As Ray Tune's PBT has them by default, and the paper (Jaderberg et al. 2017) for its language models
_RESAMPLED = 0.25  # the chance that a setting is drawn anew
_FACTORS = (0.8, 1.2)  # of which one multiplies it otherwise
_ATTEMPTS = 100  # at a history that no other member has
_DONOR, _SETTINGS = 1, 2  # what a generator is for


def even_rungs(steps: int, number: int = RUNGS) -> tuple[int, ...]:
    """The steps at which members are compared: as many as that where there are so many steps, the last is `steps`."""
    return tuple(sorted({max(round(steps * part / number), 1) for part in range(1, number + 1)}))


def refuse_idle(spec: StudySpec, space: Space, members: Sequence[Values]) -> None:
    """Refuse a study in which a population could change nothing, or nothing that can be changed.

    Args:
        spec: The study.
        space: What is varied, the recipe that is varied included.
        members: What they begin with, first the recipe that is varied.

    Raises:
        UserError: It cannot be tried.
    """
    rungs, varied = even_rungs(spec.budget), [key for key in space if key in CHANGEABLE]
    if spec.search == "optuna":
        raise UserError(
            "--search optuna cannot be had with --scheduler pbt",
            "the population itself chooses, by what it has found",
            "give --search random, or grid",
        )
    if len(rungs) < 2:
        raise UserError(
            "a population has nothing to decide", f"there is {rungs[0]} step", "give more --steps"
        )
    for setting, idle in ((CHANGES, ()), ("train.lr_scheduler", "constant")):
        of_runs = [getattr(run.train, setting.removeprefix("train.")) for run in spec.runs]
        if setting in space or any(value != idle for value in of_runs):
            raise UserError(
                f"{setting} cannot be had with --scheduler pbt",
                "what settings become on their way is what it finds",
                "leave it out, or use another --scheduler",
            )
    if not varied:
        raise UserError(
            "nothing in the space may change during a run",
            f"it has {', '.join(space)}",
            f"name one of {', '.join(CHANGEABLE)}, or use another --scheduler",
        )
    if len(members) < FEWEST:
        raise UserError(
            f"a population of {len(members)} is too small",
            "a quarter of it takes over from another quarter",
            f"give --trials {FEWEST} or more, and a space with as many different recipes",
        )
    for key in varied:
        one, begun = space[key], members[0].get(key, 0)
        if begun is None:
            raise UserError(
                f"{key} cannot be changed by a population",
                "it is null in the recipe that is varied",
                "give it a number there, or leave it out of the space",
            )
        ends = one.options if isinstance(one, Choice) else (one.low, one.high)
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in ends):
            seen = ", ".join(map(str, ends))
            raise UserError(f"{key} of the space cannot be used by a population", seen, "give numbers alone")
        if key == "prior.weight" and min(ends) <= 0:
            raise UserError(
                "prior.weight cannot become 0 during a run, nor leave it",
                f"the space has {min(ends):g}, the recipe that is varied included",
                "give weights above 0, or use another --scheduler",
            )
    for values in members:  # what is trained may be in the space too
        nudged = {key: value for key, value in values.items() if key in CHANGEABLE}
        changed = {**values, CHANGES: [{"after": rungs[0], **sections(nudged)}], "train.steps": spec.budget}
        for run in spec.runs:
            raw = merge(run.model_dump(mode="json", by_alias=True), sections(changed))
            parse_run(merge(raw, {"train": {"stop": None}}))


def split(
    worths: Sequence[float], lost: Sequence[bool], spared: Collection[int]
) -> tuple[list[int], list[int]]:
    """Who takes over, the worst first, and who may be taken over, the best last; by place.

    A quarter each, and all that are lost take over.

    Args:
        worths: Of the members.
        lost: Which of them cannot be trained on.
        spared: Places of those that go on as they are.
    """
    number = min(math.ceil(len(worths) / 4), len(worths) // 2)
    ranked = sorted(range(len(worths)), key=lambda place: worths[place])
    upper = [place for place in ranked if not lost[place]][-number:] if number else []
    others = [place for place in ranked if place not in upper and place not in spared]
    others.sort(key=lambda place: not lost[place])
    lower = others[: max(number, sum(lost[place] for place in others))]
    return (lower, upper) if upper else ([], [])


def donor_of(member: int, step: int, seed: int, number: int) -> int:
    """Which of so many good ones a member takes over."""
    return int(np.random.default_rng([seed, member, step, _DONOR]).integers(number))


def heir(
    space: Space,
    donor: Values,
    step: int,
    seed: int,
    member: int,
    taken: Collection[str],
    idle: Collection[str] = (),
) -> dict[str, Any] | None:
    """The donor's history with other settings from `step` on.

    Args:
        space: What is varied.
        donor: The donor's history.
        step: Steps that were trained.
        seed: The study's.
        member: The number of the one that takes over.
        taken: Keys of the histories of all members; none is trained by two.
        idle: Settings that take no effect after `step`; they stay as the donor has them.

    Returns:
        `None` where chance found none that is free, or nothing can be changed any more.
    """
    rng = np.random.default_rng([seed, member, step, _SETTINGS])
    before = settings_now(donor)
    for _ in range(_ATTEMPTS):
        wanted = {
            key: _perturbed(one, before[key], rng)
            for key, one in space.items()
            if key in CHANGEABLE and key in before and key not in idle
        }
        changed = {key: value for key, value in wanted.items() if value != before[key]}
        change = {"after": step, **sections(changed)}
        found = {**donor, CHANGES: [*donor.get(CHANGES, ()), change]}
        if changed and key_of(found) not in taken:
            return found
    return None


def settings_now(history: Values) -> dict[str, Any]:
    """What is in force after all changes of a history."""
    found = {key: value for key, value in history.items() if key != CHANGES}
    for change in history.get(CHANGES, ()):
        found |= _said(change)
    return found


def course_of(history: Values) -> dict[str, Any]:
    """A history for people: each setting's value, or `0.001, 0.0012 after 40` where it changed."""
    found = {key: value for key, value in history.items() if key != CHANGES}
    for change in history.get(CHANGES, ()):
        for key, value in _said(change).items():
            found[key] = f"{_figure(found[key])}, {_figure(value)} after {change['after']}"
    return found


def begun_at(history: Values) -> int:
    """The steps that a history shares with the one that it took over; 0 of a first one."""
    changes = history.get(CHANGES, ())
    return int(changes[-1]["after"]) if changes else 0


def lineage(key: str, trials: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The histories that a history is made of, by key: first the one that began at step 0, last itself."""
    found = [key]
    while (before := str(trials[found[0]].get("of"))) in trials:
        found.insert(0, before)
    return found


def rows_of(key: str, trials: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """What was found at each rung on the way of a history, its own and what it took over, with the key it is of."""
    chain = lineage(key, trials)
    found = []
    for own, after in zip(chain, [*chain[1:], None], strict=True):
        until = begun_at(trials[after]["values"]) if after else math.inf
        found += [(own, row) for row in trials[own]["rows"] if row["step"] <= until]
    return found


def _said(change: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(change).items() if key != "after"}


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _perturbed(one: Range | Choice, now: Any, rng: np.random.Generator) -> Any:
    """Drawn anew, or a step from where it is: a neighbour among choices, a fifth more or less in a range."""
    again, unit, up = rng.random() < _RESAMPLED, float(rng.random()), bool(rng.integers(2))
    if isinstance(one, Choice):
        options = sorted(one.options)
        place = int(unit * len(options)) if again else options.index(now) + (1 if up else -1)
        return options[min(max(place, 0), len(options) - 1)]
    if again:
        return one.at(unit)
    moved = min(max(now * _FACTORS[up], one.low), one.high)
    return round(moved) if one.whole else float(f"{moved:.4g}")
