"""This file is where it is known what Kueue 0.19 refuses of an object of KubeRay, or never admits."""

from collections.abc import Iterator, Sequence

from cluster.kuberay_rules import Told
from cluster.manifests import (
    Complaint,
    Document,
    get,
    is_ray,
    name_of,
    of_kind,
    pods_of,
    ray_cluster,
    ray_job,
)

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
WORKER_GROUPS = 17  # Kueue takes 18 sets of pods, and the head is one


def kueue_complaints(documents: Sequence[Document]) -> list[Complaint]:
    """What Kueue would refuse, or keep in its queue for ever.

    Args:
        documents: Everything that is applied together; queues that are not among it are taken to be right.
    """
    return list(_complaints(documents))


def _complaints(documents: Sequence[Document]) -> Iterator[Complaint]:
    for document in documents:
        if str(document["apiVersion"]).startswith("kueue.x-k8s.io/") and document["apiVersion"] != (
            "kueue.x-k8s.io/v1beta2"
        ):
            yield Complaint(name_of(document), "apiVersion", "is not what Kueue stores: write v1beta2")
        queue = get(document, "metadata", "labels", QUEUE_LABEL)
        if queue and is_ray(document):
            for path, text in (*_queued(document), *_admitted(document, str(queue), documents)):
                yield Complaint(name_of(document), path, text)


def _queued(document: Document) -> Told:
    """What Kueue's webhooks refuse of a queued object."""
    path, job = ray_job(document) or ("", {})
    if job and not job.get("shutdownAfterJobFinishes"):
        yield f"{path}.shutdownAfterJobFinishes", "must be true in a queue, so that the quota is given back"
    if job.get("clusterSelector"):
        yield f"{path}.clusterSelector", "a job on a cluster that is there already is not queued"
    path, spec = ray_cluster(document) or ("", {})
    groups = spec.get("workerGroupSpecs") or []
    if len(groups) > WORKER_GROUPS:
        yield f"{path}.workerGroupSpecs", f"are {len(groups)}, and a queue takes {WORKER_GROUPS}"
    elastic = (get(document, "metadata", "annotations") or {}).get(ELASTIC) == "true"
    if spec.get("enableInTreeAutoscaling") and not elastic:
        yield f"{path}.enableInTreeAutoscaling", f"needs the annotation {ELASTIC} and Kueue's gate for it"
    for i, group in enumerate(groups):
        if not elastic and group.get("minReplicas") != group.get("maxReplicas"):
            yield f"{path}.workerGroupSpecs[{i}]", "must have minReplicas = maxReplicas in a queue"


def _admitted(document: Document, queue: str, documents: Sequence[Document]) -> Told:
    """Whether the queue is there and covers what the pods ask for; only where queues are applied together with it."""
    local = {
        get(q, "metadata", "name"): get(q, "spec", "clusterQueue") for q in of_kind(documents, "LocalQueue")
    }
    if not local:
        return
    if queue not in local:
        yield f"metadata.labels.{QUEUE_LABEL}", f"there is no LocalQueue {queue}, only {', '.join(local)}"
        return
    quotas = [q for q in of_kind(documents, "ClusterQueue") if get(q, "metadata", "name") == local[queue]]
    if not quotas:
        yield f"metadata.labels.{QUEUE_LABEL}", f"its ClusterQueue {local[queue]} is not there"
        return
    covered = {r for g in get(quotas[0], "spec", "resourceGroups") or [] for r in g["coveredResources"]}
    for pod in pods_of(document):
        for path, container in pod.containers:
            for resource in sorted(set(get(container, "resources", "requests") or {}) - covered):
                yield path, f"asks for {resource}, which the ClusterQueue {local[queue]} does not cover"
