"""This file is where Kubernetes documents are read: whose they are, which pods they ask for, what is wrong with one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.errors import UserError

Document = Mapping[str, Any]
"""One Kubernetes object, as its YAML says."""

RAY_API = "ray.io/v1"
GPU = "nvidia.com/gpu"
_CLUSTER = {
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
    "RayCronJob": ("spec", "jobTemplate", "rayClusterSpec"),
}
_TEMPLATE = {
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
_LASTING = ("Deployment", "StatefulSet", "DaemonSet")


@dataclass(frozen=True)
class Complaint:
    """What is wrong with a document."""

    object: str
    """Such as `RayJob/campaign`."""
    path: str
    """Of the field, such as `spec.backoffLimit`."""
    text: str
    """What was seen, and what it should be."""

    def __str__(self) -> str:
        return f"{self.object}: {self.path}: {self.text}" if self.path else f"{self.object}: {self.text}"


@dataclass(frozen=True)
class Pod:
    """A pod that a document asks for."""

    document: Document
    path: str
    """Of its template."""
    role: str
    """`head`, `worker` or `submitter` of Ray; else `lasting` or `task`."""
    template: Mapping[str, Any]

    @property
    def spec(self) -> Mapping[str, Any]:
        """Its PodSpec."""
        return get(self.template, "spec") or {}

    @property
    def labels(self) -> Mapping[str, str]:
        """That its template gives; an operator adds more."""
        return get(self.template, "metadata", "labels") or {}

    @property
    def containers(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Path and container of all of them, those that initialize first."""
        return [
            (f"{self.path}.spec.{field}[{i}]", container)
            for field in ("initContainers", "containers")
            for i, container in enumerate(self.spec.get(field) or [])
        ]

    def complaint(self, path: str, text: str) -> Complaint:
        """Of this pod; `path` is below its template."""
        return Complaint(name_of(self.document), f"{self.path}.{path}", text)


def load_documents(text: str, source: str = "the manifest") -> list[Document]:
    """The objects in a text of YAML documents; empty ones are left out.

    Args:
        text: YAML, or JSON.
        source: What errors call it.

    Raises:
        UserError: It is no YAML, or holds something that is no object of Kubernetes.
    """
    try:
        loaded = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML", str(error).replace("\n", " "), "mend it there") from None
    for document in loaded:
        if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
            raise UserError(
                f"{source} holds what is no object of Kubernetes",
                str(document)[:80],
                "give apiVersion, kind and metadata",
            )
    return loaded


def name_of(document: Document) -> str:
    """`Kind/name`."""
    return (
        f"{document['kind']}/{get(document, 'metadata', 'name') or get(document, 'metadata', 'generateName')}"
    )


def get(value: Any, *path: str) -> Any:
    """What lies at a path of keys; `None` when there is nothing."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def is_ray(document: Document) -> bool:
    """Whether it is one of KubeRay's."""
    return str(document["apiVersion"]).startswith("ray.io/")


def ray_cluster(document: Document) -> tuple[str, Mapping[str, Any]] | None:
    """Path and RayClusterSpec of one of KubeRay's objects; `None` when it has none of its own."""
    path = _CLUSTER.get(str(document["kind"])) if is_ray(document) else None
    spec = get(document, *path) if path else None
    return (".".join(path), spec) if path and isinstance(spec, Mapping) else None


def ray_job(document: Document) -> tuple[str, Mapping[str, Any]] | None:
    """Path and RayJobSpec of a RayJob or a RayCronJob."""
    path = {"RayJob": ("spec",), "RayCronJob": ("spec", "jobTemplate")}.get(str(document["kind"]))
    spec = get(document, *path) if path and is_ray(document) else None
    return (".".join(path), spec) if path and isinstance(spec, Mapping) else None


def pods_of(document: Document) -> Iterator[Pod]:
    """The pods that a document asks for; none for those that ask for none."""
    kind = str(document["kind"])
    if is_ray(document):
        if job := ray_job(document):
            path, spec = job
            if template := get(spec, "submitterPodTemplate"):
                yield Pod(document, f"{path}.submitterPodTemplate", "submitter", template)
        if cluster := ray_cluster(document):
            path, spec = cluster
            head = get(spec, "headGroupSpec", "template") or {}
            yield Pod(document, f"{path}.headGroupSpec.template", "head", head)
            for i, group in enumerate(spec.get("workerGroupSpecs") or []):
                template = get(group, "template") or {}
                yield Pod(document, f"{path}.workerGroupSpecs[{i}].template", "worker", template)
    elif kind == "Pod":
        yield Pod(document, "", "lasting", document)
    elif kind in _TEMPLATE:
        path = ".".join(_TEMPLATE[kind])
        role = "lasting" if kind in _LASTING else "task"
        yield Pod(document, path, role, get(document, *_TEMPLATE[kind]) or {})


def of_kind(documents: Sequence[Document], *kinds: str) -> list[Document]:
    """Those of some kinds."""
    return [document for document in documents if document["kind"] in kinds]
