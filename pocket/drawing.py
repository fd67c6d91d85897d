"""This file is where the pocket base draws for its measurements: with a progress bar, always the same settings."""

import math
from collections.abc import Iterable, Sequence

from PIL import Image

from orchestrator.progress import Stages
from training.draw import Drawer
from training.png import Pixels
from training.request import DrawRequest

STEPS, GUIDANCE = 25, 4.0


def draw(drawer: Drawer, prompts: Sequence[tuple[str, int]], title: str, stages: Stages) -> list[Image.Image]:
    """One picture for each prompt and seed, in their order."""
    requests = [DrawRequest(prompt, seed, steps=STEPS, guidance=GUIDANCE) for prompt, seed in prompts]
    pictures: list[Pixels] = []
    with stages.stage(title, len(requests)) as stage:
        for first in range(0, len(requests), drawer.studio.width):
            pictures += drawer.draw(requests[first : first + drawer.studio.width])
            stage.at(len(pictures))
    return [Image.fromarray(pixels) for pixels in pictures]


def share(hits: Iterable[bool]) -> float:
    """The part of `hits` that are true, 0 to 1; NaN of none."""
    counted = list(hits)
    return sum(counted) / len(counted) if counted else math.nan
