"""What the checks are for: each mistake, made in an overlay that has none, is found."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cluster.kuberay_rules import RULES as RULES_OF_KUBERAY
from cluster.kuberay_rules import kuberay_complaints
from cluster.manifests import Document, is_ray
from cluster.overlay_policies import POLICIES as OVERLAY_POLICIES
from cluster.pod_policies import POLICIES as POD_POLICIES
from k8s.check.__main__ import complaints
from k8s.check.crds import Crds, with_defaults

Doc = dict[str, Any]
Make = Callable[[list[Doc]], None]


def one(documents: list[Doc], kind: str, name: str | None = None) -> Doc:
    return next(d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"]))


def job(documents: list[Doc]) -> Doc:
    spec: Doc = one(documents, "RayJob")["spec"]
    return spec


def job_cluster(documents: list[Doc]) -> Doc:
    spec: Doc = job(documents)["rayClusterSpec"]
    return spec


def service(documents: list[Doc]) -> Doc:
    spec: Doc = one(documents, "RayService")["spec"]
    return spec


def service_cluster(documents: list[Doc]) -> Doc:
    spec: Doc = service(documents)["rayClusterConfig"]
    return spec


def head(cluster: Doc) -> Doc:
    spec: Doc = cluster["headGroupSpec"]["template"]["spec"]
    return spec


def worker(cluster: Doc) -> Doc:
    spec: Doc = cluster["workerGroupSpecs"][0]["template"]["spec"]
    return spec


def container(pod: Doc) -> Doc:
    first: Doc = pod["containers"][0]
    return first


def put(where: Callable[[list[Doc]], Doc], **fields: Any) -> Make:
    """Set fields; `None` removes one."""

    def make(documents: list[Doc]) -> None:
        for key, value in fields.items():
            if value is None:
                where(documents).pop(key)
            else:
                where(documents)[key] = value

    return make


def named(kind: str, name: str, old: str | None = None) -> Make:
    return lambda d: one(d, kind, old)["metadata"].update(name=name)


def without(kind: str, name: str) -> Make:
    def make(documents: list[Doc]) -> None:
        documents.remove(one(documents, kind, name))

    return make


def env(pod: Callable[[list[Doc]], Doc], name: str, value: str) -> Make:
    return lambda d: container(pod(d)).setdefault("env", []).append({"name": name, "value": value})


def queue(documents: list[Doc]) -> Doc:
    spec: Doc = one(documents, "ClusterQueue")["spec"]
    return spec


def job_head(documents: list[Doc]) -> Doc:
    return head(job_cluster(documents))


def job_worker(documents: list[Doc]) -> Doc:
    return worker(job_cluster(documents))


def job_group(documents: list[Doc]) -> Doc:
    group: Doc = job_cluster(documents)["workerGroupSpecs"][0]
    return group


def service_group(documents: list[Doc]) -> Doc:
    group: Doc = service_cluster(documents)["workerGroupSpecs"][0]
    return group


def mlflow(documents: list[Doc]) -> Doc:
    spec: Doc = one(documents, "Deployment", "mlflow")["spec"]["template"]["spec"]
    return spec


def redis(documents: list[Doc]) -> Doc:
    options: Doc = service_cluster(documents)["gcsFaultToleranceOptions"]
    return options


def config(documents: list[Doc]) -> Doc:
    data: Doc = one(documents, "ConfigMap", "raybooth")["data"]
    return data


def surge(documents: list[Doc]) -> Doc:
    options: Doc = service(documents)["upgradeStrategy"]["clusterUpgradeOptions"]
    return options


def many_groups(documents: list[Doc]) -> None:
    groups = job_cluster(documents)["workerGroupSpecs"]
    for i in range(17):
        groups.append({**copy.deepcopy(groups[0]), "groupName": f"more-{i}"})


def twice(documents: list[Doc]) -> None:
    groups = job_cluster(documents)["workerGroupSpecs"]
    groups.append(copy.deepcopy(groups[0]))


RULES = [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]
SCALES = {"enableInTreeAutoscaling": True}
WRITABLE = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": False,
    "capabilities": {"drop": ["ALL"]},
}
SAME_PORTS = [{"name": "a", "containerPort": 1}, {"name": "b", "containerPort": 1}]

# name: (overlay, the mistake, words of the complaint)
MISTAKES: Mapping[str, tuple[str, Make, str]] = {
    # by the schemas of Kubernetes
    "a misspelt field": ("dev", put(mlflow, containres=[]), "containres"),
    "a field of the wrong type": ("dev", put(lambda d: one(d, "Deployment")["spec"], replicas="two"), "two"),
    "a kind that nobody knows": ("dev", lambda d: one(d, "Service").update(kind="Servise"), "nor a CRD has Servise"),
    "an API that is gone": ("dev", lambda d: one(d, "CronJob").update(apiVersion="batch/v1beta1"), "batch/v1beta1"),
    "an object twice": ("dev", lambda d: d.append(copy.deepcopy(one(d, "Service"))), "is there twice"),
    # by the CRDs
    "a misspelt field of a RayJob": ("prod", put(job, backofLimit=1), "backofLimit"),
    "a misspelt field of its pods": ("prod", put(lambda d: container(job_head(d)), imagee="x"), "imagee"),
    "a lost template": ("prod", put(job_group, template=None), "'template' is a required property"),
    "a number that is text": ("prod", put(job, backoffLimit="3"), "'3' is not of type 'integer'"),
    "a rule of CEL": ("prod", put(job, managedBy="me"), "managedBy"),
    "a rule of CEL in a list": (
        "prod",
        lambda d: one(d, "ResourceFlavor", "gpu-spot")["spec"]["tolerations"][0].update(effect="Perhaps"),
        "effect",
    ),
    "a rule of CEL between lists": (
        "prod",
        lambda d: queue(d)["resourceGroups"][0]["coveredResources"].pop(),
        "the same number of resources",
    ),
    "one port twice": ("prod", lambda d: container(job_head(d)).update(ports=SAME_PORTS), "twice"),
    "a version that nobody serves": (
        "prod",
        lambda d: one(d, "RayJob").update(apiVersion="ray.io/v2"),
        "no CRD serves RayJob",
    ),
    # by KubeRay
    "an old version": ("prod", lambda d: one(d, "RayJob").update(apiVersion="ray.io/v1alpha1"), "unexpected"),
    "a name too long": ("prod", named("RayJob", "c" * 48), "has 48 letters, and a RayJob may have 47"),
    "a name that begins with a digit": ("prod", named("RayService", "9lives"), "must begin with a letter"),
    "TLS behind an alpha gate": ("prod", put(job_cluster, tlsOptions={"enabled": True}), "RayClusterMTLS"),
    "policies behind an alpha gate": (
        "prod",
        put(job_cluster, networkPolicy={"mode": "DenyAll"}),
        "RayClusterNetworkPolicy",
    ),
    "storage behind an alpha gate": ("prod", put(redis, backend="rocksdb"), "GCSFaultToleranceEmbeddedStorage"),
    "a token without a version": ("prod", put(job_cluster, rayVersion=None), "authOptions.mode token needs 2.52.0"),
    "a token and an old Ray": ("prod", put(job_cluster, rayVersion="2.51.0"), "is 2.51.0"),
    "a token of Kubernetes": (
        "prod",
        put(job_cluster, authOptions={"mode": "token", "enableK8sTokenAuth": True}),
        "enableK8sTokenAuth: is refused in a RayJob",
    ),
    "a head that restarts": ("prod", put(lambda d: head(service_cluster(d)), restartPolicy="Always"), "needs Never"),
    "a worker that restarts": (
        "prod",
        put(lambda d: worker(service_cluster(d)), restartPolicy="OnFailure"),
        "is OnFailure: the autoscaler v2 needs Never",
    ),
    "the autoscaler said twice": (
        "prod",
        env(lambda d: head(service_cluster(d)), "RAY_enable_autoscaler_v2", "1"),
        "sets RAY_enable_autoscaler_v2",
    ),
    "replicas out of range": ("prod", put(job_group, replicas=5), "replicas 5 is not between 2 and 2"),
    "a group twice": ("prod", twice, "gpu is there twice"),
    "a priority for an old Ray": ("prod", put(service_cluster, rayVersion="2.55.0"), "needs Ray 2.56"),
    "labels as a parameter": (
        "prod",
        lambda d: job_group(d)["rayStartParams"].update(labels="a=b"),
        "rayStartParams.labels: is refused",
    ),
    "a head that works": ("prod", lambda d: job_cluster(d)["headGroupSpec"]["rayStartParams"].clear(), "num-cpus"),
    "Redis by annotation too": (
        "prod",
        lambda d: one(d, "RayService")["metadata"].update(annotations={"ray.io/ft-enabled": "true"}),
        "ray.io/ft-enabled is set beside",
    ),
    "Redis by environment too": (
        "prod",
        env(lambda d: head(service_cluster(d)), "RAY_REDIS_ADDRESS", "redis:6379"),
        "sets RAY_REDIS_ADDRESS beside",
    ),
    "Redis by environment alone": ("prod", env(job_head, "RAY_REDIS_ADDRESS", "r:1"), "without gcsFaultTolerance"),
    "a namespace in Redis": ("prod", put(redis, externalStorageNamespace="x"), "must be left to KubeRay"),
    "an upgrade of a part": ("prod", put(job_cluster, upgradeStrategy={"type": "Recreate"}), "is refused in a RayJob"),
    "two ways to clean up": ("prod", put(job, deletionStrategy={"deletionRules": RULES}), "excludes shutdown"),
    "a TTL without an end": ("dev", put(job, shutdownAfterJobFinishes=False), "needs shutdownAfterJobFinishes"),
    "workers deleted under the autoscaler": (
        "dev",
        lambda d: (
            job(d).update(deletionStrategy={"deletionRules": [{**RULES[0], "policy": "DeleteWorkers"}]}),
            job_cluster(d).update(SCALES),
        ),
        "DeleteWorkers is refused",
    ),
    "a suspended job that stays": (
        "dev",
        put(job, suspend=True, shutdownAfterJobFinishes=None, ttlSecondsAfterFinished=None),
        "spec.suspend: needs shutdownAfterJobFinishes",
    ),
    "a borrowed cluster": (
        "dev",
        put(job, clusterSelector={"ray.io/cluster": "x"}),
        "backoffLimit: is refused with clusterSelector",
    ),
    "a job without a cluster": ("dev", put(job, rayClusterSpec=None), "rayClusterSpec: is missing"),
    "nothing to run": ("dev", put(job, entrypoint=None), "entrypoint: is missing"),
    "a sidecar with a pod": ("dev", put(job, submissionMode="SidecarMode"), "is refused with SidecarMode"),
    "an interactive job with an id": ("dev", put(job, submissionMode="InteractiveMode"), "InteractiveMode excludes"),
    "no time at all": ("dev", put(job, activeDeadlineSeconds=0), "it must be more than 0"),
    "steps without the autoscaler": ("prod", put(service_cluster, enableInTreeAutoscaling=False), "must be true for"),
    "steps without a gateway": ("prod", put(surge, gatewayClassName=""), "gatewayClassName: is missing"),
    "steps above the surge": ("prod", put(surge, stepSizePercent=60), "stepSizePercent 60 is above the surge 40"),
    "a Serve config that is no YAML": ("prod", put(service, serveConfigV2="a: [b"), "is not YAML"),
    "a Serve config of nothing": ("prod", put(service, serveConfigV2="applications: []"), "names no application"),
    # by Kueue
    "an old API of Kueue": (
        "prod",
        lambda d: one(d, "WorkloadPriorityClass", "batch").update(apiVersion="kueue.x-k8s.io/v1beta1"),
        "write v1beta2",
    ),
    "a queued job that stays": (
        "prod",
        put(job, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=None),
        "must be true in a queue",
    ),
    "too many groups": ("prod", many_groups, "are 18, and a queue takes 17"),
    "a queued job that grows": ("prod", put(job_cluster, **SCALES), "needs the annotation"),
    "a queued group of any size": ("prod", put(job_group, minReplicas=1), "minReplicas = maxReplicas in a queue"),
    "a queue that is not there": ("prod", named("LocalQueue", "cpu"), "there is no LocalQueue gpu, only cpu"),
    "a quota that is not there": ("prod", named("ClusterQueue", "other"), "ClusterQueue raybooth is not there"),
    "a resource without quota": (
        "prod",
        lambda d: [
            container(job_worker(d))["resources"][of].update({"ephemeral-storage": "1Gi"})
            for of in ("requests", "limits")
        ],
        "asks for ephemeral-storage, which the ClusterQueue raybooth does not cover",
    ),
    # by our policies
    "the latest image": ("dev", put(lambda d: container(mlflow(d)), image="mlflow:latest"), "has no version"),
    "an image without a tag": ("dev", put(lambda d: container(mlflow(d)), image="r.io:5000/mlflow"), "no version"),
    "a tag where digests are asked for": (
        "prod",
        put(lambda d: container(mlflow(d)), image="mlflow:3.18.0"),
        "is not pinned by its digest",
    ),
    "more than was asked for": (
        "prod",
        lambda d: container(job_worker(d))["resources"]["limits"].update(memory="64Gi"),
        "requests and limits of memory are 48Gi and 64Gi",
    ),
    "no probe": ("prod", put(lambda d: container(job_worker(d)), readinessProbe=None), "has no readinessProbe"),
    "a pod that may be root": ("prod", lambda d: job_worker(d)["securityContext"].pop("runAsNonRoot"), "runAsNonRoot"),
    "a disk that is written": ("prod", put(lambda d: container(mlflow(d)), securityContext=WRITABLE), "readOnlyRoot"),
    "no seccomp profile": ("prod", lambda d: job_head(d)["securityContext"].pop("seccompProfile"), "RuntimeDefault"),
    "a capability": (
        "prod",
        lambda d: container(mlflow(d))["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
        "does not drop ALL",
    ),
    "a folder of the node": (
        "prod",
        lambda d: mlflow(d)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
        "is a folder of the node",
    ),
    "an autoscaler of any user": (
        "prod",
        lambda d: service_cluster(d)["autoscalerOptions"].pop("securityContext"),
        "autoscalerOptions.securityContext",
    ),
    "a token that nobody needs": ("prod", put(job_worker, automountServiceAccountToken=True), "no role is bound"),
    "a role for everything": ("prod", lambda d: one(d, "Role")["rules"][0].update(verbs=["*"]), "allows everything"),
    "a password in the manifest": ("prod", env(mlflow, "DB_PASSWORD", "x"), "take it from a Secret"),
    "a password in a ConfigMap": ("prod", lambda d: config(d).update(AWS_SECRET_ACCESS_KEY="x"), "into a Secret"),
    "an open namespace": ("prod", without("NetworkPolicy", "default-deny"), "denies everything by default"),
    "a namespace without names": ("prod", without("NetworkPolicy", "dns"), "lets all pods ask the DNS"),
    "a namespace for anything": (
        "prod",
        lambda d: one(d, "Namespace")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"),
        "does not enforce restricted",
    ),
    "an object elsewhere": (
        "prod",
        lambda d: one(d, "Service", "mlflow")["metadata"].update(namespace="default"),
        "default is not one of",
    ),
    "a GPU behind its taint": ("prod", put(job_worker, tolerations=None), "does not tolerate its taint"),
    "a GPU without memory to share": (
        "prod",
        lambda d: [v["emptyDir"].pop("medium", None) for v in job_worker(d)["volumes"]],
        "/dev/shm",
    ),
    "a head on spot nodes": (
        "prod",
        put(job_head, tolerations=[{"key": "cloud.google.com/gke-spot", "operator": "Exists"}]),
        "lets the head onto spot nodes",
    ),
    "no time to save": ("prod", put(job_worker, terminationGracePeriodSeconds=30), "leaves no 30 s to save"),
    "a cluster without a token": ("prod", put(job_cluster, authOptions=None), "authOptions.mode: is not token"),
    "a ConfigMap that was renamed": (
        "prod",
        named("ConfigMap", "raybooth-campaign-7f9k", "raybooth-campaign"),
        "names the ConfigMap raybooth-campaign, which is not there",
    ),
    "an account that is not there": ("prod", without("ServiceAccount", "raybooth-data"), "names the ServiceAccount"),
    "a priority that is not there": ("prod", without("PriorityClass", "raybooth-batch"), "names the PriorityClass"),
    "a Service of nothing": (
        "prod",
        lambda d: one(d, "Service", "mlflow")["spec"]["selector"].update({"app.kubernetes.io/name": "ml"}),
        "selects none of the pods",
    ),
    "a budget of nothing": (
        "prod",
        lambda d: one(d, "PodDisruptionBudget", "booth-head")["spec"]["selector"]["matchLabels"].update(a="b"),
        "selects none of the pods",
    ),
    "trailing checksums": ("dev", lambda d: config(d).pop("AWS_REQUEST_CHECKSUM_CALCULATION"), "when_required"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, overlays: Mapping[str, list[Document]], crds: Crds) -> None:
    overlay, make, words = MISTAKES[mistake]
    documents: list[Doc] = copy.deepcopy([dict(d) for d in overlays[overlay]])
    make(documents)
    found = [str(c) for c in complaints(documents, crds, pinned=overlay == "prod")]
    assert any(words in text for text in found), found or "nothing was found"


def test_nulls_and_defaults_are_what_the_api_server_makes_of_them(crds: Crds) -> None:
    schema: Doc = {
        "type": "object",
        "properties": {
            "kept": {"type": "string", "nullable": True},
            "dropped": {"type": "string"},
            "filled": {
                "type": "object",
                "default": {},
                "properties": {"deep": {"type": "integer", "default": 3}},
            },
        },
    }
    assert with_defaults({"kept": None, "dropped": None}, schema) == {"kept": None, "filled": {"deep": 3}}


@pytest.mark.parametrize(
    ("version", "kind", "words"),
    [
        ("v1alpha1", "RayCluster", "write ray.io/v1"),
        ("v1", "RayCronJob", "needs the alpha gate RayCronJob"),
    ],
)
def test_what_an_operator_would_leave_alone_is_found(version: str, kind: str, words: str) -> None:
    document = {"apiVersion": f"ray.io/{version}", "kind": kind, "metadata": {"name": "a"}, "spec": {}}
    assert any(words in str(c) for c in kuberay_complaints([document]))


def test_every_rule_and_policy_is_proven_by_a_mistake(overlays: Mapping[str, list[Document]]) -> None:
    """A rule that no mistake of the table sets off could be gone without anybody noticing."""
    silent = {rule.__name__ for rule in (*RULES_OF_KUBERAY, *POD_POLICIES, *OVERLAY_POLICIES)}
    for overlay, make, _ in MISTAKES.values():
        documents: list[Doc] = copy.deepcopy([dict(d) for d in overlays[overlay]])
        make(documents)
        silent -= {
            rule.__name__ for rule in RULES_OF_KUBERAY if any(any(rule(d)) for d in documents if is_ray(d))
        }
        silent -= {policy.__name__ for policy in (*POD_POLICIES, *OVERLAY_POLICIES) if any(policy(documents))}
    assert silent - {"references_are_there"} == set()  # which needs the Secrets made elsewhere
