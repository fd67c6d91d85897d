"""This file is where a service becomes a RayService: a pure function; the same arguments make the same bytes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import UserError
from orchestrator.jobsize import ASSUMED_GIB, CUDA_HOST, GIB, HEAD_CPUS, HEAD_GIB, OBJECT_STORE
from orchestrator.pods import PodSettings, Spec, autoscaler, head_pod, worker_pod
from orchestrator.rayjob import DIGEST, JobOptions, digest_of, job_name
from orchestrator.service import ServiceSpec, application
from orchestrator.site import STREAM_CPUS

SERVICE = "raybooth/service"
REDIS_KEY = "password"
PORT = 8000
IDLE_S = 600  # that a pod draws nothing before the autoscaler takes it away; a model takes a while to load
SPARE_S = 30  # beyond the time that a replica has to draw what it has accepted


@dataclass(frozen=True)
class Redis:
    """Where the head keeps what must outlive it."""

    address: str
    """`HOST:PORT`."""
    secret: str
    """Secret with its password, under `REDIS_KEY`."""


@dataclass(frozen=True)
class ServiceSize:
    """What a service asks for. All worker pods are alike."""

    pods: int
    """The fewest."""
    most_pods: int
    """The most, with those that trainings take."""
    cpus: int
    gpus: int
    memory_gib: int
    assumed: bool
    """The memory is a guess."""

    def line(self) -> str:
        """For people."""
        gpus = f", {self.gpus} GPU" if self.gpus else ""
        guess = " (assumed; --memory sets it)" if self.assumed else ""
        return f"{self.pods} to {self.most_pods} pods of {self.cpus} CPUs{gpus}, {self.memory_gib} GiB{guess}"


def service_size(spec: ServiceSpec, memory_gib: int | None = None) -> ServiceSize:
    """What a service asks for.

    Args:
        spec: The service's.
        memory_gib: Of a worker pod; `None` estimates it where the base is on this machine.
    """
    replicas = spec.replicas
    gpus = ceil(replicas.gpus)
    seats = max(1, int(gpus // replicas.gpus)) if gpus else 1  # replicas on one pod
    known = spec.base == "pocket" or Path(spec.base).is_dir()
    return ServiceSize(
        pods=max(ceil(replicas.min / seats), spec.ingresses),  # which serve HTTP though all replicas sleep
        most_pods=max(ceil(replicas.max / seats), spec.ingresses) + spec.trainings.at_once,
        cpus=ceil(seats * replicas.cpus) + 1 + STREAM_CPUS,
        gpus=gpus,
        memory_gib=memory_gib or (ceil(seats * _replica_gib(spec)) + 1 if known else ASSUMED_GIB),
        assumed=memory_gib is None and not known,
    )


def _replica_gib(spec: ServiceSpec) -> float:
    """Memory of a replica: the base, what drawing takes, its subjects, and the object store's part."""
    from training.basefolder import used_files
    from training.memory import LIBRARIES
    from training.pipeline import open_base

    info = open_base(spec.base, spec.revision)
    base = sum(file.stat().st_size for file in used_files(info.path, info.kind))
    drawing = CUDA_HOST if spec.replicas.gpus else 2 * base
    taken = 2 * LIBRARIES["cpu"] + 2 * base + drawing + spec.replicas.cache_gib * GIB  # and an ingress
    return float(taken / (1 - OBJECT_STORE) / GIB)


def render_service(
    name: str, spec: ServiceSpec, size: ServiceSize, options: JobOptions, redis: Redis | None = None
) -> Spec:
    """The RayService of a service.

    Args:
        name: Its name.
        spec: What it serves; `host` and `port` are the pods' own.
        size: What it asks for.
        options: How it is deployed; queues and deadlines are for jobs.
        redis: Keeps the service up when its head is lost; `None` starts it anew then.

    Raises:
        UserError: An option or a setting cannot take effect on a cluster.
    """
    options.check()
    if spec.auth == "off":
        raise UserError("auth: off takes no effect on a cluster", "pods are no loopback", "leave auth out")
    called = job_name(name)
    pods = options.pods("service", called)
    labels = pods.labels
    body: Spec = {
        "serveConfigV2": yaml.safe_dump(_serve_config(spec), sort_keys=False, width=100),
        "upgradeStrategy": {"type": "NewCluster"},
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": _cluster(pods, spec, size, options, redis),
    }
    annotations = {SERVICE: name, DIGEST: digest_of(body, labels, asdict(options))}
    metadata = {"name": called, "namespace": options.namespace, "labels": labels, "annotations": annotations}
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": metadata, "spec": body}


def _serve_config(spec: ServiceSpec) -> Spec:
    said: Mapping[str, Any] = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    settings = {key: value for key, value in said.items() if key not in ("host", "port")}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "applications": [
            {
                "name": "raybooth",
                "import_path": f"{application.__module__}:{application.__name__}",
                "route_prefix": "/",
                "args": {"host": "0.0.0.0", **settings},
                # an ingress takes a share of a CPU, which the head has none of, and stands beside each proxy
                "deployments": [
                    {"name": "ingress", "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0.5}}
                ],
            }
        ],
    }


def _cluster(
    pods: PodSettings, spec: ServiceSpec, size: ServiceSize, options: JobOptions, redis: Redis | None
) -> Spec:
    grace_s = ceil(spec.replicas.drain_s) + SPARE_S
    cluster: Spec = {
        "rayVersion": options.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": autoscaler(IDLE_S),
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": head_pod(pods, HEAD_CPUS, HEAD_GIB, None, autoscaled=True),
        },
        "workerGroupSpecs": [
            {
                "groupName": "gpu" if size.gpus else "cpu",
                "replicas": size.pods,
                "minReplicas": size.pods,
                "maxReplicas": size.most_pods,
                "rayStartParams": {"num-cpus": str(size.cpus)},
                "template": worker_pod(
                    pods, size.cpus, size.gpus, size.memory_gib, grace_s, options.spot, port=PORT
                ),
            }
        ],
    }
    if redis:
        password = {"secretKeyRef": {"name": redis.secret, "key": REDIS_KEY}}
        cluster["gcsFaultToleranceOptions"] = {
            "redisAddress": redis.address,
            "redisPassword": {"valueFrom": password},
        }
    return cluster
