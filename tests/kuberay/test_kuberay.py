"""The client of the Kubernetes API, against one that speaks HTTP and fails as real ones do."""

import json
from itertools import islice
from typing import Any

import pytest

from cluster import kuberay
from cluster.errors import SystemFailure, UserError
from cluster.kuberay import KubeApi

JOBS = "/namespaces/team-a/rayjobs"
EXPIRED = {
    "type": "ERROR",
    "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"},
}


def job(**spec: Any) -> dict[str, Any]:
    metadata = {"name": "night", "namespace": "team-a"}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {"entrypoint": "x", **spec},
    }


def test_an_object_is_made_once_read_and_deleted(cluster: Any, api: KubeApi) -> None:
    made = api.create(job())
    assert made is not None and made["metadata"]["uid"]
    assert api.create(job()) is None
    assert api.read("RayJob", "night") == made
    assert api.read("RayJob", "day") is None
    assert not api.delete("RayJob", "night", uid="of another")
    assert api.delete("RayJob", "night", uid=made["metadata"]["uid"])
    assert not api.delete("RayJob", "night")
    asked = cluster.sent("DELETE")[-2]
    assert asked["propagationPolicy"] == "Background"
    assert asked["preconditions"]["uid"] == made["metadata"]["uid"]


def test_the_server_is_asked_to_refuse_what_it_does_not_know(
    cluster: Any, api: KubeApi, complaints: Any
) -> None:
    with pytest.raises(UserError, match=r"the cluster refuses it.*entrypont"):
        api.create(job(entrypont="x"))
    [at] = [path for method, path, _ in cluster.server.seen if method == "POST"]
    assert "fieldValidation=Strict" in at


def test_a_dry_run_makes_nothing(cluster: Any, api: KubeApi) -> None:
    assert api.create(job(), dry_run=True) is not None
    assert api.read("RayJob", "night") is None


def test_a_busy_server_is_asked_again_when_it_says(cluster: Any, api: KubeApi, naps: list[float]) -> None:
    cluster.fail("POST", JOBS, status=429, headers={"Retry-After": "7"})
    cluster.fail("POST", JOBS, status=503)
    assert api.create(job()) is not None
    assert naps == [7.0, 1.0]


def test_a_connection_that_breaks_is_tried_again(cluster: Any, api: KubeApi, naps: list[float]) -> None:
    cluster.fail("GET", JOBS, body='{"metadata"', headers={"Content-Length": "1000"}, cut=True)
    assert api.read("RayJob", "night") is None
    assert naps == [0.5]


def test_a_server_that_does_not_answer_in_time_is_told_of(
    cluster: Any, api: KubeApi, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kuberay._RAW, "_request_timeout", (1.0, 0.05))
    for _ in range(6):
        cluster.fail("GET", JOBS, wait_s=0.4)
    with pytest.raises(SystemFailure, match="does not answer"):
        api.read("RayJob", "night")
    assert naps == [0.5, 1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("status", "message", "error", "said"),
    [
        (401, "Unauthorized", UserError, "does not know you"),
        (403, 'rayjobs.ray.io is forbidden: User "x" cannot create', UserError, "not allowed"),
        (403, "exceeded quota: team-a, requested: cpu=8", UserError, "quota is full"),
        (404, "the server could not find the requested resource", UserError, "KubeRay's kinds"),
        (404, 'namespaces "team-a" not found', UserError, "no namespace team-a"),
        (422, "spec.entrypoint: Required value", UserError, "refuses it"),
        (418, "I am a teapot", SystemFailure, "says 418"),
    ],
)
def test_what_the_server_refuses_is_said_with_what_to_do(
    cluster: Any, api: KubeApi, naps: list[float], status: int, message: str, error: type, said: str
) -> None:
    cluster.fail("POST", JOBS, status=status, body={"kind": "Status", "code": status, "message": message})
    with pytest.raises(error, match=said) as caught:
        api.create(job())
    assert message.split(":")[0] in caught.value.seen and caught.value.do
    assert naps == []


# -- watching ----------------------------------------------------------------------------------------------


def test_a_watch_tells_of_every_change_and_of_the_end(cluster: Any, api: KubeApi) -> None:
    api.create(job())
    told = api.watch("RayJob", "night")
    assert next(told) is not None
    cluster.report("night", jobDeploymentStatus="Running")
    assert (next(told) or {})["status"] == {"jobDeploymentStatus": "Running"}
    cluster.report("night", jobDeploymentStatus="Suspending")
    assert (next(told) or {})["status"] == {"jobDeploymentStatus": "Suspending"}
    api.delete("RayJob", "night")
    assert list(told)[-1] is None
    [at] = [path for _, path, _ in cluster.server.seen if "watch=True" in path or "watch=true" in path]
    assert "fieldSelector=metadata.name" in at and "resourceVersion=" in at and "timeoutSeconds=60" in at


def test_a_watch_that_expires_or_breaks_goes_on_from_what_there_is(
    cluster: Any, api: KubeApi, naps: list[float]
) -> None:
    api.create(job())
    cluster.fail("GET", "watch=", body=json.dumps(EXPIRED) + "\n")
    cluster.fail("GET", "watch=", status=410)
    cluster.fail("GET", "watch=", status=503)
    cluster.fail("GET", "watch=", body='{"type": "MODI', headers={"Content-Length": "100"}, cut=True)
    told = api.watch("RayJob", "night")
    assert [found is not None for found in islice(told, 5)] == [True] * 5
    cluster.report("night", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert any((found or {}).get("status", {}).get("jobStatus") for found in islice(told, 3))
    assert naps[:4] == [0.5, 1.5, 3.5, 7.5]  # it does not hammer a server that ends every watch at once


def test_a_watch_that_is_forbidden_says_so(cluster: Any, api: KubeApi) -> None:
    api.create(job())
    cluster.fail("GET", "watch=", status=403, body={"message": "cannot watch"})
    told = api.watch("RayJob", "night")
    next(told)
    with pytest.raises(UserError, match="not watched: it is not allowed"):
        next(told)


# -- logs --------------------------------------------------------------------------------------------------


def test_a_log_is_told_line_by_line_once_though_the_connection_breaks(cluster: Any, api: KubeApi) -> None:
    path = "/pods/night-abcde/log"
    cluster.fail("GET", path, body="one\ntwo\nthr", headers={"Content-Length": "1000"}, cut=True)
    cluster.fail("GET", path, body="one\ntwo\nthree\nfour")
    assert list(api.log("night-abcde", "ray-job-submitter", follow=True)) == ["one", "two", "three", "four"]
    assert all("follow=True" in at or "follow=true" in at for _, at, _ in cluster.server.seen)


def test_a_log_that_is_not_there_yet_is_refused(cluster: Any, api: KubeApi) -> None:
    message = 'container "ray-job-submitter" in pod "night-abcde" is waiting to start'
    cluster.fail("GET", "/log", status=400, body={"message": message})
    with pytest.raises(UserError, match="waiting to start"):
        list(api.log("night-abcde", "ray-job-submitter", follow=False))


def test_without_a_kubeconfig_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UserError, match="no Kubernetes cluster is configured"):
        KubeApi.connect(None, None)
