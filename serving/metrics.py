"""This file is where the ingress counts what it does, for Prometheus. No label holds a subject, a tenant or a key."""

from collections.abc import Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The figures of one ingress process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "raybooth_requests", "Requests answered", ("method", "route", "status"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "raybooth_request_seconds",
            "From a request to the end of its answer",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.generate_seconds = Histogram(
            "raybooth_generate_seconds",
            "From an order to its image",
            ("model",),  # `base` or `subject`
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.images = Counter(
            "raybooth_images", "Images asked for, by outcome", ("outcome",), registry=self.registry
        )
        self.predictions = Counter(
            "raybooth_predictions", "Predictions ended, by status", ("status",), registry=self.registry
        )
        self.predictions_open = Gauge(
            "raybooth_predictions_open", "Predictions of this process", registry=self.registry
        )
        self.taken_over = Counter(
            "raybooth_predictions_taken_over", "Predictions whose process was gone", registry=self.registry
        )
        self.webhooks = Counter(
            "raybooth_webhook_deliveries", "Webhooks sent, by outcome", ("outcome",), registry=self.registry
        )
        self.deletions = Counter("raybooth_deletions", "Subjects deleted", registry=self.registry)
        self._stats: dict[str, Gauge] = {}

    def exposed(self, stats: Mapping[str, float]) -> bytes:
        """All figures as text, those of the replicas with them.

        Args:
            stats: Of the artist, by name.
        """
        for name, value in stats.items():
            if name not in self._stats:
                about = f"Of the replicas: {name.replace('_', ' ')}"
                self._stats[name] = Gauge(f"raybooth_replica_{name}", about, registry=self.registry)
            self._stats[name].set(value)
        return generate_latest(self.registry)
