"""A service becomes a RayService, is brought up to date, and is built by Serve from what its config says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from cluster.errors import SystemFailure, UserError
from cluster.kuberay import KubeApi
from orchestrator.rayjob import JobOptions
from orchestrator.rayservice import Redis, render_service, service_size
from orchestrator.rollout import deploy, follow_service, service_state_of
from orchestrator.service import ServiceSpec, application

OPTIONS = JobOptions("team-a", "registry.example/raybooth:0.1.0", "2.60.0", spot=False)
SPEC = ServiceSpec.model_validate({"replicas": {"min": 2, "max": 4, "drain_s": 90}, "limits": {"steps": 50}})


def rendered(spec: ServiceSpec = SPEC, redis: Redis | None = None, options: JobOptions = OPTIONS) -> Any:
    return render_service("booth", spec, service_size(spec), options, redis)


def test_a_service_has_every_field_that_it_needs(complaints: Callable[[Any], list[str]]) -> None:
    service = rendered(redis=Redis("redis:6379", "raybooth-redis"))
    assert complaints(service) == []
    spec = service["spec"]
    cluster = spec["rayClusterConfig"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"} and spec["excludeHeadPodFromServeSvc"] is True
    assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"] == "2.60.0"
    assert cluster["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "raybooth-redis", "key": "password"}}},
    }
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    [group] = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 5)  # with one for a training
    pod = group["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120  # what is drawn is drawn to its end
    assert pod["containers"][0]["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
    assert "gcsFaultToleranceOptions" not in rendered()["spec"]["rayClusterConfig"]


def test_serve_takes_the_config_and_builds_the_application_that_the_settings_describe(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(rendered()["spec"]["serveConfigV2"]))
    [named] = config.applications
    assert named.import_path == "orchestrator.service:application"
    monkeypatch.setenv("RAYBOOTH_STORAGE", f"{bucket}/booth")
    built = call_user_app_builder_with_args_if_necessary(application, named.args)
    settings = built._bound_deployment.init_args[0]
    assert (settings.host, settings.limits.steps, settings.sizes) == ("0.0.0.0", 50, ("64x64",))


def test_replicas_that_share_a_gpu_share_a_pod() -> None:
    spec = ServiceSpec.model_validate({"replicas": {"min": 0, "max": 4, "gpus": 0.5}})
    size = service_size(spec)
    assert (size.pods, size.most_pods, size.gpus, size.cpus) == (1, 3, 1, 6)
    assert service_size(ServiceSpec.model_validate({"base": "some/sd"})).assumed


def test_a_service_that_asks_nobody_for_a_key_is_refused() -> None:
    with pytest.raises(UserError, match="auth: off takes no effect"):
        rendered(ServiceSpec.model_validate({"auth": "off"}))


# -- on a cluster ------------------------------------------------------------------------------------------


def ready(**more: Any) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints"}]
    return {"conditions": conditions, "numServeEndpoints": 2, **more}


def test_a_service_is_made_left_alone_and_brought_up_to_date(cluster: Any, api: KubeApi) -> None:
    assert deploy(api, rendered())[1] == "created"
    assert deploy(api, rendered())[1] == "unchanged"
    newer = rendered(options=replace(OPTIONS, image="registry.example/raybooth:0.2.0"))
    cluster.fail("PUT", "rayservices", status=409, body={"message": "the object has been modified"})
    assert deploy(api, newer)[1] == "updated"
    sent = cluster.sent("PUT", "rayservices")
    assert len(sent) == 2 and all(body["metadata"]["resourceVersion"] for body in sent)


def test_a_service_of_somebody_else_is_left_alone(api: KubeApi) -> None:
    api.create({**rendered(), "metadata": {"name": "booth", "namespace": "team-a"}})
    with pytest.raises(UserError, match="another service booth"):
        deploy(api, rendered())


def test_a_deployment_is_followed_until_it_serves_or_has_failed(cluster: Any, api: KubeApi) -> None:
    deploy(api, rendered())
    told: list[str] = []

    def tell(state: Any) -> None:
        told.append(state.state)
        cluster.report("booth", "rayservices", **ready())

    state = follow_service(api, "booth", tell, wait_s=60)
    assert (state.state, told[0]) == ("serving", "starting") and state.facts["endpoints"] == 2
    applications = {"raybooth": {"status": "DEPLOY_FAILED", "message": "there is no base x"}}
    cluster.report(
        "booth", "rayservices", conditions=[], pendingServiceStatus={"applicationStatuses": applications}
    )
    failed = follow_service(api, "booth", lambda state: None, wait_s=60)
    assert (failed.state, failed.exit_code) == ("failed", 1) and "there is no base x" in failed.seen


def test_a_deployment_is_not_waited_for_for_ever(api: KubeApi) -> None:
    deploy(api, rendered())
    with pytest.raises(SystemFailure, match="does not serve after 0 s"):
        follow_service(api, "booth", lambda state: None, wait_s=0)
    with pytest.raises(UserError, match=r"no service studio in team-a\. there are booth"):
        service_state_of(api, "studio")


def test_deploy_status_and_delete(
    cluster: Any, booth: Callable[..., Any], tmp_path: Path, complaints: Any
) -> None:
    (tmp_path / "serve.yaml").write_text("replicas: {max: 2}\n")
    words = ("deploy", "serve.yaml", "--image", "registry.example/raybooth:0.1.0", "--memory", "4")
    service = yaml.safe_load(booth(*words, "--dry-run=client").stdout)
    assert complaints(service) == [] and cluster.server.seen == []
    done = booth(*words, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["done"], said["url"]) == ("created", "http://booth-serve-svc.team-a:8000")
    assert booth("services", "status", "booth").exit_code == 0
    assert booth("services", "delete", "booth").exit_code == 0
    assert booth("services", "delete", "booth").exit_code == 2
