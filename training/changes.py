"""This file is where it is told which settings are in force at a step: a function of the step and nothing else."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import TypeVar

from cluster.errors import UserError
from training.change_settings import CHANGEABLE
from training.recipe import Run, Train
from training.section import merge

T = TypeVar("T")
Course = Sequence[tuple[int, T]]
"""Values in the order of the steps that are trained before each; the first has 0."""


def course(train: Train) -> Course[Train]:
    """The settings of a run and what they become; the changes themselves are left out of them."""
    now = train.model_copy(update={"changes": ()})
    found = [(0, now)]
    for change in train.changes:
        now = Train.model_validate(merge(now.model_dump(), change.train.model_dump()))
        found.append((change.after, now))
    return found


def prior_course(train: Train, weight: float) -> Course[float]:
    """The weight of the class term, and what it becomes; `weight` is `prior.weight`."""
    changed = [(change.after, change.prior.weight) for change in train.changes]
    return [(0, weight), *((after, to) for after, to in changed if to is not None)]


def in_force(values: Course[T], step: int) -> T:
    """What is in force in step `step` (from 0)."""
    return values[bisect_right(values, step, key=lambda value: value[0]) - 1][1]


def settled(train: Train, after: int) -> list[str]:
    """Rates that take no effect any more after so many steps: their part has stopped. Dotted, as in run.yaml."""
    stops = {"text_encoder": train.text_encoder.stop_after, "new_tokens": train.new_tokens.stop_after}
    return [f"train.{name}.lr" for name, stop in stops.items() if stop is not None and stop <= after]


def refuse_idle_changes(run: Run) -> None:
    """Refuse changes that would take no effect, or that would change what data is trained.

    Raises:
        UserError: There is one.
    """
    train, before = run.train, 0
    text, tokens = train.text_encoder, train.new_tokens
    for number, change in enumerate(train.changes):
        path, after = f"train.changes.{number}", change.after
        if after <= before:
            raise UserError(
                f"{path}.after is not above that of the change before it",
                f"it is {after}, and that is {before}",
                "give changes in the order of their steps, one for each step",
            )
        if after >= train.steps:
            raise UserError(
                f"{path} takes no effect",
                f"it comes after {after} steps, and there are {train.steps}",
                "leave it out, or set more train.steps",
            )
        if change.model_dump().keys() == {"after"}:
            raise UserError(f"{path} changes nothing", "", f"name one of {', '.join(CHANGEABLE)}")
        for name, changed, on, stop_after in (
            ("text_encoder", change.train.text_encoder, text.train, text.stop_after),
            ("new_tokens", change.train.new_tokens, tokens.count > 0, tokens.stop_after),
        ):
            rate = f"train.{name}.lr"
            if changed.lr is None or (on and rate not in settled(train, after)):
                continue
            seen = f"train.{name}.stop_after is {stop_after}" if on else "it is not trained"
            raise UserError(f"{path}.{rate} takes no effect", seen, "leave it out")
        if change.prior.weight is not None and run.prior.weight == 0:
            raise UserError(
                f"{path}.prior.weight cannot be had",
                "prior.weight is 0, so there are no class images to weigh",
                "set prior.weight above 0, or leave it out",
            )
        before = after
