"""This file is where the service is put together from its parts and run: what a user types as `serve`."""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from cluster.errors import UserError
from cluster.session import resolve_address, session
from cluster.storage import Storage
from orchestrator.document import parse_document
from orchestrator.signals import Signals
from orchestrator.spec import explained
from serving.keys import Keys
from serving.replicas import Replicas
from serving.safety import SafetyGuard, SafetySettings
from serving.settings import ServingSettings
from training.section import Section, merge

TRAINING_CPUS = (
    3  # logical ones of a private Ray that trainings need beside the replicas: worker, encoder, stream
)
LOOK_S = 0.2


class Signing(Section):
    """How images are signed with C2PA manifests."""

    certificate: Path | None = None
    """The signer's chain in PEM; without one a chain is made for development, which nobody trusts."""
    key: Path | None = None
    """The signer's private key in PEM, PKCS#8."""


class ServiceSpec(ServingSettings):
    """Everything that `serve.yaml` may say."""

    revision: str | None = None
    """Of the base: the commit of a hub id."""
    port: int = 8000
    """Port that it listens on."""
    ingresses: int = 1
    """Processes that speak HTTP."""
    replicas: Replicas = Replicas()
    """Processes that draw."""
    safety: SafetySettings = SafetySettings()
    """Checks of prompts and images; none by default."""
    c2pa: Signing | None = None
    """Signs a C2PA manifest into every image; `{}` with credentials for development."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Sections of run.yaml under what clients of `/v1/trainings` give."""


def service_spec(file: Path | None, flags: Mapping[str, Any]) -> ServiceSpec:
    """The spec of a YAML file and flags; flags win.

    Raises:
        UserError: The file cannot be read, or a setting is unknown or out of range.
    """
    raw: dict[str, Any] = {}
    if file:
        try:
            raw = parse_document(file.read_text(encoding="utf-8"), str(file)).raw
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read", str(error), "give a YAML file") from error
    try:
        return ServiceSpec.model_validate(merge(raw, flags))
    except ValidationError as error:
        raise explained(error, ServiceSpec) from None


def first_token(spec: ServiceSpec, storage: Storage) -> str:
    """The token of the first key, made now; empty when there are keys, or none is asked for."""
    keys = Keys(storage, time.time)
    if spec.auth == "off" or keys.all():
        return ""
    return keys.create("first", "default")[1]


def run_service(
    spec: ServiceSpec,
    storage: Storage,
    ledger: str,
    mlflow: str | None,
    address: str | None,
    up: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C; then what was accepted is answered first.

    Args:
        spec: The service's.
        storage: Root, which every node reaches.
        ledger: URI of the record of campaigns, which trainings are.
        mlflow: Where trainings are tracked; `None` is below the root.
        address: Ray cluster to join; `None` starts a private one on this machine.
        up: Called with the URL once images can be asked for.

    Raises:
        UserError: A setting cannot take effect: a safety check that cannot be loaded, say.
        SystemFailure: The service does not come up.
    """
    from serving.app import start, stop

    built = _built(spec, storage, ledger, mlflow)
    cpus = ceil(spec.replicas.max * spec.replicas.cpus) + spec.trainings.at_once * TRAINING_CPUS
    signals = Signals()
    with signals.heard(), session(resolve_address(address), cpus, storage):
        signals.listen()  # Ray has taken them
        start(built, spec.host, spec.port)
        try:
            up(f"http://{spec.host}:{spec.port}")
            with signals.patiently():
                while not signals.leave:
                    time.sleep(LOOK_S)
        finally:
            stop()


def application(args: Mapping[str, Any]) -> Any:
    """The Serve application of a RayService, which names this function as its `import_path`.

    Storage, record and MLflow are those of the environment: RAYBOOTH_STORAGE, RAYBOOTH_LEDGER, MLFLOW_TRACKING_URI.

    Args:
        args: What serve.yaml may say; `host` and `port` are Serve's own there.

    Raises:
        UserError: A setting is unknown or cannot take effect, or RAYBOOTH_STORAGE is not set.
    """
    from orchestrator.ledger import ledger_uri

    uri = os.environ.get("RAYBOOTH_STORAGE")
    if not uri:
        raise UserError(
            "there is no storage root", "RAYBOOTH_STORAGE is not set", "set it to s3://BUCKET/PREFIX"
        )
    storage = Storage(uri)
    return _built(service_spec(None, args), storage, ledger_uri(storage.uri, None), None)


def _built(spec: ServiceSpec, storage: Storage, ledger: str, mlflow: str | None) -> Any:
    """The Serve application, every setting of it checked."""
    from serving.app import service
    from training.pipeline import open_base

    base = open_base(spec.base, spec.revision)
    SafetyGuard.of(spec.safety)  # refused now rather than in a replica that never starts
    if "sizes" not in spec.model_fields_set:
        spec = spec.model_copy(update={"sizes": (f"{base.image_size}x{base.image_size}",)})
    settings = ServingSettings.model_validate(spec.model_dump(include=set(ServingSettings.model_fields)))
    signer = (spec.c2pa.certificate, spec.c2pa.key) if spec.c2pa else None
    make = partial(make_app, ledger=ledger, mlflow=mlflow, defaults=spec.training)
    return service(settings, spec.replicas, storage, make, spec.revision, spec.ingresses, spec.safety, signer)


def make_app(
    settings: ServingSettings,
    storage: Storage,
    artist: Any,
    ledger: str,
    mlflow: str | None,
    defaults: Mapping[str, Any],
) -> Any:
    """The HTTP application with everything that it needs of this package; called in an ingress."""
    from orchestrator.erasure import Erasure
    from orchestrator.trainings import CampaignTrainer
    from serving.ingress import create_app
    from training.recipe import Track

    trainer = CampaignTrainer(storage, ledger, settings.base, "auto", defaults, Track(mlflow=mlflow))
    return create_app(settings, storage, artist, trainer, Erasure(storage, ledger, mlflow))
