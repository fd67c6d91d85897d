"""This file is where Ray Serve on a cluster finds the service: the builder that a Serve config names."""

import os
from typing import Any

from cluster.errors import UserError
from cluster.storage import Storage
from orchestrator.ledger import ledger_uri
from orchestrator.service import ServiceSpec, make_service

IMPORT_PATH = "orchestrator.deployment:build"


def build(args: dict[str, Any]) -> Any:
    """The Serve application of a config's `args`, which are the settings of serve.yaml.

    Storage and ledger come from the environment of the pods: RAYBOOTH_STORAGE, RAYBOOTH_LEDGER, MLFLOW_TRACKING_URI.

    Raises:
        UserError: RAYBOOTH_STORAGE is not set or a folder of one pod, or a setting cannot take effect.
    """
    root = os.environ.get("RAYBOOTH_STORAGE", "")
    if "://" not in root:
        raise UserError(
            "the service has no storage that all its pods reach",
            f"RAYBOOTH_STORAGE is {root!r}",
            "set it to s3://BUCKET/PREFIX in the pods' ConfigMap",
        )
    spec = ServiceSpec.model_validate(args)
    return make_service(spec, Storage(root), ledger_uri(root, None), os.environ.get("MLFLOW_TRACKING_URI"))
