"""This file is where it is said what we ask of every manifest of ours, beyond what Kubernetes accepts.

Each policy is one function from all objects to complaints; what they must be to each other is `overlay_policies`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cluster.manifests import (
    GPU,
    Complaint,
    Document,
    Pod,
    get,
    name_of,
    of_kind,
    pods_of,
    ray_cluster,
)

SPOT_TAINTS = (
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
    "karpenter.sh/capacity-type",
)
GRACE_S = 30  # a checkpoint takes up to 25 s after SIGTERM or a notice
AUTOSCALER = "head of a cluster that scales itself"
_SECRET = re.compile(r"(PASSWORD|TOKEN|SECRET|API_KEY|ACCESS_KEY)", re.IGNORECASE)
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
Policy = Callable[[Sequence[Document]], Iterator[Complaint]]


def policy_complaints(documents: Sequence[Document], pinned: bool = False) -> list[Complaint]:
    """What our policies have against documents.

    Args:
        documents: Everything that is applied together.
        pinned: Images must be named by digest.
    """
    found = [complaint for policy in POLICIES for complaint in policy(documents)]
    return found + list(_pinned(documents) if pinned else ())


# -- images, resources, probes -----------------------------------------------------------------------------


def images_have_versions(documents: Sequence[Document]) -> Iterator[Complaint]:
    """The same manifest starts the same program tomorrow."""
    for pod, path, container in _containers(documents):
        image = str(container.get("image") or "")
        _, colon, tag = image.rpartition("/")[2].partition(":")
        if not _DIGEST.search(image) and (not colon or tag == "latest"):
            yield _of(pod, f"{path}.image", f"{image!r} has no version")


def _pinned(documents: Sequence[Document]) -> Iterator[Complaint]:
    for pod, path, container in _containers(documents):
        if not _DIGEST.search(str(container.get("image") or "")):
            yield _of(pod, f"{path}.image", f"{container.get('image')!r} is not pinned by its digest")


def requests_equal_limits(documents: Sequence[Document]) -> Iterator[Complaint]:
    """Ray counts what a pod may use as if it were all there, and a node that is short of memory kills who is above."""
    for pod, path, container in _containers(documents):
        requests, limits = (get(container, "resources", of) or {} for of in ("requests", "limits"))
        for resource in sorted({"cpu", "memory", *requests, *limits}):
            if resource not in requests or requests[resource] != limits.get(resource):
                seen = f"{requests.get(resource)} and {limits.get(resource)}"
                yield _of(
                    pod, f"{path}.resources", f"requests and limits of {resource} are {seen}, not equal"
                )


def lasting_pods_are_probed(documents: Sequence[Document]) -> Iterator[Complaint]:
    """What should always run says how it is; the probes that KubeRay adds need wget, which the image has not."""
    for pod in all_pods(documents):
        if pod.role in ("head", "worker", "lasting"):
            for i, container in enumerate(pod.spec.get("containers") or []):
                for probe in ("readinessProbe", "livenessProbe"):
                    if probe not in container:
                        yield pod.complaint(f"spec.containers[{i}]", f"has no {probe}")


# -- security ----------------------------------------------------------------------------------------------


def pods_are_restricted(documents: Sequence[Document]) -> Iterator[Complaint]:
    """The restricted pod security standard, and a root filesystem that cannot be written."""
    for pod in all_pods(documents):
        context = pod.spec.get("securityContext") or {}
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(field):
                yield pod.complaint(f"spec.{field}", "is set")
        for volume in pod.spec.get("volumes") or []:
            if "hostPath" in volume:
                yield pod.complaint("spec.volumes", f"{volume['name']} is a folder of the node")
        contexts = [(path, c.get("securityContext") or {}) for path, c in pod.containers]
        if "securityContext" in (autoscaler := _autoscaler(pod)):
            contexts.append(("autoscalerOptions", autoscaler["securityContext"]))
        elif autoscaler:
            yield pod.complaint("spec", "is joined by the autoscaler: set autoscalerOptions.securityContext")
        for path, own in contexts:
            whole = {**context, **own}
            for field, wanted in (
                ("runAsNonRoot", True),
                ("allowPrivilegeEscalation", False),
                ("readOnlyRootFilesystem", True),
            ):
                if whole.get(field) is not wanted:
                    yield _of(pod, f"{path}.securityContext.{field}", f"is not {str(wanted).lower()}")
            if get(whole, "seccompProfile", "type") != "RuntimeDefault":
                yield _of(pod, f"{path}.securityContext.seccompProfile", "is not RuntimeDefault")
            if get(own, "capabilities", "drop") != ["ALL"] or get(own, "capabilities", "add"):
                yield _of(pod, f"{path}.securityContext.capabilities", "does not drop ALL")
            if own.get("privileged") or whole.get("runAsUser") == 0:
                yield _of(pod, f"{path}.securityContext", "runs as root")


def tokens_are_for_those_who_ask(documents: Sequence[Document]) -> Iterator[Complaint]:
    """A pod holds a token of the Kubernetes API only if a role is bound to its account, or it scales its cluster."""
    bound = {
        subject["name"]
        for binding in of_kind(documents, "RoleBinding", "ClusterRoleBinding")
        for subject in binding.get("subjects") or []
        if subject["kind"] == "ServiceAccount"
    }
    for pod in all_pods(documents):
        may = pod.spec.get("serviceAccountName") in bound or bool(_autoscaler(pod))
        if pod.spec.get("automountServiceAccountToken") is not False and not may:
            yield pod.complaint("spec.automountServiceAccountToken", "is not false, and no role is bound")


def roles_name_what_they_allow(documents: Sequence[Document]) -> Iterator[Complaint]:
    """No wildcards."""
    for role in of_kind(documents, "Role", "ClusterRole"):
        for i, rule in enumerate(role.get("rules") or []):
            for field in ("apiGroups", "resources", "verbs"):
                if "*" in rule.get(field, ()):
                    yield Complaint(name_of(role), f"rules[{i}].{field}", "allows everything")


def secrets_are_secrets(documents: Sequence[Document]) -> Iterator[Complaint]:
    """Nothing that must not be read lies in a manifest; who can read a pod could read it."""
    for pod, path, container in _containers(documents):
        for variable in container.get("env") or []:
            if _SECRET.search(variable["name"]) and variable.get("value"):
                yield _of(pod, f"{path}.env", f"{variable['name']} has its value here: take it from a Secret")
    for config in of_kind(documents, "ConfigMap"):
        for key in config.get("data") or {}:
            if _SECRET.search(key):
                yield Complaint(name_of(config), f"data.{key}", "belongs into a Secret")


# -- where pods run ----------------------------------------------------------------------------------------


def gpu_pods_tolerate_gpu_nodes(documents: Sequence[Document]) -> Iterator[Complaint]:
    """Nodes with GPUs are tainted, so that nothing else fills them."""
    for pod in all_pods(documents):
        asks = any(GPU in (get(c, "resources", "limits") or {}) for _, c in pod.containers)
        if asks and GPU not in _tolerated(pod):
            yield pod.complaint("spec.tolerations", f"asks for {GPU} and does not tolerate its taint")
        if asks and not any(get(v, "emptyDir", "medium") == "Memory" for v in pod.spec.get("volumes") or []):
            yield pod.complaint("spec.volumes", "has no memory at /dev/shm, which NCCL needs")


def spot_pods_have_time(documents: Sequence[Document]) -> Iterator[Complaint]:
    """A pod that may be reclaimed saves first; the head, whose loss ends everything, is not on spot nodes."""
    for pod in all_pods(documents):
        on_spot = sorted(_tolerated(pod).intersection(SPOT_TAINTS))
        if pod.role == "head" and on_spot:
            yield pod.complaint("spec.tolerations", f"lets the head onto spot nodes ({on_spot[0]})")
        if pod.role in ("head", "worker"):
            grace = pod.spec.get("terminationGracePeriodSeconds", 30)
            if grace <= GRACE_S:
                yield pod.complaint(
                    "spec.terminationGracePeriodSeconds", f"{grace} leaves no {GRACE_S} s to save"
                )


def clusters_ask_for_a_token(documents: Sequence[Document]) -> Iterator[Complaint]:
    """Whoever reaches a Ray cluster without one runs code in it."""
    for document in documents:
        if cluster := ray_cluster(document):
            path, spec = cluster
            if get(spec, "authOptions", "mode") != "token":
                yield Complaint(name_of(document), f"{path}.authOptions.mode", "is not token")


POLICIES: tuple[Policy, ...] = (
    images_have_versions,
    requests_equal_limits,
    lasting_pods_are_probed,
    pods_are_restricted,
    tokens_are_for_those_who_ask,
    roles_name_what_they_allow,
    secrets_are_secrets,
    gpu_pods_tolerate_gpu_nodes,
    spot_pods_have_time,
    clusters_ask_for_a_token,
)


# -- small things ------------------------------------------------------------------------------------------


def all_pods(documents: Sequence[Document]) -> Iterator[Pod]:
    for document in documents:
        yield from pods_of(document)


def _containers(documents: Sequence[Document]) -> Iterator[tuple[Pod, str, Mapping[str, Any]]]:
    for pod in all_pods(documents):
        for path, container in pod.containers:
            yield pod, path, container


def _of(pod: Pod, path: str, text: str) -> Complaint:
    return Complaint(name_of(pod.document), path, text)


def _autoscaler(pod: Pod) -> Mapping[str, Any]:
    """Options of the autoscaler that KubeRay puts beside a head; empty where it puts none."""
    _, spec = ray_cluster(pod.document) or ("", {})
    if pod.role != "head" or not spec.get("enableInTreeAutoscaling"):
        return {}
    return {"by": AUTOSCALER, **(spec.get("autoscalerOptions") or {})}


def _tolerated(pod: Pod) -> set[str]:
    return {str(toleration.get("key")) for toleration in pod.spec.get("tolerations") or []}
