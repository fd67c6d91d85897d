"""What the manifests have run exists: commands with their options, campaigns, the service's application, hooks."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from cluster.manifests import Document, get, of_kind, ray_cluster
from cluster.overlay_policies import all_pods
from k8s.check.__main__ import complaints
from k8s.check.crds import Crds
from orchestrator.cli import app
from orchestrator.jobsize import JobSize
from orchestrator.manifest import load_campaign
from orchestrator.rayjob import JobOptions, render_job
from orchestrator.rayservice import Redis, render_service, service_size
from orchestrator.service import ServiceSpec, application, service_spec

ROOT = Path(__file__).parent.parent.parent
OVERLAYS = ("dev", "kind-cpu", "prod")
PLACES = {"/etc/raybooth/campaign.yaml": "raybooth-campaign"}


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command of ours that words call, and what is left of them."""
    assert words[0] == "raybooth"
    command, left = typer.main.get_command(app), list(words[1:])
    while hasattr(command, "commands"):
        command = command.commands[left.pop(0)]
    return command, left


def commands(documents: list[Document]) -> Iterator[list[str]]:
    for job in of_kind(documents, "RayJob"):
        yield job["spec"]["entrypoint"].split()
    for pod in all_pods(documents):
        for _, container in pod.containers:
            if (container.get("command") or [""])[0] == "raybooth":
                yield container["command"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_commands_exist_with_their_options(name: str, overlays: Mapping[str, list[Document]]) -> None:
    found = list(commands(overlays[name]))
    assert {words[1] for words in found} == {"campaign", "submit"}
    for words in found:
        command, left = command_of(words)
        command.make_context(words[1], list(left)).close()  # raises for what it does not know
        assert left[0] in PLACES


@pytest.mark.parametrize("name", OVERLAYS)
def test_files_that_commands_read_are_mounted(name: str, overlays: Mapping[str, list[Document]]) -> None:
    documents = overlays[name]
    for place, config in PLACES.items():
        [there] = [d for d in of_kind(documents, "ConfigMap") if d["metadata"]["name"] == config]
        assert Path(place).name in there["data"]
        mounting = [
            pod
            for pod in all_pods(documents)
            if any(get(v, "configMap", "name") == config for v in pod.spec.get("volumes") or [])
        ]
        assert {pod.role for pod in mounting} == {"head", "task"}
        for pod in mounting:
            mounts = {m["mountPath"] for _, container in pod.containers for m in container["volumeMounts"]}
            assert str(Path(place).parent) in mounts


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_that_leave_say_so_by_a_module_that_is_there(
    name: str, overlays: Mapping[str, list[Document]]
) -> None:
    hooks = []
    for pod in all_pods(overlays[name]):
        for _, container in pod.containers:
            if words := get(container, "lifecycle", "preStop", "exec", "command"):
                hooks.append(pod.role)
                python, flag, module, what, seconds = words
                assert (python, flag) == ("python", "-m") and find_spec(module)
                assert what == ("node" if pod.role == "worker" else "driver")
                assert int(seconds) < pod.spec["terminationGracePeriodSeconds"]
    assert hooks.count("worker") >= 2 and "head" in hooks


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_serve_config_is_one_that_serve_takes_and_we_can_build(
    name: str, overlays: Mapping[str, list[Document]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve._private.build_app import build_app
    from ray.serve.schema import ServeDeploySchema

    monkeypatch.setenv("RAYBOOTH_STORAGE", str(tmp_path))
    monkeypatch.delenv("RAYBOOTH_LEDGER", raising=False)
    [service] = of_kind(overlays[name], "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [served] = config.applications
    assert served.import_path == f"{application.__module__}:{application.__name__}"
    spec = service_spec(None, served.args)
    built = build_app(application(served.args), name="raybooth")
    assert (
        {d.name for d in served.deployments} <= {d.name for d in built.deployments} == {"ingress", "replica"}
    )
    replicas = spec.replicas
    [group, *_] = get(service, "spec", "rayClusterConfig", "workerGroupSpecs")
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert replicas.cpus + 0.5 <= int(limits["cpu"])  # with an ingress beside it
    assert replicas.gpus <= int(limits.get("nvidia.com/gpu", 0))
    groups = get(service, "spec", "rayClusterConfig", "workerGroupSpecs")
    assert replicas.max <= sum(group["maxReplicas"] for group in groups)
    drain = group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert replicas.drain_s < drain


@pytest.mark.parametrize("name", OVERLAYS)
def test_gangs_fit_the_workers_of_the_campaign(name: str, overlays: Mapping[str, list[Document]]) -> None:
    [job] = of_kind(overlays[name], "RayJob")
    [config] = [
        d for d in of_kind(overlays[name], "ConfigMap") if d["metadata"]["name"] == "raybooth-campaign"
    ]
    asked = yaml.safe_load(config["data"]["campaign.yaml"])["defaults"].get("cluster", {})
    _, cluster = ray_cluster(job) or ("", {})
    [group] = cluster["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = int(group["rayStartParams"].get("num-cpus", limits["cpu"]))
    assert asked.get("cpus_per_worker", 1) + 3 <= cpus  # beside what encodes, draws and reads
    assert asked.get("gpus_per_worker", 0) <= int(limits.get("nvidia.com/gpu", 0))


def test_the_sample_photos_are_a_campaign(tmp_path: Path) -> None:
    folder = ROOT / "k8s" / "overlays" / "kind-cpu"
    subprocess.run(
        [sys.executable, str(folder / "photos.py")],
        env={**os.environ, "RAYBOOTH_PHOTOS": str(tmp_path / "photos"), "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    text = (folder / "campaign.yaml").read_text(encoding="utf-8")
    manifest = tmp_path / "campaign.yaml"
    manifest.write_text(text.replace("s3://raybooth/photos/", str(tmp_path / "photos")))
    spec = load_campaign(str(manifest))
    assert [(row.name, row.error) for row in spec.rows] == [("robo", None), ("satchel", None)]


@pytest.mark.parametrize("queue", [None, "gpu"])
def test_a_submitted_job_fits_into_the_namespace(
    queue: str | None, overlays: Mapping[str, list[Document]], crds: Crds
) -> None:
    size = JobSize("cuda", 4, 8, 2, 7, 1, 32, 5, 90, False)
    image = "raybooth@sha256:" + "0" * 64
    options = JobOptions("raybooth", image, "2.60.0", queue=queue, priority="batch" if queue else None)
    job = render_job("night", "s3://b/night.yaml", "name: night\n", size, options)
    assert [str(c) for c in complaints([*overlays["prod"], *job], crds, pinned=True)] == []


def test_a_deployed_service_fits_into_the_namespace(
    overlays: Mapping[str, list[Document]], crds: Crds
) -> None:
    spec = ServiceSpec.model_validate({"replicas": {"min": 2, "max": 4, "gpus": 1}})
    options = JobOptions("raybooth", "raybooth@sha256:" + "0" * 64, "2.60.0", spot=False)
    service = render_service(
        "other", spec, service_size(spec), options, Redis("redis:6379", "raybooth-redis")
    )
    assert [str(c) for c in complaints([*overlays["prod"], service], crds, pinned=True)] == []
