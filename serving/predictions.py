"""This file is where predictions are on record: images that nobody waits for, whichever process draws them.

`predictions/TENANT/ID/record.json` is written by the one process that has the prediction, its images lie beside it, and
`pending/PROCESS/ID` says that it has not ended: what lies there of a process that is gone, another takes over. An id
begins with its time, so that names alone tell the order and what has expired.
"""

import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cluster.storage import Storage
from serving.catalog import Model
from serving.ordering import ImageInput, orders_of
from serving.presence import Presence
from serving.protocol import ImageOrder

ENDED = ("succeeded", "failed", "canceled")
FREE = "free"  # where a process that leaves puts what it has not done
ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Prediction:
    """What is on record. Times are seconds since the epoch."""

    id: str
    tenant: str
    model: str
    """As it was asked for."""
    subject: str
    """As it is stored; `base` for the base."""
    version: str
    input: Mapping[str, Any]
    """With its seed and its guidance, so that whoever draws it draws the same."""
    address: str
    """Of the ingress that was asked."""
    created: float
    expires: float
    status: str = "starting"
    owner: str | None = None
    """The process that has it."""
    started: float | None = None
    completed: float | None = None
    error: Mapping[str, Any] | None = None
    webhook: str | None = None
    webhook_events: tuple[str, ...] = ()
    webhook_tries: int = 0
    webhook_state: str | None = None
    """`delivered` or `given up`; `None` before."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing more is drawn."""
        return self.status in ENDED

    @property
    def folder(self) -> str:
        """Where it lies."""
        return f"predictions/{self.tenant}/{self.id}"

    @property
    def count(self) -> int:
        """Its images."""
        return int(self.input["n"])

    def image(self, number: int) -> str:
        """Where an image of it lies."""
        return f"{self.folder}/{number}.png"

    def orders(self) -> list[ImageOrder]:
        """What draws it."""
        asked = ImageInput.model_validate(self.input)
        model = Model(self.model, self.subject, self.version, 0, float(asked.guidance_scale or 1.0))
        return orders_of(f"pre-{self.id}", asked, model, None, progress=True)


def new_id(now: float) -> str:
    """An id that begins with its time."""
    return f"{int(now * 1000):011x}{secrets.token_hex(11)[:21]}"


def made_at(identity: str) -> float:
    """When an id was made."""
    return int(identity[:11], 16) / 1000


class PredictionStore:
    """The predictions under a storage root. Its methods read and write the storage: call them in a thread.

    Args:
        storage: The root.
        presence: This process.
        clock: Seconds since the epoch.
        keep_s: How long a prediction is there.
    """

    def __init__(
        self, storage: Storage, presence: Presence, clock: Callable[[], float], keep_s: float
    ) -> None:
        self._storage, self._presence, self._clock, self._keep_s = storage, presence, clock, keep_s

    def create(self, prediction: Prediction) -> Prediction:
        """Put a new prediction on record, as this process's. Once it returns, the prediction survives it."""
        mine = replace(prediction, owner=self._presence.id)
        self._mark(
            mine
        )  # first: a mark without a record is nothing, a record without one would wait for ever
        self.write(mine)
        return mine

    def write(self, prediction: Prediction) -> None:
        """Put its state on record."""
        self._storage.write_json(f"{prediction.folder}/record.json", asdict(prediction))

    def find(self, tenant: str, identity: str) -> Prediction | None:
        """A tenant's prediction; `None` when there is none, or it has expired."""
        if not ID.fullmatch(identity) or self._is_old(identity):
            return None
        try:
            value = self._storage.read_json(f"predictions/{tenant}/{identity}/record.json")
        except FileNotFoundError:
            return None
        return Prediction(**{**value, "webhook_events": tuple(value["webhook_events"])})

    def page(self, tenant: str, before: str, limit: int) -> tuple[list[Prediction], str | None]:
        """A tenant's predictions, the newest first, and where the next page begins.

        Args:
            tenant: Whose.
            before: Only those older than this id; empty for the newest.
            limit: The most.
        """
        names = sorted((n for n in self._names(tenant) if not before or n < before), reverse=True)
        found = [self.find(tenant, name) for name in names[:limit]]
        more = names[limit - 1] if len(names) > limit else None
        return [prediction for prediction in found if prediction], more

    def keep(self, prediction: Prediction, number: int, png: bytes) -> None:
        """Keep one of its images."""
        self._storage.write(prediction.image(number), png)

    def missing(self, prediction: Prediction) -> list[int]:
        """The numbers of its images that are not there."""
        there = set(self._storage.names(prediction.folder))
        return [number for number in range(prediction.count) if f"{number}.png" not in there]

    def drop_images(self, prediction: Prediction) -> None:
        """Remove what was drawn of it."""
        for number in range(prediction.count):
            self._storage.remove(prediction.image(number))

    def remove(self, prediction: Prediction) -> None:
        """Remove it with all that is of it."""
        self._storage.remove(prediction.folder)
        self.settle(prediction)

    # -- cancelling ----------------------------------------------------------------------------------------

    def wish_cancelled(self, prediction: Prediction) -> None:
        """Ask the process that has it to give it up."""
        self._storage.write(f"{prediction.folder}/cancel", b"")

    def is_cancelled(self, prediction: Prediction) -> bool:
        """Whether that was asked."""
        return self._storage.exists(f"{prediction.folder}/cancel")

    # -- who has what --------------------------------------------------------------------------------------

    def settle(self, prediction: Prediction) -> None:
        """Nothing of it is left to do."""
        self._storage.remove(f"pending/{self._presence.id}/{prediction.id}")

    def release(self, prediction: Prediction) -> None:
        """Leave it to whoever comes first."""
        self._storage.write(f"pending/{FREE}/{prediction.id}", prediction.tenant.encode())
        self.settle(prediction)

    def mine(self, known: Collection[str]) -> list[Prediction]:
        """What is on record as this process's, and has not been settled, but for the ids that are known."""
        folder, found = f"pending/{self._presence.id}", []
        for name in set(self._storage.names(folder)) - set(known):
            with suppress(FileNotFoundError):  # settled at this moment
                found.append(self.find(self._storage.read(f"{folder}/{name}").decode(), name))
        return [prediction for prediction in found if prediction]

    def take_over(self) -> list[Prediction]:
        """Take what has not ended and is no living process's; those that are this process's now."""
        others = [name for name in self._storage.names("pending") if name != self._presence.id]
        gone = [name for name in others if name == FREE or not self._presence.lives(name)]
        left = {name: self._storage.names(f"pending/{name}") for name in gone}
        if not any(left.values()):
            for name in set(gone) - {FREE}:
                self._storage.remove(f"pending/{name}")
            return []
        with self._storage.lock("locks/predictions"):
            return [taken for name in gone for taken in self._take(name)]

    def _take(self, owner: str) -> Iterator[Prediction]:
        for identity in self._storage.names(f"pending/{owner}"):
            path = f"pending/{owner}/{identity}"
            try:
                tenant = self._storage.read(path).decode()
            except FileNotFoundError:
                continue
            found = self.find(tenant, identity)
            if (found and found.owner in (owner, None)) or (found and owner == FREE):
                mine = replace(found, owner=self._presence.id)
                self._mark(mine)
                self.write(mine)
                yield mine
            self._storage.remove(path)

    def _mark(self, prediction: Prediction) -> None:
        self._storage.write(f"pending/{self._presence.id}/{prediction.id}", prediction.tenant.encode())

    # -- the end -------------------------------------------------------------------------------------------

    def sweep(self) -> int:
        """Remove what has expired; how many went."""
        old = [
            f"predictions/{tenant}/{name}"
            for tenant in self._storage.names("predictions")
            for name in self._storage.names(f"predictions/{tenant}")
            if ID.fullmatch(name) and self._is_old(name)
        ]
        for path in old:
            self._storage.remove(path)
        return len(old)

    def of_subject(self, stored: str) -> list[Prediction]:
        """Every prediction of a subject, whoever's."""
        found = (
            self.find(tenant, name)
            for tenant in self._storage.names("predictions")
            for name in self._names(tenant)
        )
        return [prediction for prediction in found if prediction and prediction.subject == stored]

    def _names(self, tenant: str) -> list[str]:
        names = self._storage.names(f"predictions/{tenant}")
        return [name for name in names if ID.fullmatch(name) and not self._is_old(name)]

    def _is_old(self, identity: str) -> bool:
        return self._clock() > made_at(identity) + self._keep_s
