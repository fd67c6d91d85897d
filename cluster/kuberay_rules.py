"""This file is where it is known what KubeRay 1.7 refuses, or does nothing with, that no schema says.

Each rule is one function from an object to complaints. KubeRay states most of them in `validation.go`; an object that
breaks one is accepted by the API server and then goes nowhere.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from cluster.manifests import (
    RAY_API,
    Complaint,
    Document,
    get,
    is_ray,
    name_of,
    pods_of,
    ray_cluster,
    ray_job,
)

NAME_LIMITS = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_REDIS_ENV = ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_external_storage_namespace")

Told = Iterator[tuple[str, str]]
"""Path and text of what is wrong."""


def kuberay_complaints(documents: Sequence[Document]) -> list[Complaint]:
    """What KubeRay would refuse, or never come to an end with.

    Args:
        documents: Objects of any kind; those of others are passed over.
    """
    return [
        Complaint(name_of(document), path, text)
        for document in documents
        if is_ray(document)
        for rule in RULES
        for path, text in rule(document)
    ]


# -- any of KubeRay's objects ------------------------------------------------------------------------------


def version_is_v1(document: Document) -> Told:
    """The older v1alpha1 is still served for three kinds, and loses fields."""
    if document["apiVersion"] != RAY_API:
        yield "apiVersion", f"{document['apiVersion']} is out of date: write {RAY_API}"


def name_fits(document: Document) -> Told:
    """KubeRay makes names of pods and services from it, which must stay within 63 letters."""
    name, limit = str(get(document, "metadata", "name") or ""), NAME_LIMITS[str(document["kind"])]
    if len(name) > limit:
        yield "metadata.name", f"has {len(name)} letters, and a {document['kind']} may have {limit}"
    if not _DNS_1035.fullmatch(name):
        yield "metadata.name", f"{name!r} must begin with a letter and hold only a-z, 0-9 and -"


def needs_no_alpha_gate(document: Document) -> Told:
    """Feature gates that are off by default: without them the field does nothing or the kind is not reconciled."""
    if document["kind"] == "RayCronJob":
        yield "kind", "needs the alpha gate RayCronJob: take a CronJob that submits"
    path, spec = ray_cluster(document) or ("", {})
    if get(spec, "tlsOptions", "enabled"):
        yield f"{path}.tlsOptions", "needs the alpha gate RayClusterMTLS"
    if get(spec, "networkPolicy"):
        yield f"{path}.networkPolicy", "needs the alpha gate RayClusterNetworkPolicy: write a NetworkPolicy"
    if get(spec, "gcsFaultToleranceOptions", "backend") == "rocksdb":
        yield (
            f"{path}.gcsFaultToleranceOptions.backend",
            "needs the alpha gate GCSFaultToleranceEmbeddedStorage",
        )


# -- the cluster in them -----------------------------------------------------------------------------------


def auth_knows_ray_version(document: Document) -> Told:
    """The operator sets the token only where it knows that Ray understands it."""
    path, spec = ray_cluster(document) or ("", {})
    if get(spec, "authOptions", "mode") == "token" and _version(spec) < (2, 52):
        seen = spec.get("rayVersion") or "not set"
        yield f"{path}.rayVersion", f"is {seen}: authOptions.mode token needs 2.52.0 or newer"
    if get(spec, "authOptions", "enableK8sTokenAuth") and document["kind"] != "RayCluster":
        yield f"{path}.authOptions.enableK8sTokenAuth", f"is refused in a {document['kind']}"


def autoscaled_pods_stay_down(document: Document) -> Told:
    """The autoscaler v2 replaces pods itself; a kubelet that restarts one hands it a node it has given up."""
    _, spec = ray_cluster(document) or ("", {})
    if not _is_v2(spec):
        return
    for pod in pods_of(document):
        policy = pod.spec.get("restartPolicy")
        if pod.role in ("head", "worker") and policy not in (None, "Never"):
            yield f"{pod.path}.spec.restartPolicy", f"is {policy}: the autoscaler v2 needs Never"
        if "RAY_enable_autoscaler_v2" in _environment(pod.spec):
            yield f"{pod.path}.spec", "sets RAY_enable_autoscaler_v2 beside autoscalerOptions.version"


def groups_have_sizes(document: Document) -> Told:
    """Numbers of replicas that are defaulted one by one do not fit each other."""
    path, spec = ray_cluster(document) or ("", {})
    names: list[str] = []
    for i, group in enumerate(spec.get("workerGroupSpecs") or []):
        here, least, most = (
            f"{path}.workerGroupSpecs[{i}]",
            group.get("minReplicas"),
            group.get("maxReplicas"),
        )
        if least is None or most is None:
            yield here, "must set minReplicas and maxReplicas"
        elif not least <= group.get("replicas", least) <= most:
            yield here, f"replicas {group.get('replicas', least)} is not between {least} and {most}"
        if group.get("groupName") in names:
            yield f"{here}.groupName", f"{group['groupName']} is there twice"
        names.append(group.get("groupName", ""))
        if group.get("priority") is not None and not (_version(spec) >= (2, 56) and _is_v2(spec)):
            yield f"{here}.priority", "needs Ray 2.56 and the autoscaler v2"


def labels_are_a_field(document: Document) -> Told:
    """Ray's node labels have a field of their own."""
    path, spec = ray_cluster(document) or ("", {})
    for here, group in _groups(path, spec):
        if "labels" in (group.get("rayStartParams") or {}):
            yield f"{here}.rayStartParams.labels", "is refused: write them as the group's labels"


def head_does_no_work(document: Document) -> Told:
    """A task that fills the head takes the whole cluster with it."""
    path, spec = ray_cluster(document) or ("", {})
    if spec and spec.get("workerGroupSpecs") and _head_cpus(spec) != "0":
        yield f"{path}.headGroupSpec.rayStartParams", 'must set num-cpus: "0" where there are workers'


def redis_is_said_once(document: Document) -> Told:
    """What gcsFaultToleranceOptions sets must not be set beside it, and its environment not without it."""
    path, spec = ray_cluster(document) or ("", {})
    options = get(spec, "gcsFaultToleranceOptions")
    annotated = "ray.io/ft-enabled" in (get(document, "metadata", "annotations") or {})
    set_here = [
        (pod, name) for pod in pods_of(document) for name in _environment(pod.spec) if name in _REDIS_ENV
    ]
    if options is None:
        for pod, name in set_here if not annotated else ():
            yield f"{pod.path}.spec", f"sets {name} without gcsFaultToleranceOptions"
        return
    if annotated:
        yield "metadata.annotations", "ray.io/ft-enabled is set beside gcsFaultToleranceOptions"
    if "externalStorageNamespace" in options:
        yield f"{path}.gcsFaultToleranceOptions.externalStorageNamespace", "must be left to KubeRay"
    if options.get("backend", "redis") == "redis" and not options.get("redisAddress"):
        yield f"{path}.gcsFaultToleranceOptions.redisAddress", "is missing"
    for pod, name in set_here:
        yield f"{pod.path}.spec", f"sets {name} beside gcsFaultToleranceOptions"
    if "redis-password" in (get(spec, "headGroupSpec", "rayStartParams") or {}):
        yield f"{path}.headGroupSpec.rayStartParams.redis-password", "is set beside gcsFaultToleranceOptions"


def only_clusters_upgrade(document: Document) -> Told:
    """The cluster inside a job or a service is not upgraded by itself."""
    path, spec = ray_cluster(document) or ("", {})
    if document["kind"] != "RayCluster" and get(spec, "upgradeStrategy"):
        yield f"{path}.upgradeStrategy", f"is refused in a {document['kind']}"


# -- jobs --------------------------------------------------------------------------------------------------


def job_cleans_up_one_way(document: Document) -> Told:
    """Rules of deletion and the older shutdown with its TTL exclude each other."""
    path, spec = ray_job(document) or ("", {})
    rules = get(spec, "deletionStrategy", "deletionRules")
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield f"{path}.deletionStrategy", "excludes shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield f"{path}.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true"
    _, cluster = ray_cluster(document) or ("", {})
    for i, rule in enumerate(rules or []):
        if rule.get("policy") == "DeleteWorkers" and cluster.get("enableInTreeAutoscaling"):
            yield f"{path}.deletionStrategy.deletionRules[{i}]", "DeleteWorkers is refused with autoscaling"


def job_has_its_own_cluster(document: Document) -> Told:
    """What a job can do to a cluster that it was only lent, and to one that is started suspended."""
    path, spec = ray_job(document) or ("", {})
    if spec.get("clusterSelector"):
        for field in ("suspend", "backoffLimit", "rayClusterSpec"):
            if spec.get(field):
                yield f"{path}.{field}", "is refused with clusterSelector"
    elif spec and not spec.get("rayClusterSpec"):
        yield f"{path}.rayClusterSpec", "is missing, and there is no clusterSelector"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield f"{path}.suspend", "needs shutdownAfterJobFinishes: true"


def job_is_submitted(document: Document) -> Told:
    """How the entrypoint gets to the cluster."""
    path, spec = ray_job(document) or ("", {})
    mode = spec.get("submissionMode", "K8sJobMode")
    if spec and mode != "InteractiveMode" and not spec.get("entrypoint"):
        yield f"{path}.entrypoint", "is missing"
    if mode == "InteractiveMode" and (spec.get("backoffLimit") or spec.get("jobId")):
        yield f"{path}.submissionMode", "InteractiveMode excludes backoffLimit and jobId"
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if spec.get(field):
                yield f"{path}.{field}", "is refused with SidecarMode"
        head = get(spec, "rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
        if head not in (None, "Never"):
            yield f"{path}.rayClusterSpec.headGroupSpec", f"has restartPolicy {head}: SidecarMode needs Never"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if field in spec and spec[field] <= 0:
            yield f"{path}.{field}", f"is {spec[field]}: it must be more than 0"


# -- services ----------------------------------------------------------------------------------------------


def upgrade_can_go_in_steps(document: Document) -> Told:
    """An incremental upgrade moves traffic by a Gateway, and replicas by the autoscaler."""
    strategy = get(document, "spec", "upgradeStrategy") or {}
    if document["kind"] != "RayService" or strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    options = strategy.get("clusterUpgradeOptions") or {}
    if not get(document, "spec", "rayClusterConfig", "enableInTreeAutoscaling"):
        yield "spec.rayClusterConfig.enableInTreeAutoscaling", "must be true for an incremental upgrade"
    for field in ("gatewayClassName", "stepSizePercent", "intervalSeconds"):
        if not options.get(field):
            yield f"spec.upgradeStrategy.clusterUpgradeOptions.{field}", "is missing"
    step, surge = options.get("stepSizePercent", 0), options.get("maxSurgePercent", 100)
    if step > surge:
        yield (
            "spec.upgradeStrategy.clusterUpgradeOptions",
            f"stepSizePercent {step} is above the surge {surge}",
        )


def serve_config_is_read(document: Document) -> Told:
    """It is a text: no schema looks into it, and a mistake there is found by the dashboard of a running cluster."""
    text = get(document, "spec", "serveConfigV2")
    if document["kind"] != "RayService" or text is None:
        return
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield "spec.serveConfigV2", f"is not YAML: {str(error).splitlines()[0]}"
        return
    applications = get(config, "applications")
    if not applications or not all(app.get("import_path") for app in applications):
        yield "spec.serveConfigV2", "names no application with an import_path"


RULES: tuple[Callable[[Document], Told], ...] = (
    version_is_v1,
    name_fits,
    needs_no_alpha_gate,
    auth_knows_ray_version,
    autoscaled_pods_stay_down,
    groups_have_sizes,
    labels_are_a_field,
    head_does_no_work,
    redis_is_said_once,
    only_clusters_upgrade,
    job_cleans_up_one_way,
    job_has_its_own_cluster,
    job_is_submitted,
    upgrade_can_go_in_steps,
    serve_config_is_read,
)


# -- small things ------------------------------------------------------------------------------------------


def _version(spec: Mapping[str, Any]) -> tuple[int, ...]:
    """Of Ray, as numbers; none when it is not set."""
    return tuple(map(int, re.findall(r"\d+", str(spec.get("rayVersion") or ""))[:2]))


def _is_v2(spec: Mapping[str, Any]) -> bool:
    """Whether the autoscaler is on and is v2, which newer versions of Ray take by default."""
    wanted = get(spec, "autoscalerOptions", "version")
    by_default = wanted is None and _version(spec) >= (2, 47)
    return bool(spec.get("enableInTreeAutoscaling")) and (wanted == "v2" or by_default)


def _groups(path: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield f"{path}.headGroupSpec", get(spec, "headGroupSpec") or {}
    for i, group in enumerate(spec.get("workerGroupSpecs") or []):
        yield f"{path}.workerGroupSpecs[{i}]", group


def _head_cpus(spec: Mapping[str, Any]) -> Any:
    return get(spec, "headGroupSpec", "rayStartParams", "num-cpus")


def _environment(spec: Mapping[str, Any]) -> list[str]:
    """Names of the variables that containers of a pod set themselves."""
    return [
        variable["name"]
        for container in spec.get("containers") or []
        for variable in container.get("env") or []
    ]
