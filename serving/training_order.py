"""This file is where it is described how a training is asked for, and where what was asked is on record.

`trainings/TENANT/ID.json` is the request, `uploads/ID/` holds its photos until it has ended, and `open-trainings/ID`
says that it has not. How it stands is the trainer's to know.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.storage import Storage
from serving.ordering import Asked
from serving.predictions import made_at
from serving.tenancy import NAME

ID = re.compile(r"[0-9a-f]{32}")


class TrainingParams(Asked):
    """How it is trained; what is not given is the base's own default."""

    method: Literal["lora", "full"] | None = None
    """`lora` trains adapters, `full` everything."""
    steps: int | None = Field(default=None, ge=1, le=1_000_000)
    """Optimizer steps."""
    lr: float | None = Field(default=None, gt=0, le=1.0)
    """Learning rate."""
    rank: int | None = Field(default=None, ge=1, le=256)
    """Rank of the adapters; their scale is the same."""
    pairs_per_step: int | None = Field(default=None, ge=1, le=64)
    """Pairs of a photo and a class image per step."""
    prior_weight: float | None = Field(default=None, ge=0, le=100.0)
    """Weight of prior preservation; 0 is without."""
    prior_images: int | None = Field(default=None, ge=1, le=2000)
    """Class images; all subjects of a class share them."""
    train_text_encoder: bool | None = None
    """Train the text encoder too."""
    flip: bool | None = None
    """Also train on mirrored photos."""
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Of order, noise and timesteps."""


class TrainingRequest(Asked):
    """What `POST /v1/trainings` takes as JSON; a form has the same fields, `images` as files, `params` as JSON."""

    subject: str = Field(pattern=rf"^{NAME}$")
    """The subject's name: lower case letters, digits, `-` and `_`. One that is trained gets a new version."""
    class_noun: str = Field(alias="class", min_length=1, max_length=64)
    """Its class noun, such as `dog`."""
    image_urls: list[Annotated[str, Field(max_length=2000)]] = Field(default_factory=list, max_length=1000)
    """https URLs of its photos; 3 to 5 are enough."""
    params: TrainingParams = TrainingParams()
    """How it is trained."""
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=500)]] = Field(
        default_factory=dict, max_length=16
    )
    """Anything of yours; it is given back."""


@dataclass(frozen=True)
class Training:
    """What is on record of a request."""

    id: str
    tenant: str
    subject: str
    """As its tenant calls it."""
    stored: str
    class_noun: str
    photos: tuple[str, ...]
    """Names that they were given with."""
    notes: tuple[str, ...]
    """About the photos, for people."""
    params: dict[str, Any]
    metadata: dict[str, str]
    address: str
    created: float


class TrainingStore:
    """The trainings that were asked for under a storage root. Its methods read and write the storage.

    Args:
        storage: The root.
        clock: Seconds since the epoch.
        keep_s: How long a training is remembered.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float], keep_s: float) -> None:
        self._storage, self._clock, self._keep_s = storage, clock, keep_s

    def keep_photos(self, identity: str, photos: list[tuple[str, bytes]]) -> tuple[str, ...]:
        """Keep the photos of a training that is about to be created; where they are, for whoever trains."""
        paths = [f"uploads/{identity}/{name}" for name, _ in photos]
        for path, (_, data) in zip(paths, photos, strict=True):
            self._storage.write(path, data)
        return tuple(map(self._storage.full, paths))

    def create(self, training: Training) -> None:
        """Put a request on record."""
        self._storage.write(f"open-trainings/{training.id}", training.tenant.encode())
        self._storage.write_json(f"trainings/{training.tenant}/{training.id}.json", asdict(training))

    def find(self, tenant: str, identity: str) -> Training | None:
        """A tenant's training; `None` when there is none."""
        if not ID.fullmatch(identity):
            return None
        try:
            value = self._storage.read_json(f"trainings/{tenant}/{identity}.json")
        except FileNotFoundError:
            return None
        return Training(**{**value, "photos": tuple(value["photos"]), "notes": tuple(value["notes"])})

    def page(self, tenant: str, before: str, limit: int) -> tuple[list[Training], str | None]:
        """A tenant's trainings, the newest first, and where the next page begins; as `PredictionStore.page`."""
        ids = (name.removesuffix(".json") for name in self._storage.names(f"trainings/{tenant}"))
        names = sorted((n for n in ids if ID.fullmatch(n) and (not before or n < before)), reverse=True)
        found = [self.find(tenant, name) for name in names[:limit]]
        return [each for each in found if each], names[limit - 1] if len(names) > limit else None

    def unended(self) -> dict[str, str]:
        """Trainings that are not known to have ended, the oldest first: their tenants by id."""
        found = {}
        for identity in self._storage.names("open-trainings"):
            try:
                found[identity] = self._storage.read(f"open-trainings/{identity}").decode()
            except FileNotFoundError:
                continue
        return found

    def settle(self, identity: str) -> None:
        """A training has ended: its photos are stored with the subject by now, or not wanted."""
        self._storage.remove(f"uploads/{identity}")
        self._storage.remove(f"open-trainings/{identity}")

    def sweep(self) -> None:
        """Forget trainings whose time is over."""
        for tenant in self._storage.names("trainings"):
            for name in self._storage.names(f"trainings/{tenant}"):
                identity = name.removesuffix(".json")
                if ID.fullmatch(identity) and self._clock() > made_at(identity) + self._keep_s:
                    self._storage.remove(f"trainings/{tenant}/{name}")
