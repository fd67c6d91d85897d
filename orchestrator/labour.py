"""This file is where it is named what a controller has done for it: the real works on Ray, or works that do nothing."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from orchestrator.facts import Fact
from orchestrator.recovery import Size
from orchestrator.roster import Outline


class Works(Protocol):
    """The work of a campaign. Every method returns at once; what comes of it is told as facts."""

    def outline(self, run: int, size: Size) -> Outline:
        """What is known of a run before anything is done for it; raises `UserError`."""
        ...

    def width(self, bank_key: str) -> int | None:
        """How many runs of a key are trained together; `None` until that is measured."""
        ...

    def check(self, run: int, size: Size) -> None:
        """Begin to make a run ready."""
        ...

    def draw_first(self, prior_keys: Sequence[str]) -> None:
        """The order in which prior sets are drawn."""
        ...

    def staff(self, live: Mapping[Any, int], active: Mapping[Any, int]) -> None:
        """Have gangs come and go.

        Args:
            live: By kind the groups that have not ended.
            active: Those of them that are ready or train.
        """
        ...

    def free(self, kind: Any) -> int:
        """How many gangs of this kind could begin now."""
        ...

    def train(self, kind: Any, slots: Sequence[int | None]) -> str:
        """Hand runs to a free gang; returns its name."""
        ...

    def measure(self, kind: Any, run: int) -> None:
        """Have a free gang measure how many runs such as this one are best trained together."""
        ...

    def drop(self, run: int) -> None:
        """End a run that trains."""
        ...

    def publish(self, run: int, metrics: Mapping[str, float]) -> None:
        """Put a run's artifact on record."""
        ...

    def end(self, run: int, state: str, reason: str | None) -> None:
        """Nothing more is done for a run."""
        ...

    def facts(self, wait_s: float) -> list[Fact]:
        """What happened since the last call; waits up to `wait_s` seconds."""
        ...

    def leave(self) -> bool:
        """Have what trains saved and left; `False` when nothing does."""
        ...

    @property
    def spent(self) -> Mapping[str, float]:
        """Seconds of `worker`, `cpu` and `gpu` held since the start of this controller."""
        ...
