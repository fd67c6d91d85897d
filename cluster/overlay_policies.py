"""This file is where objects that are applied together are looked at together: what one names, the others must hold.

Each policy is one function from all of them to complaints.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.manifests import Complaint, Document, Pod, get, is_ray, name_of, of_kind
from cluster.pod_policies import Policy, all_pods

_REFERENCES = {  # kinds by the fields that name them
    "configMapRef": "ConfigMap",
    "configMapKeyRef": "ConfigMap",
    "configMap": "ConfigMap",
    "secretRef": "Secret",
    "secretKeyRef": "Secret",
    "persistentVolumeClaim": "PersistentVolumeClaim",
}
_CLUSTER_WIDE = (
    *("Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "StorageClass"),
    *("ClusterQueue", "ResourceFlavor", "Cohort", "WorkloadPriorityClass", "Topology"),
)


def overlay_complaints(documents: Sequence[Document]) -> list[Complaint]:
    """What does not fit together.

    Args:
        documents: Everything that is applied together, and Secrets that are made elsewhere.
    """
    return [complaint for policy in POLICIES for complaint in policy(documents)]


def namespaces_are_closed(documents: Sequence[Document]) -> Iterator[Complaint]:
    """Pods may talk to nobody unless a policy says so, and can all ask for names."""
    policies = of_kind(documents, "NetworkPolicy")
    for namespace in sorted({str(get(pod.document, "metadata", "namespace")) for pod in all_pods(documents)}):
        of = [p for p in policies if str(get(p, "metadata", "namespace")) == namespace]
        closed = [
            p
            for p in of
            if not get(p, "spec", "podSelector")
            and {"Ingress", "Egress"} <= set(get(p, "spec", "policyTypes") or ())
            and not get(p, "spec", "ingress")
            and not get(p, "spec", "egress")
        ]
        here = f"Namespace/{namespace}"
        if not closed:
            yield Complaint(here, "", "no NetworkPolicy denies everything by default")
        names = [p for p in of if not get(p, "spec", "podSelector") and 53 in _ports_out(p)]
        if not names:
            yield Complaint(here, "", "no NetworkPolicy lets all pods ask the DNS: Ray would never start")


def namespaces_enforce_the_standard(documents: Sequence[Document]) -> Iterator[Complaint]:
    """Everything that has a namespace says so, and the namespace enforces what the pods keep to."""
    there = {get(n, "metadata", "name"): n for n in of_kind(documents, "Namespace")}
    for name, namespace in there.items():
        if get(namespace, "metadata", "labels", "pod-security.kubernetes.io/enforce") != "restricted":
            yield Complaint(f"Namespace/{name}", "metadata.labels", "does not enforce restricted pods")
    for document in documents:
        namespace = get(document, "metadata", "namespace")
        if document["kind"] in _CLUSTER_WIDE:
            continue
        if namespace not in there:
            yield Complaint(
                name_of(document), "metadata.namespace", f"{namespace} is not one of {sorted(there)}"
            )


def references_are_there(documents: Sequence[Document]) -> Iterator[Complaint]:
    """Every ConfigMap, Secret, claim, account and priority that a pod names is applied with it.

    Kustomize renames generated ConfigMaps, and does not look into custom resources for their names.
    """
    there = {(str(d["kind"]), str(get(d, "metadata", "name"))) for d in documents}
    for pod in all_pods(documents):
        named = set(_named(pod.template))
        for field, kind in (("serviceAccountName", "ServiceAccount"), ("priorityClassName", "PriorityClass")):
            if name := pod.spec.get(field):
                named.add((kind, name))
        for kind, name in sorted(named - there):
            yield pod.complaint("spec", f"names the {kind} {name}, which is not there")


def selectors_select(documents: Sequence[Document]) -> Iterator[Complaint]:
    """A Service, a PodDisruptionBudget or a NetworkPolicy that selects no pod of ours does nothing, in silence."""
    pods = list(all_pods(documents))
    labels = [{**pod.labels, **_operators(pod)} for pod in pods]
    for document in of_kind(documents, "Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"):
        path = ("spec", "podSelector") if document["kind"] == "NetworkPolicy" else ("spec", "selector")
        selector = get(document, *path)
        if not selector:
            continue
        whole = {"matchLabels": selector} if document["kind"] == "Service" else selector
        if not any(_matches(whole, of) for of in labels):
            yield Complaint(name_of(document), ".".join(path), f"selects none of the pods here: {selector}")


def object_stores_get_plain_bodies(documents: Sequence[Document]) -> Iterator[Complaint]:
    """Stores other than AWS refuse trailing checksums, or keep them as part of the object."""
    for config in of_kind(documents, "ConfigMap"):
        data = config.get("data") or {}
        if "AWS_ENDPOINT_URL" in data:
            for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
                if data.get(name) != "when_required":
                    yield Complaint(
                        name_of(config), f"data.{name}", "must be when_required beside an endpoint"
                    )


POLICIES: tuple[Policy, ...] = (
    namespaces_are_closed,
    namespaces_enforce_the_standard,
    references_are_there,
    selectors_select,
    object_stores_get_plain_bodies,
)


def _ports_out(policy: Document) -> set[Any]:
    return {
        port.get("port") for rule in get(policy, "spec", "egress") or [] for port in rule.get("ports") or []
    }


def _named(value: Any) -> Iterator[tuple[str, str]]:
    """Kinds and names of what a pod template refers to."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in _REFERENCES and isinstance(item, Mapping) and not item.get("optional"):
                if name := item.get("name") or item.get("claimName"):
                    yield _REFERENCES[key], str(name)
            elif key == "secret" and get(item, "secretName") and not item.get("optional"):
                yield "Secret", str(item["secretName"])
            yield from _named(item)
    elif isinstance(value, list):
        for item in value:
            yield from _named(item)


def _operators(pod: Pod) -> dict[str, str]:
    """Labels that KubeRay adds."""
    if not is_ray(pod.document) or pod.role == "submitter":
        return {}
    added = {"ray.io/node-type": pod.role, "ray.io/is-ray-node": "yes", "ray.io/cluster": "any"}
    return {**added, "ray.io/serve": "true"} if pod.document["kind"] == "RayService" else added


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions") or []:
        key, values = expression["key"], expression.get("values", ())
        fits = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }[expression["operator"]]
        if not fits:
            return False
    return True
