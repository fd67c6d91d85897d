"""This file is where what an ingress allows and keeps is set: sizes, rates, deadlines, lifetimes."""

import ipaddress
from typing import Annotated, Literal

from pydantic import Field, model_validator

from training.section import Section


class Limits(Section):
    """What one request may ask for. More is 422, naming the field; a body that is too large is 413."""

    images: int = Field(default=10, ge=1, le=10)
    """Images of one request."""
    steps: int = Field(default=100, ge=1, le=1000)
    """Denoising steps of an image."""
    prompt_chars: int = Field(default=2000, ge=1, le=32_000)
    """Letters of a prompt, and of a negative prompt; the base's own limit in tokens is lower and holds as well."""
    deadline_s: float = Field(default=60.0, gt=0, le=3600)
    """Seconds a client that waits is made to wait at most; then the answer is 504."""
    body_bytes: int = Field(default=1_000_000, ge=1000)
    """Of a request without photos."""
    upload_bytes: int = Field(default=100_000_000, ge=1000)
    """Of a request with photos, all of them together."""
    photo_bytes: int = Field(default=20_000_000, ge=1000, le=50_000_000)
    """Of one photo."""
    photos: int = Field(default=50, ge=1, le=1000)
    """Of one training."""
    training_steps: int = Field(default=2000, ge=1, le=1_000_000)
    """Optimizer steps of one training."""


class Rates(Section):
    """What one key may ask at a time, per ingress process. More is 429 with Retry-After."""

    per_minute: float = Field(default=120.0, gt=0)
    """Requests a minute, on the average; a key may have a rate of its own."""
    burst: int = Field(default=30, ge=1)
    """Requests at once after a pause."""
    at_once: int = Field(default=16, ge=1)
    """Requests that are not answered yet."""


class Predictions(Section):
    """How images that nobody waits for are drawn and kept."""

    at_once: int = Field(default=4, ge=1, le=1000)
    """Predictions that one process draws at a time."""
    waiting: int = Field(default=1000, ge=1)
    """Of one tenant that have not ended; more are 429."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """Seconds after which one that has not ended fails."""
    wait_s: float = Field(default=60.0, ge=0, le=300)
    """The longest `Prefer: wait=` there is."""
    heartbeat_s: float = Field(default=5.0, gt=0)
    """Seconds between two signs of life of a process; one that gives none for six of them is taken to be gone."""
    sweep_s: float = Field(default=10.0, gt=0)
    """Seconds between two looks for work whose process is gone, and for what has expired."""


class Trainings(Section):
    """How many trainings there may be."""

    per_tenant: int = Field(default=10, ge=1)
    """Of one tenant that have not ended; more are 429."""
    at_once: int = Field(default=1, ge=1)
    """That run at a time; the others wait their turn."""
    follow_s: float = Field(default=1.0, gt=0)
    """Seconds between two looks at one that is followed."""


class Retention(Section):
    """How long what was drawn is kept."""

    outputs_s: float = Field(default=24 * 3600.0, gt=0)
    """Seconds that images behind a URL, and predictions with theirs, are there."""
    records_s: float = Field(default=30 * 24 * 3600.0, gt=0)
    """Seconds that ended trainings and keys of idempotency are remembered."""


class Outward(Section):
    """What the ingress may reach: webhooks and photos by URL."""

    allow_loopback: bool = False
    """Also plain http, and addresses of this machine: for trying things out."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Of one webhook."""
    download_s: float = Field(default=30.0, gt=0)
    """Of one photo."""
    retries_s: tuple[Annotated[float, Field(ge=0)], ...] = (5, 30, 120, 600, 3600, 6 * 3600)
    """Pauses before a webhook is sent again; after the last it is given up."""


class ServingSettings(Section):
    """Everything about an ingress that can be set."""

    base: str = "pocket"
    """The base that is served: `pocket`, a folder in diffusers layout, or a hub id."""
    sizes: tuple[Annotated[str, Field(pattern=r"^\d{1,5}x\d{1,5}$")], ...] = Field(
        default=("64x64",), min_length=1
    )
    """Sizes that may be asked for, the base's own first: `auto` is that one."""
    host: str = "127.0.0.1"
    """Address that it listens on."""
    auth: Literal["keys", "off"] = "keys"
    """`off` asks nobody for a key: only on the loopback."""
    public_url: str | None = Field(default=None, pattern=r"^https?://[^/]+$")
    """How clients reach it, for URLs in answers; `None` takes what each request was sent to."""
    catalog_s: float = Field(default=1.0, ge=0)
    """Seconds that a look at the registry, or at a key, holds: a promotion or a revocation is seen so much later."""
    limits: Limits = Limits()
    """Of one request."""
    rates: Rates = Rates()
    """Of one key."""
    predictions: Predictions = Predictions()
    """Asynchronous images."""
    trainings: Trainings = Trainings()
    """Trainings."""
    retention: Retention = Retention()
    """Lifetimes."""
    outward: Outward = Outward()
    """Webhooks and downloads."""

    @model_validator(mode="after")
    def _closed_door(self) -> "ServingSettings":
        if self.auth == "off" and not is_loopback(self.host):
            raise ValueError(
                f"auth is off and host is {self.host}: without keys only the loopback is served; "
                "set host to 127.0.0.1, or leave auth out"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, can only be this machine."""
    name = (
        host.rpartition(":")[0] if host.count(":") == 1 or (host.startswith("[") and "]:" in host) else host
    )
    name = name.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
