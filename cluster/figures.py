"""This file is where figures of a process of a Ray cluster are handed to Ray, whose agent shows them to Prometheus.

Each node has such an agent, on port 8080; names get `ray_` in front, and those of counters `_total` behind. There is no
key to that port: no label may hold what is personal, and no subject, of which there are too many.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ray.util.metrics import Counter, Gauge, Histogram

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """Figures of one name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""

    @property
    def exported(self) -> str:
        """Its name as Prometheus reads it."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


class Figures(Protocol):
    """Takes figures."""

    def put(self, name: str, value: float, labels: Labels) -> None:
        """A gauge is now `value`; a counter has grown by it; a histogram has seen it."""


class RayFigures:
    """Those of this process. It must be part of a Ray cluster.

    Args:
        families: All that will be put.
    """

    def __init__(self, families: Iterable[Family]) -> None:
        self._metrics = {family.name: _metric(family) for family in families}

    def put(self, name: str, value: float, labels: Labels) -> None:
        """As `Figures.put`."""
        metric, tags = self._metrics[name], dict(labels)
        if isinstance(metric, Gauge):
            metric.set(value, tags=tags)
        elif isinstance(metric, Histogram):
            metric.observe(value, tags=tags)
        elif value > 0:  # Ray refuses what does not grow
            metric.inc(value, tags=tags)


def _metric(family: Family) -> Any:
    if family.kind == "gauge":
        return Gauge(family.name, family.about, tag_keys=family.labels)
    if family.kind == "counter":
        return Counter(family.name, family.about, tag_keys=family.labels)
    return Histogram(family.name, family.about, boundaries=list(family.buckets), tag_keys=family.labels)
