"""This file is where it is decided whether a run still gains, by the scores of its drawings. It knows no clock."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from training.stop_settings import Stop


@dataclass(frozen=True)
class Look:
    """What was found of a run's drawings after a number of steps."""

    step: int
    score: float
    """DINO + CLIP-T - drift: the higher, the better."""
    dino: float
    clip_t: float
    drift: float
    loss: float | None = None
    """The validation loss at that step; `None` where none was taken."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Patience:
    """The looks at a run, and what follows from them.

    Args:
        stop: Of the recipe.
        looks: Those before, as `as_json` made them.
    """

    def __init__(self, stop: Stop, looks: Iterable[Mapping[str, Any]] = ()) -> None:
        self._stop = stop
        self.looks = [Look(**look) for look in looks]

    def add(self, look: Look) -> None:
        """Take the next look."""
        self.looks.append(look)

    def has(self, step: int) -> bool:
        """Whether there was a look after `step` steps."""
        return any(look.step == step for look in self.looks)

    @property
    def best(self) -> Look | None:
        """The last look that was a gain over the best one before it; the first one is."""
        best: Look | None = None
        for look in self.looks:
            if best is None or look.score > best.score + self._stop.min_gain:
                best = look
        return best

    @property
    def over(self) -> bool:
        """Whether as many looks as there is patience for came after the best one."""
        best = self.best
        return best is not None and sum(look.step > best.step for look in self.looks) >= self._stop.patience
