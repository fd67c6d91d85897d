"""This file is where it is decided whether a version is served: by its scores, and beside those of the champion."""

from collections.abc import Sequence

from orchestrator.campaign_settings import Gate
from training.critic import Scores
from training.scores import Estimate, difference

_LEAST, _MOST = ("dino", "clip_i", "clip_t", "div"), ("pres", "copies")


def objections(gate: Gate, scores: Scores, champion: Scores | None) -> list[str]:
    """Why a version is not to be served; empty when it is.

    Args:
        gate: What is demanded.
        scores: Of the version.
        champion: Of the version that is served now, for the same prompts and seeds; `None` where there is none.
    """
    found: list[str] = []
    for key in (*_LEAST, *_MOST, "drift"):
        limit = getattr(gate, key)
        if limit is None:
            continue
        score = scores.drift if key == "drift" else scores.metrics.get(key)
        if score is None:
            found.append(f"{key} is demanded and cannot be had of these drawings")
        elif key in _LEAST and score.value < limit:
            found.append(f"{key} is {score.value:.3f}, and {limit:g} is demanded")
        elif key not in _LEAST and score.value > limit:
            found.append(f"{key} is {score.value:.3f}, and at most {limit:g} is allowed")
    if champion and gate.no_worse:
        gain = gained([(scores, champion)])
        if gain is None:
            found.append("it cannot be compared with the champion: their prompts differ")
        elif gain.high < 0:
            found.append(
                f"it is worse than the champion: {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) "
                "in DINO + CLIP-T - drift"
            )
    return found


def gained(pairs: Sequence[tuple[Scores, Scores]]) -> Estimate | None:
    """How much more the first of each pair is worth than the second, with the interval of paired drawings.

    Args:
        pairs: Two scores of a subject each.

    Returns:
        `None` if no drawings of the same prompt and seed are in both.
    """
    news, olds, groups = list[float](), list[float](), list[str]()
    for number, (new, old) in enumerate(pairs):
        ours, theirs = _by_drawing(new), _by_drawing(old)
        lost = [max(scores.drift.value, 0.0) if scores.drift else 0.0 for scores in (new, old)]
        for key in (key for key in ours if key in theirs):
            news.append(ours[key] - lost[0])
            olds.append(theirs[key] - lost[1])
            groups.append(f"{number} {key[0]}")
    return difference(news, olds, groups) if groups else None


def _by_drawing(scores: Scores) -> dict[tuple[str, int], float]:
    return {(row.prompt, row.seed): row.dino + row.clip_t for row in scores.rows}
