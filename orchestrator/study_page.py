"""This file is where a study becomes a page: what trades against what, what mattered, and the drawings themselves."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.objects import StorageError
from cluster.storage import Storage
from orchestrator.bench import Bench, Record, grid_path, study_path
from orchestrator.importance import importances
from orchestrator.page import as_markup, render_page
from orchestrator.plots import bars, curves, scatter
from orchestrator.population import CHANGES, course_of, rows_of
from orchestrator.space import Space
from orchestrator.study_spec import StudyOutcome
from orchestrator.thumbnails import thumbnail
from orchestrator.tracking import flatten
from training.prompt import CLASS_PROMPT

GRID_SIDE = 360  # pixels of the shorter side of a grid


@dataclass(frozen=True)
class _Shown:
    """A trial whose drawings are shown."""

    title: str
    values: Mapping[str, Any]
    row: Mapping[str, Any]
    grids: list[tuple[str, str]]
    """Per subject: its name, and its drawings in one picture."""


def write_study_page(
    storage: Storage,
    bench: Bench,
    outcome: StudyOutcome,
    trials: Mapping[str, Record],
    space: Space,
    best: str,
    defaults: str,
) -> str:
    """Write the page of a study; returns its path in storage. It is one file that needs no network.

    Args:
        storage: Root.
        bench: What the trials shared.
        outcome: What was found.
        trials: Their records, by key.
        space: What was varied.
        best: Key of the best trial.
        defaults: Key of the recipe that was varied.

    Raises:
        StorageError: It cannot be written.
    """
    top = {key: max(record["rows"], key=lambda row: float(row["worth"])) for key, record in trials.items()}
    trained = {key: row for key, row in top.items() if "subjects" in row} or top
    ranked = sorted(trained, key=lambda key: float(trained[key]["worth"]), reverse=True)
    words = {key: "defaults" for key in (defaults,) if key in trained} | {best: "best"}
    shown = [("best", best), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])]
    if defaults in trained and defaults != best:
        shown.insert(1, ("defaults", defaults))
    # a population's settings change on the way, and what it left early is no worse for its settings
    weighed = {} if bench.population else importances(trials, space)
    lines = {
        key: [(row["step"], row["worth"]) for _, row in _line(key, trials, whole=key in words)]
        for key in trials
        if key in trained
    }
    taken = [_line(key, trials)[0][1] for key in lines if trials[key].get("of") in trials]
    facts = {
        "study": outcome,
        "unchanged": best == defaults,
        "trials": [
            (key, trials[key]["state"], course_of(trials[key]["values"]), top[key])
            for key in sorted(top, key=lambda k: -float(top[k]["worth"]))
        ],
        "values": course_of(outcome.values),
        "population": bench.population,
        "rungs": bench.rungs,
        "members": _members(trials, words) if bench.population else [],
        "settings": list(space),
        "subjects": [spec["subject"]["name"] for spec in bench.specs],
        "prompts": [*bench.prompts, CLASS_PROMPT],
        "front": {one["trial"] for one in outcome.pareto},
        "shown": [_shown(storage, bench, title, key, trials[key], top[key]) for title, key in shown],
        "pareto": as_markup(
            scatter(
                {key: (row["clip_t"], row["dino"]) for key, row in trained.items()},
                [one["trial"] for one in outcome.pareto if one["trial"] in trained],
                words,
                "obedience (CLIP-T)",
                "likeness (DINO)",
            )
        ),
        "kept": as_markup(
            scatter(
                {key: (row["drift"], row["dino"]) for key, row in trained.items()},
                [one["trial"] for one in outcome.pareto if one["trial"] in trained],
                words,
                "drift of the class",
                "likeness (DINO)",
            )
        ),
        "curves": as_markup(
            curves(
                lines,
                words,
                "steps",
                "worth",
                [(row["step"], row["worth"]) for row in taken],
            )
        ),
        "importance": as_markup(bars(weighed, "share of what makes trials good")) if weighed else None,
        "share": outcome.steps_spent / max(outcome.steps_of_grid, 1),
    }
    path = f"{study_path(bench.study)}/report/index.html"
    filters = {
        "figure": lambda value: f"{value:.3f}",
        "setting": lambda value: f"{value:.4g}" if isinstance(value, float) else value,
    }
    storage.write(path, render_page("study.html", facts, filters))
    return path


def _shown(
    storage: Storage, bench: Bench, title: str, key: str, record: Record, row: Mapping[str, Any]
) -> _Shown:
    grids = []
    for spec in bench.specs:
        name = spec["subject"]["name"]
        with suppress(FileNotFoundError, StorageError):
            grids.append(
                (name, thumbnail(storage.read(grid_path(name, bench.study, key, row["step"])), GRID_SIDE))
            )
    return _Shown(title, course_of(record["values"]), row, grids)


def _line(key: str, trials: Mapping[str, Record], whole: bool = False) -> list[tuple[str, Mapping[str, Any]]]:
    """The rungs of a trial; of one that took over another's history also the one it went on from, or all of them."""
    found = rows_of(key, trials)
    return found if whole else found[-len(trials[key]["rows"]) - 1 :]


@dataclass(frozen=True)
class _Member:
    """A history that no member left for another's."""

    key: str
    word: str
    """`best`, `defaults`, or nothing."""
    rungs: list[tuple[Mapping[str, Any], str, str]]
    """What was found at each, whose history that was, and what was changed before it."""


def _members(trials: Mapping[str, Record], words: Mapping[str, str]) -> list[_Member]:
    """What the members ended with, the best first."""
    found, left = [], {record.get("instead_of") for record in trials.values()}
    for key in (key for key in trials if key not in left):
        rungs, before = [], ""
        for own, row in rows_of(key, trials):
            begins = bool(before) and own != before
            rungs.append((row, own, _told(trials[own]["values"]) if begins else ""))
            before = own
        found.append(_Member(key, words.get(key, ""), rungs))
    return sorted(found, key=lambda member: -float(member.rungs[-1][0]["worth"]))


def _told(history: Mapping[str, Any]) -> str:
    """What the last change of a history is, for people."""
    said = {key: value for key, value in flatten(history[CHANGES][-1]).items() if key != "after"}
    return ", ".join(f"{key} {value:g}" for key, value in said.items())
