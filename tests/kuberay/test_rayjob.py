"""A campaign becomes a RayJob: every field, what the schema says, and what a mistake in it would be."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import UserError
from orchestrator.jobsize import JobSize, job_size
from orchestrator.manifest import load_campaign
from orchestrator.portable import portable_manifest
from orchestrator.rayjob import JobOptions, job_name, render_job

SIZE = JobSize(
    device="cuda",
    gangs=4,
    pods=8,
    pods_per_gang=2,
    cpus=7,
    gpus=1,
    memory_gib=32,
    head_memory_gib=5,
    grace_s=90,
    assumed=False,
)
OPTIONS = JobOptions("team-a", "registry.example/raybooth:0.1.0", "2.60.0", queue="gpu", priority="batch")


def rendered(
    options: JobOptions = OPTIONS, size: JobSize = SIZE, manifest: str | None = "name: night\n"
) -> Any:
    return render_job("night", "s3://b/night.yaml", manifest, size, options)


def spec_of(pod: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return pod["spec"], pod["spec"]["containers"][0]


def test_a_queued_job_has_every_field_that_it_needs() -> None:
    job, config = rendered()
    meta, spec, cluster = job["metadata"], job["spec"], job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"], meta["name"], meta["namespace"]) == (
        "ray.io/v1",
        "RayJob",
        "night",
        "team-a",
    )
    assert meta["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert meta["labels"]["kueue.x-k8s.io/priority-class"] == "batch"
    assert meta["labels"]["app.kubernetes.io/managed-by"] == "raybooth"
    assert meta["annotations"]["raybooth/campaign"] == "night"
    assert spec["jobId"] == f"night-{meta['annotations']['raybooth/digest']}"
    assert spec["entrypoint"] == (
        "raybooth campaign run /etc/raybooth/campaign.yaml --name night --address auto "
        "--set schedule.gangs=4 --partial-ok --no-watch --json"
    )
    assert spec["submissionMode"] == "K8sJobMode"
    assert (spec["backoffLimit"], spec["preRunningDeadlineSeconds"]) == (2, 24 * 3600)
    assert "activeDeadlineSeconds" not in spec
    # Kueue wants its quota back by this; KubeRay refuses deletion rules beside it
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] == 3600
    assert "deletionStrategy" not in spec
    assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"] == "2.60.0"
    assert cluster["enableInTreeAutoscaling"] is False and "autoscalerOptions" not in cluster
    [group] = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (8, 8, 8)
    assert config["data"] == {"campaign.yaml": "name: night\n"}
    assert config["metadata"]["name"] == "night-manifest"


def test_a_job_without_a_queue_is_scaled_by_ray_and_begins_with_one_gang() -> None:
    cluster = rendered(replace(OPTIONS, queue=None, priority=None))[0]["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    options = cluster["autoscalerOptions"]
    assert (options["version"], options["idleTimeoutSeconds"]) == ("v2", 300)
    assert options["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    [group] = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 0, 8)
    assert cluster["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is True


def test_the_head_works_for_nobody_and_stays_off_spot_nodes() -> None:
    head = rendered()[0]["spec"]["rayClusterSpec"]["headGroupSpec"]
    pod, container = spec_of(head["template"])
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "tolerations" not in pod and pod["automountServiceAccountToken"] is False
    [term] = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert {"key": "eks.amazonaws.com/capacityType", "operator": "NotIn", "values": ["SPOT"]} in term[
        "matchExpressions"
    ]
    assert container["lifecycle"]["preStop"]["exec"]["command"][2:] == ["cluster.leaving", "driver", "25"]
    assert pod["terminationGracePeriodSeconds"] > 25
    assert {"name": "manifest", "mountPath": "/etc/raybooth", "readOnly": True} in container["volumeMounts"]


def test_a_worker_tolerates_spot_nodes_and_has_time_to_save() -> None:
    [group] = rendered()[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod, container = spec_of(group["template"])
    keys = [toleration["key"] for toleration in pod["tolerations"]]
    assert keys[0] == "nvidia.com/gpu" and "cloud.google.com/gke-spot" in keys
    assert pod["terminationGracePeriodSeconds"] == 90
    assert container["lifecycle"]["preStop"]["exec"]["command"][2:] == ["cluster.leaving", "node", "85"]
    assert group["rayStartParams"] == {"num-cpus": "7"}
    limits = {"cpu": "7", "memory": "32Gi", "nvidia.com/gpu": "1"}
    assert container["resources"] == {"requests": limits, "limits": limits}


def test_workers_may_be_kept_off_spot_nodes() -> None:
    [group] = rendered(replace(OPTIONS, spot=False))[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod, _ = spec_of(group["template"])
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert "nodeAffinity" in pod["affinity"]


def test_all_pods_are_restricted_never_restarted_and_get_their_secrets_from_a_secret() -> None:
    spec = rendered()[0]["spec"]
    cluster = spec["rayClusterSpec"]
    templates = [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    templates += [group["template"] for group in cluster["workerGroupSpecs"]]
    for template in templates:
        pod, container = spec_of(template)
        assert pod["restartPolicy"] == "Never"
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["envFrom"] == [
            {"configMapRef": {"name": "raybooth"}},
            {"secretRef": {"name": "raybooth"}},
        ]
        assert container["image"] == OPTIONS.image
        if template is not templates[0]:
            assert container["livenessProbe"] and container["readinessProbe"]
            assert {"name": "shared", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_the_same_submission_is_the_same_bytes_and_another_has_another_job_id() -> None:
    assert rendered() == rendered()
    ids = [
        rendered()[0]["spec"]["jobId"],
        rendered(manifest="name: other\n")[0]["spec"]["jobId"],
        rendered(size=replace(SIZE, pods=9))[0]["spec"]["jobId"],
        rendered(replace(OPTIONS, image="registry.example/raybooth:0.2.0"))[0]["spec"]["jobId"],
    ]
    assert len(set(ids)) == len(ids)


def test_a_manifest_in_the_object_store_is_read_there() -> None:
    [job] = rendered(manifest=None)
    assert " run s3://b/night.yaml " in job["spec"]["entrypoint"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "manifest" not in [volume["name"] for volume in head["volumes"]]


@pytest.mark.parametrize(
    "place", ["s3://b/a campaign.yaml", "s3://b/$(id).yaml", "s3://b/a;b.yaml", "s3://b/`x`.yaml"]
)
def test_a_word_that_means_something_to_a_shell_is_refused(place: str) -> None:
    with pytest.raises(UserError, match="cannot be given to the cluster"):
        render_job("night", place, None, SIZE, OPTIONS)


@pytest.mark.parametrize(
    ("campaign", "name"),
    [
        ("night", "night"),
        ("a-1", "a-1"),
        ("7days", None),
        ("under_score", None),
        ("x" * 63, None),
        ("a-", None),
    ],
)
def test_names_are_dns_labels_of_47_letters(campaign: str, name: str | None) -> None:
    found = job_name(campaign)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found) and len(found) <= 47
    assert found == (name or found) and (name is not None or found != campaign)


def test_different_campaigns_have_different_names() -> None:
    names = [job_name(c) for c in ("a_b", "a-b", "a--b", "x" * 48, "x" * 49, "1", "c-1")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("image", ["raybooth", "raybooth:latest", "registry.example:5000/raybooth"])
def test_an_image_that_is_not_pinned_is_refused(image: str) -> None:
    with pytest.raises(UserError, match="not pinned"):
        rendered(replace(OPTIONS, image=image))


def test_a_priority_without_a_queue_is_refused() -> None:
    with pytest.raises(UserError, match="--priority takes no effect"):
        rendered(replace(OPTIONS, queue=None))


# -- the schema --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", ["gpu", None])
@pytest.mark.parametrize("hours", [None, 6.0])
def test_the_schema_of_kuberay_has_nothing_against_it(
    complaints: Callable[[Any], list[str]], queue: str | None, hours: float | None
) -> None:
    options = replace(OPTIONS, queue=queue, priority=None, hours=hours, storage="s3://b/x", pull_secret="r")
    assert complaints(rendered(options)[0]) == []
    assert complaints(rendered(options, replace(SIZE, gpus=0, device="cpu"), manifest=None)[0]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.entrypont", "x"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template", None),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplica", 3),
        ("spec.rayClusterSpec.authOptions.mode", "yes"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.envfrom", []),
        ("spec.backoffLimit", "two"),
    ],
)
def test_the_schema_notices_a_mistake(complaints: Callable[[Any], list[str]], path: str, value: Any) -> None:
    job = copy.deepcopy(rendered()[0])
    *parents, last = path.split(".")
    inner: Any = job
    for key in parents:
        inner = inner[int(key)] if key.isdigit() else inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    assert complaints(job) != []


# -- the manifest that travels -----------------------------------------------------------------------------

WRITTEN = """
defaults: {base: {model: pocket}, train: {steps: 300, lora: {rank: 4}}, track: {mlflow: "http://m"}}
subjects:
  - {name: rex, class: dog, images: s3://b/rex/}
  - {name: tom, class: cat, images: [s3://b/1.png, s3://b/2.png], train: {steps: 400}, tenant: acme, priority: 10}
  - {name: bad, clas: cat, images: s3://b/bad/}
  - {name: full, class: cat, images: s3://b/f/, train: {method: full}}
schedule: {gangs: 2}
prompts: prompts.txt
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("{subject} in the snow\n")
    file = tmp_path / "campaign.yaml"
    file.write_text(WRITTEN)
    return file


def test_a_manifest_that_travels_says_the_same_with_the_flags_written_into_it(
    manifest: Path, tmp_path: Path
) -> None:
    here = load_campaign(str(manifest), "night", sets=["train.lr=5e-5", "schedule.attempts=2"])
    (tmp_path / "there").mkdir()
    there_file = tmp_path / "there" / "other.yaml"
    there_file.write_text(portable_manifest(here))
    there = load_campaign(str(there_file))
    assert there.settings == here.settings and there.name == "night"
    assert [row.run for row in there.rows] == [row.run for row in here.rows]
    assert [(row.name, row.tenant, row.priority) for row in there.rows] == [
        (row.name, row.tenant, row.priority) for row in here.rows
    ]
    assert there.rows[2].error and "did you mean class" in str(there.rows[2].error)


def test_rows_of_a_table_travel_too(tmp_path: Path) -> None:
    (tmp_path / "night.csv").write_text(
        "name,class,images,train.steps\nrex,dog,s3://b/rex/,500\ntom,cat,s3://b/t/,\n"
    )
    here = load_campaign(str(tmp_path / "night.csv"))
    (tmp_path / "there.yaml").write_text(portable_manifest(here))
    there = load_campaign(str(tmp_path / "there.yaml"))
    assert [row.run for row in there.rows] == [row.run for row in here.rows]
    assert there.rows[0].run and there.rows[0].run.train.steps == 500


def test_photos_on_this_machine_are_refused_before_anything_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("subjects: [{name: rex, class: dog, images: ./rex}]")
    with pytest.raises(UserError, match=r"1 subjects have photos on this machine.*rex.*s3://BUCKET"):
        portable_manifest(load_campaign(str(tmp_path / "c.yaml")))


def test_a_manifest_that_is_too_large_is_refused_with_the_way_out(tmp_path: Path) -> None:
    rows = "\n".join(f"s{i},dog,s3://bucket/a/rather/long/path/of/photos/number/{i}/" for i in range(12_000))
    (tmp_path / "many.csv").write_text(f"name,class,images\n{rows}\n")
    with pytest.raises(UserError, match="too large to travel") as caught:
        portable_manifest(load_campaign(str(tmp_path / "many.csv")))
    assert "submit its URI" in caught.value.do


# -- how much ----------------------------------------------------------------------------------------------


def campaign(tmp_path: Path, text: str) -> Any:
    (tmp_path / "c.yaml").write_text(text)
    return load_campaign(str(tmp_path / "c.yaml"))


def many(count: int, more: str = "") -> str:
    rows = [{"name": f"s{i}", "class": "dog", "images": f"s3://b/{i}/"} for i in range(count)]
    return f"{more}\nsubjects: {yaml.safe_dump(rows, default_flow_style=True)}"


HUB = "defaults: {base: {model: stabilityai/sd}, "


def test_pocket_asks_for_no_gpu_and_for_the_memory_of_a_full_pod(tmp_path: Path) -> None:
    size = job_size(campaign(tmp_path, many(20)))
    assert (size.device, size.gpus, size.gangs, size.cpus) == ("cpu", 0, 3, 4)
    assert size.pods == 2  # three gangs, and three seats to read, encode and draw, on pods of four
    assert not size.assumed and 4 <= size.memory_gib <= 16


def test_any_other_base_asks_for_gpus_and_says_that_its_memory_is_a_guess(tmp_path: Path) -> None:
    size = job_size(campaign(tmp_path, many(100, HUB + "cluster: {workers: 2, cpus_per_worker: 2}}")))
    assert (size.device, size.gangs, size.pods, size.pods_per_gang) == ("cuda", 4, 8, 2)
    assert (size.gpus, size.cpus) == (1, 5)
    assert size.assumed and size.memory_gib == 32
    assert job_size(campaign(tmp_path, many(1, HUB + "train: {steps: 5}}")), memory_gib=12).memory_gib == 12


def test_workers_that_share_a_gpu_share_a_pod(tmp_path: Path) -> None:
    more = HUB + "cluster: {gpus_per_worker: 0.5}}\nschedule: {gangs: 6}"
    size = job_size(campaign(tmp_path, many(100, more)))
    assert (size.gangs, size.pods, size.gpus, size.cpus) == (6, 3, 1, 5)


def test_what_is_asked_for_on_the_command_line_goes_first(tmp_path: Path) -> None:
    size = job_size(campaign(tmp_path, many(100, "schedule: {gangs: 2}")), "cuda", gangs=9)
    assert (size.device, size.gangs, size.pods) == ("cuda", 9, 9)


def test_a_larger_checkpoint_has_more_time(tmp_path: Path) -> None:
    lora = job_size(campaign(tmp_path, many(1)))
    full = job_size(campaign(tmp_path, many(1, "defaults: {train: {method: full}}")))
    assert 60 <= lora.grace_s <= full.grace_s


def test_a_device_that_contradicts_the_runs_is_refused(tmp_path: Path) -> None:
    asking = campaign(tmp_path, many(1, "defaults: {cluster: {gpus_per_worker: 1}}"))
    with pytest.raises(UserError, match="asks for GPUs and is submitted without"):
        job_size(asking, "cpu")
    none = campaign(tmp_path, many(1, "defaults: {cluster: {gpus_per_worker: 0}}"))
    with pytest.raises(UserError, match="asks for no GPU and is submitted with"):
        job_size(none, "cuda")


def test_a_campaign_of_which_no_subject_can_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 1 subjects can be trained.*clas"):
        job_size(campaign(tmp_path, "subjects: [{name: rex, clas: dog, images: s3://b/}]"))
