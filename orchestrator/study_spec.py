"""This file is where a study is described: what is asked for, and what is found."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.space import Space
from training.decisive import decisive
from training.recipe import Run


@dataclass(frozen=True)
class StudySpec:
    """A study as it was asked for."""

    name: str
    runs: tuple[Run, ...]
    """One for each subject, with the recipe that is varied."""
    space: Space
    trials: int = 32
    search: str = "optuna"
    """`optuna`, `random` or `grid`."""
    scheduler: str = "asha"
    """`asha`, `pbt` or `none`."""
    steps: int = 0
    """Most steps of a trial; 0 takes the recipe's."""
    seed: int = 0
    num_images: int = 2
    prompts: tuple[str, ...] = ()
    """Drawn at a rung; empty takes four of the set of the first subject's class and base."""
    gangs: int = 1
    dino: str | None = None
    clip: str | None = None

    @property
    def population(self) -> bool:
        """Whether trials are members that take over one another's histories."""
        return self.scheduler == "pbt"

    @property
    def budget(self) -> int:
        """Most steps of a trial and subject."""
        return self.steps or self.runs[0].train.steps

    def as_json(self) -> dict[str, Any]:
        """What decides what is tried: a study of the same name must agree."""
        told = {key: value for key, value in asdict(self).items() if key not in ("runs", "gangs")}
        told["space"] = {key: asdict(one) for key, one in self.space.items()}
        # as in fingerprints: a setting that came later changes no study that leaves it at its default
        told["subjects"] = [
            {**run.model_dump(mode="json", include={"subject", "base"}), **decisive(run)} for run in self.runs
        ]
        plain: dict[str, Any] = json.loads(json.dumps(told))
        return plain


@dataclass
class StudyOutcome:
    """What a study found."""

    study: str
    state: str
    trials: int
    recipe: str
    """The best recipe's path or URI."""
    values: dict[str, Any]
    step: int
    """At which it was best."""
    worth: float
    gain: dict[str, float] | None
    """Over the recipe that was varied, with its interval; `None` where that is not known."""
    better: bool
    """Whether the gain is more than its interval."""
    pareto: list[dict[str, Any]]
    steps_spent: int
    steps_of_grid: int
    """That so many trials would have taken without a scheduler."""
    seconds: float
    page: str = ""
    run_id: str | None = field(default=None)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
