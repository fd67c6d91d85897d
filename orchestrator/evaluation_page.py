"""This file is where an evaluation becomes a page: the scores beside floor and ceiling, and the pictures themselves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.storage import Storage
from orchestrator.evaluation import Evaluation
from orchestrator.page import render_page
from orchestrator.thumbnails import thumbnail
from training.critic import HIGHER_IS_BETTER, METRICS, Picture
from training.png import encode_png
from training.scores import Estimate

PROMPTS, SEEDS = 40, 8  # shown at most; evaluation.json has all
NAMES = {
    "dino": ("DINO", "nearness to the photos"),
    "clip_i": ("CLIP-I", "nearness to the photos, as CLIP sees them"),
    "clip_t": ("CLIP-T", "nearness to the prompt, the identifier taken out"),
    "pres": ("PRES", "nearness of drawings of the class to the photos; lower is better"),
    "div": ("DIV", "distance of drawings of one prompt"),
    "copies": ("copies", "share laid out like a training photo; lower is better"),
}


@dataclass(frozen=True)
class _Line:
    """A metric on the page."""

    name: str
    about: str
    found: Estimate
    floor: float | None
    """Of the untouched base."""
    ceiling: float | None
    """Of real photos to each other."""
    higher: bool


@dataclass(frozen=True)
class _Tile:
    """A drawing on the page."""

    picture: str
    seed: int
    told: str
    copy: bool


def write_page(storage: Storage, path: str, evaluation: Evaluation) -> str:
    """Write the page of an evaluation at `path`, which is returned: one file that needs no network.

    Raises:
        StorageError: It cannot be written.
    """
    scores, rows = evaluation.scores, {(row.prompt, row.seed): row for row in evaluation.scores.rows}

    def tile(one: Picture) -> _Tile:
        row = rows.get((one.prompt, one.seed))
        if row is None:
            return _Tile(_small(one), one.seed, f"seed {one.seed}", False)
        told = (
            f"DINO {row.dino:.3f}, CLIP-T {row.clip_t:.3f}, layout {row.nearest:.2f} of photo {row.photo + 1}"
        )
        return _Tile(_small(one), one.seed, told, row.copy)

    facts = {
        "evaluation": evaluation,
        "scores": scores,
        "lines": _lines(evaluation),
        "photos": [thumbnail(photo) for photo in evaluation.photos],
        "drawn": _by_prompt(evaluation.pictures["subject"], tile),
        "of_class": _by_prompt(evaluation.pictures["class"], tile),
        "of_base": dict(_by_prompt(evaluation.pictures["base"], tile)),
        "left_out": len({one.prompt for one in evaluation.pictures["subject"]}) - PROMPTS,
    }
    storage.write(path, render_page("evaluation.html", facts, {"figure": lambda value: f"{value:.3f}"}))
    return path


def _lines(evaluation: Evaluation) -> list[_Line]:
    scores = evaluation.scores
    floors = {key: found.value for key, found in scores.base.items()}
    if "dino" in floors:
        floors["pres"] = floors["dino"]
    return [
        _Line(
            *NAMES[key],
            scores.metrics[key],
            floors.get(key),
            scores.ceiling[key].value if key in scores.ceiling else None,
            key in HIGHER_IS_BETTER,
        )
        for key in METRICS
        if key in scores.metrics
    ]


def _by_prompt(
    pictures: Sequence[Picture], tile: Callable[[Picture], _Tile]
) -> list[tuple[str, list[_Tile]]]:
    found: dict[str, list[_Tile]] = {}
    for one in pictures:
        shown = found.setdefault(one.prompt, []) if len(found) < PROMPTS else found.get(one.prompt, [])
        if len(shown) < SEEDS:
            shown.append(tile(one))
    return list(found.items())


def _small(one: Picture) -> str:
    return thumbnail(encode_png(one.pixels, None))
