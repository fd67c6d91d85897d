"""This file is where the pods of a Ray cluster on Kubernetes are written down: head, workers, submitter; plain data.

They fit the restricted pod security standard, ask for as much as they are limited to, and write to memory-backed or
empty volumes alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]

HOME = "/home/raybooth"
USER_ID = 1000  # of the image's user
HEALTH_PORT = 52365  # Ray's agent on every node: raylet, and on the head the GCS; asks for no token
METRICS_PORT = 8080
GPU = "nvidia.com/gpu"
SHARED = 0.3  # of the memory: Ray's object store
MANIFEST_FOLDER = "/etc/raybooth"

# Of the clouds' spot nodes: the taint that keeps others away, and the label that all of them have.
SPOT_TAINTS = (
    {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
    {
        "key": "kubernetes.azure.com/scalesetpriority",
        "operator": "Equal",
        "value": "spot",
        "effect": "NoSchedule",
    },
    {"key": "karpenter.sh/capacity-type", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
)
SPOT_LABELS = {
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "raybooth/pool": "gpu-spot",  # of Kueue's flavors in k8s/: else it would admit a head where it cannot be put
}


@dataclass(frozen=True)
class PodSettings:
    """What all pods of a cluster share."""

    image: str
    labels: Mapping[str, str]
    service_account: str = "raybooth"
    config: str = "raybooth"
    """ConfigMap with the environment: storage, MLflow."""
    secret: str = "raybooth"
    """Secret with the environment: ledger, keys of the object store."""
    storage: str | None = None
    """Storage root, instead of the one in the ConfigMap."""
    pull_secret: str | None = None


def head_pod(
    settings: PodSettings, cpus: int, memory_gib: int, manifest: str | None, autoscaled: bool
) -> Spec:
    """The head: GCS, dashboard, and the driver of a campaign. It works for nobody else, and never on a spot node.

    Args:
        settings: Shared ones.
        cpus: Cores.
        memory_gib: Memory.
        manifest: ConfigMap with the campaign's manifest, mounted at `MANIFEST_FOLDER`; `None` mounts none.
        autoscaled: The autoscaler beside it talks to the API server, for which it needs its account's token.
    """
    container = _container("ray-head", settings, cpus, memory_gib)
    container["ports"] = [
        {"name": "gcs", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "client", "containerPort": 10001},
        {"name": "metrics", "containerPort": METRICS_PORT},
    ]
    container["lifecycle"] = {"preStop": _leaving("driver", 25)}
    pod = _pod(settings, container, memory_gib)
    if manifest:
        container["volumeMounts"].append({"name": "manifest", "mountPath": MANIFEST_FOLDER, "readOnly": True})
        pod["volumes"].append({"name": "manifest", "configMap": {"name": manifest}})
    pod["automountServiceAccountToken"] = autoscaled
    pod["terminationGracePeriodSeconds"] = 60  # the driver has 25 s to have everything saved
    pod["affinity"] = _off_spot()
    return _template(settings, pod, "head")


def worker_pod(
    settings: PodSettings,
    cpus: int,
    gpus: int,
    memory_gib: int,
    grace_s: int,
    spot: bool,
    port: int | None = None,
) -> Spec:
    """A worker.

    Args:
        settings: Shared ones.
        cpus: Cores.
        gpus: GPUs.
        memory_gib: Memory.
        grace_s: Seconds that it has to save and leave.
        spot: It may be put on a spot node.
        port: Where it serves HTTP, and is asked whether it does; `None` serves none.
    """
    container = _container("ray-worker", settings, cpus, memory_gib, gpus)
    container["ports"] = [{"name": "metrics", "containerPort": METRICS_PORT}]
    if port is not None:
        container["ports"].append({"name": "serve", "containerPort": port})
        container["readinessProbe"] = _probe("/-/healthz", port, every_s=5, times=2)
    container["lifecycle"] = {"preStop": _leaving("node", grace_s - 5)}
    pod = _pod(settings, container, memory_gib)
    pod["automountServiceAccountToken"] = False
    pod["terminationGracePeriodSeconds"] = grace_s
    if gpus:
        pod["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    if spot:
        pod["tolerations"] = [*pod.get("tolerations", []), *map(dict, SPOT_TAINTS)]
    else:
        pod["affinity"] = _off_spot()
    return _template(settings, pod, "worker")


def submitter_pod(settings: PodSettings) -> Spec:
    """The pod that hands the entrypoint to Ray and prints the driver's log."""
    container = _bare_container("ray-job-submitter", settings, "500m", "1Gi")
    pod: Spec = {**_secured(settings), "containers": [container], "volumes": _volumes()}
    pod["automountServiceAccountToken"] = False
    pod["restartPolicy"] = "Never"
    return _template(settings, pod, "submitter")


def autoscaler(idle_s: int) -> Spec:
    """Ray's autoscaler, which KubeRay puts beside the head; of version 2, which needs pods that are never restarted.

    Args:
        idle_s: Seconds that a worker pod does nothing before it is taken away.
    """
    resources = {"cpu": "500m", "memory": "512Mi"}
    return {
        "version": "v2",
        "upscalingMode": "Default",
        "idleTimeoutSeconds": idle_s,
        "env": [{"name": "HOME", "value": HOME}],
        "resources": {"requests": resources, "limits": dict(resources)},
        **_confined(),
    }


# -- parts -------------------------------------------------------------------------------------------------


def _template(settings: PodSettings, pod: Spec, role: str) -> Spec:
    return {"metadata": {"labels": {**settings.labels, "raybooth/role": role}}, "spec": pod}


def _pod(settings: PodSettings, container: Spec, memory_gib: int) -> Spec:
    shared = {
        "name": "shared",
        "emptyDir": {"medium": "Memory", "sizeLimit": f"{int(memory_gib * SHARED * 1024)}Mi"},
    }
    container["volumeMounts"].append({"name": "shared", "mountPath": "/dev/shm"})
    pod = {**_secured(settings), "containers": [container], "volumes": [*_volumes(), shared]}
    pod["restartPolicy"] = "Never"  # the operator and the autoscaler replace pods, kubelets must not
    return pod


def _secured(settings: PodSettings) -> Spec:
    pod: Spec = {
        "serviceAccountName": settings.service_account,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if settings.pull_secret:
        pod["imagePullSecrets"] = [{"name": settings.pull_secret}]
    return pod


def _volumes() -> list[Spec]:
    return [{"name": "tmp", "emptyDir": {}}, {"name": "home", "emptyDir": {}}]


def _bare_container(name: str, settings: PodSettings, cpus: str, memory: str, gpus: int = 0) -> Spec:
    resources = {"cpu": cpus, "memory": memory, **({GPU: str(gpus)} if gpus else {})}
    environment = [{"name": "HOME", "value": HOME}, {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]
    if settings.storage:
        environment.append({"name": "RAYBOOTH_STORAGE", "value": settings.storage})
    return {
        "name": name,
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "workingDir": HOME,
        "env": environment,
        "envFrom": [{"configMapRef": {"name": settings.config}}, {"secretRef": {"name": settings.secret}}],
        "resources": {"requests": resources, "limits": dict(resources)},
        **_confined(),
    }


def _confined() -> Spec:
    """A container may write to its empty volumes, and gains no rights."""
    return {
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}],
    }


def _container(name: str, settings: PodSettings, cpus: int, memory_gib: int, gpus: int = 0) -> Spec:
    container = _bare_container(name, settings, str(cpus), f"{memory_gib}Gi", gpus)
    health = "/api/healthz"
    container["startupProbe"] = _probe(health, HEALTH_PORT, every_s=5, times=60)
    container["livenessProbe"] = _probe(health, HEALTH_PORT, every_s=10, times=12)
    container["readinessProbe"] = _probe(health, HEALTH_PORT, every_s=10, times=6)
    return container


def _probe(path: str, port: int, every_s: int, times: int) -> Spec:
    get = {"path": path, "port": port}
    return {"httpGet": get, "periodSeconds": every_s, "timeoutSeconds": 5, "failureThreshold": times}


def _leaving(what: str, seconds: int) -> Spec:
    """What is done before a pod ends: it says that it is taken away, and waits until what runs has left."""
    return {"exec": {"command": ["python", "-m", "cluster.leaving", what, str(seconds)]}}


def _off_spot() -> Spec:
    terms: Sequence[Spec] = [
        {"key": key, "operator": "NotIn", "values": [value]} for key, value in SPOT_LABELS.items()
    ]
    required = {"nodeSelectorTerms": [{"matchExpressions": list(terms)}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
