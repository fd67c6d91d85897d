"""This file is where everything is gathered that the routes of one ingress work with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from cluster.storage import Storage
from serving.catalog import Catalog
from serving.idempotency import Idempotency
from serving.keys import Keys
from serving.metrics import Metrics
from serving.outputs import Outputs, Signer
from serving.painting import Painting
from serving.protocol import Artist, ImageOrder
from serving.settings import ServingSettings


@dataclass(frozen=True)
class Booth:
    """One ingress process, apart from HTTP."""

    settings: ServingSettings
    storage: Storage
    artist: Artist
    clock: Callable[[], float]
    keys: Keys
    catalog: Catalog
    outputs: Outputs
    idempotency: Idempotency
    metrics: Metrics

    @classmethod
    def of(
        cls, settings: ServingSettings, storage: Storage, artist: Artist, clock: Callable[[], float]
    ) -> "Booth":
        """A booth over a storage root and an artist."""
        return cls(
            settings=settings,
            storage=storage,
            artist=artist,
            clock=clock,
            keys=Keys(storage, clock, settings.catalog_s),
            catalog=Catalog(storage, settings.base, clock, settings.catalog_s),
            outputs=Outputs(storage, Signer(storage), clock, settings.retention.outputs_s),
            idempotency=Idempotency(storage, clock, settings.retention.records_s),
            metrics=Metrics(),
        )

    def painting(self, orders: Sequence[ImageOrder], deadline_s: float | None) -> Painting:
        """Images that are about to be drawn."""
        return Painting(self.artist, orders, deadline_s, self.metrics)

    def address(self, request: Request) -> str:
        """How the client reaches this ingress."""
        return self.settings.public_url or str(request.base_url).rstrip("/")
