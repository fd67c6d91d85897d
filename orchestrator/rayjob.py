"""This file is where a campaign becomes a RayJob: a pure function, of which the same arguments make the same bytes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from cluster.errors import UserError
from orchestrator.jobsize import HEAD_CPUS, JobSize
from orchestrator.pods import (
    MANIFEST_FOLDER,
    PodSettings,
    Spec,
    autoscaler,
    head_pod,
    submitter_pod,
    worker_pod,
)

NAME_LENGTH = 47  # of a RayJob: KubeRay makes longer names from it
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
CAMPAIGN, DIGEST = "raybooth/campaign", "raybooth/digest"
MANIFEST = "campaign.yaml"
IDLE_S = 300  # that a worker pod does nothing before the autoscaler takes it away
# They mean nothing to a shell: KubeRay puts the entrypoint into a shell script as it is, and Ray into another
_PLAIN = re.compile(r"[A-Za-z0-9_./:=@%+,-]+")


@dataclass(frozen=True)
class JobOptions:
    """How a campaign is submitted."""

    namespace: str
    image: str
    ray_version: str
    queue: str | None = None
    """LocalQueue of Kueue; `None` starts at once, with Ray's autoscaler."""
    priority: str | None = None
    """WorkloadPriorityClass of Kueue."""
    spot: bool = True
    """Workers may be put on spot nodes."""
    service_account: str = "raybooth"
    config: str = "raybooth"
    """ConfigMap with the environment."""
    secret: str = "raybooth"
    """Secret with the environment."""
    storage: str | None = None
    """Storage root, instead of the ConfigMap's."""
    pull_secret: str | None = None
    hours: float | None = None
    """Hours after which the job is ended, whatever it does; `None` is no limit."""
    wait_hours: float = 24.0
    """Hours that its pods may take to be there."""
    retries: int = 2
    """New clusters after one is lost with its head."""
    keep_s: int = 3600
    """Seconds that the cluster is kept after its end, for its logs."""

    def pods(self, component: str, name: str) -> PodSettings:
        """What all pods of a cluster share.

        Args:
            component: What they are there for: `campaign` or `service`.
            name: Of its RayJob or RayService.
        """
        labels = {
            "app.kubernetes.io/name": "raybooth",
            "app.kubernetes.io/component": component,
            "app.kubernetes.io/instance": name,
            "app.kubernetes.io/managed-by": "raybooth",
        }
        return PodSettings(
            self.image, labels, self.service_account, self.config, self.secret, self.storage, self.pull_secret
        )

    def check(self) -> None:
        """Refuse what cannot take effect.

        Raises:
            UserError: Names the option.
        """
        if self.priority and not self.queue:
            raise UserError(
                "--priority takes no effect", "it is Kueue's, and there is no --queue", "give a --queue"
            )
        tag = self.image.rpartition("/")[2]
        if "@sha256:" not in self.image and (":" not in tag or tag.endswith(":latest")):
            raise UserError(
                f"the image {self.image} is not pinned",
                "a job that is started again would run other code",
                "give a tag or a digest: --image registry.example/raybooth:0.1.0",
            )


def job_name(campaign: str) -> str:
    """The name of a campaign's RayJob: its own where that can be one, else shortened with a hash.

    Args:
        campaign: Its name.

    Returns:
        A DNS label of RFC 1035 of at most 47 letters; different for different campaigns.
    """
    name = re.sub(r"[^a-z0-9-]", "-", campaign.lower()).strip("-")
    name = name if name[:1].isalpha() else f"c-{name}".rstrip("-")
    if name == campaign and len(name) <= NAME_LENGTH:
        return name
    return f"{name[: NAME_LENGTH - 9].rstrip('-')}-{sha256(campaign.encode()).hexdigest()[:8]}"


def render_job(
    campaign: str, source: str, manifest: str | None, size: JobSize, options: JobOptions
) -> list[Spec]:
    """The objects of a campaign: its RayJob, and the ConfigMap that carries its manifest.

    Args:
        campaign: Its name.
        source: URI of the manifest, which the pods read when there is no `manifest`.
        manifest: Text of campaign.yaml, carried along; `None` has the pods read `source`.
        size: What it asks for.
        options: How it is submitted.

    Raises:
        UserError: An option cannot take effect, or the manifest's URI cannot be put into a shell's line.
    """
    options.check()
    name = job_name(campaign)
    pods = options.pods("campaign", name)
    labels = pods.labels
    carried = f"{name}-manifest" if manifest else None
    spec: Spec = {
        "entrypoint": _entrypoint(f"{MANIFEST_FOLDER}/{MANIFEST}" if carried else source, campaign, size),
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": submitter_pod(pods),
        "submitterConfig": {"backoffLimit": 2},
        "backoffLimit": options.retries,
        "preRunningDeadlineSeconds": int(options.wait_hours * 3600),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": options.keep_s,
        "rayClusterSpec": _cluster(pods, size, options, carried),
    }
    if options.hours is not None:
        spec["activeDeadlineSeconds"] = int(options.hours * 3600)
    digest = digest_of(spec, manifest, labels, asdict(options))
    spec["jobId"] = f"{name}-{digest}"
    queued = {QUEUE: options.queue, PRIORITY: options.priority}
    metadata = {
        "name": name,
        "namespace": options.namespace,
        "labels": {**labels, **{key: value for key, value in queued.items() if value}},
        "annotations": {CAMPAIGN: campaign, DIGEST: digest},
    }
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}
    return [job, _config_map(carried, manifest, metadata, labels)] if carried and manifest else [job]


def _config_map(name: str, manifest: str, job: Spec, labels: Mapping[str, str]) -> Spec:
    metadata = {
        "name": name,
        "namespace": job["namespace"],
        "labels": labels,
        "annotations": job["annotations"],
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {MANIFEST: manifest},
    }


def _entrypoint(manifest: str, campaign: str, size: JobSize) -> str:
    """The driver's command. A campaign of which some subjects failed has run to its end: the job has succeeded then,
    and is not tried again (`--partial-ok`)."""
    words: Sequence[str] = [
        *("raybooth", "campaign", "run", manifest, "--name", campaign, "--address", "auto"),
        *("--set", f"schedule.gangs={size.gangs}"),
        *("--partial-ok", "--no-watch", "--json"),
    ]
    for word in words:
        if not _PLAIN.fullmatch(word):
            raise UserError(
                f"{word} cannot be given to the cluster",
                "it has characters that mean something to a shell",
                "use letters, digits and ./:=@%+,_- alone",
            )
    return " ".join(words)


def _cluster(pods: PodSettings, size: JobSize, options: JobOptions, manifest: str | None) -> Spec:
    autoscaled = not options.queue
    group: Spec = {
        "groupName": "gpu" if size.gpus else "cpu",
        # a queue admits all pods at once, or none; the autoscaler begins with those of one gang
        "replicas": size.pods_per_gang if autoscaled else size.pods,
        "minReplicas": 0 if autoscaled else size.pods,
        "maxReplicas": size.pods,
        "rayStartParams": {"num-cpus": str(size.cpus)},
        "template": worker_pod(pods, size.cpus, size.gpus, size.memory_gib, size.grace_s, options.spot),
    }
    cluster: Spec = {
        "rayVersion": options.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": autoscaled,
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": head_pod(pods, HEAD_CPUS, size.head_memory_gib, manifest, autoscaled),
        },
        "workerGroupSpecs": [group],
    }
    if autoscaled:
        cluster["autoscalerOptions"] = autoscaler(IDLE_S)
    return cluster


def digest_of(*parts: Any) -> str:
    """A name for everything that decides what a job or a service does."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
