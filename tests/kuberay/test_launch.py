"""A campaign is handed to the cluster once, followed to its end, and cancelled; by the command line too."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import UserError
from cluster.kuberay import KubeApi
from cluster.leaving import leave_driver, leave_node
from orchestrator.jobsize import JobSize
from orchestrator.launch import cancel, follow, jobs, launch, log_lines, state_of
from orchestrator.rayjob import JobOptions, render_job

SIZE = JobSize("cpu", 1, 1, 1, 4, 0, 8, 5, 60, False)
OPTIONS = JobOptions("team-a", "registry.example/raybooth:0.1.0", "2.60.0")
JOB = "/apis/ray.io/v1/namespaces/team-a/rayjobs"
CONFIG = "/api/v1/namespaces/team-a/configmaps"
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"}


def documents(manifest: str = "name: night\n") -> Any:
    return render_job("night", "", manifest, SIZE, OPTIONS)


def pod(cluster: Any, name: str, created: str, *lines: str) -> None:
    """A submitter's pod with a log."""
    labels = {"job-name": "night"}
    cluster.server.objects["v1/pods", "team-a", name] = {
        "metadata": {"name": name, "namespace": "team-a", "labels": labels, "creationTimestamp": created}
    }
    cluster.fail("GET", f"/pods/{name}/log", body="\n".join(lines))


# -- once --------------------------------------------------------------------------------------------------


def test_a_campaign_is_made_once_however_often_it_is_submitted(cluster: Any, api: KubeApi) -> None:
    state, made = launch(api, documents())
    assert made and state.state == "starting"
    again, made = launch(api, documents())
    assert not made and again.facts["job"] == "night"
    assert len(cluster.sent("POST", "rayjobs")) == 2 and cluster.sent("DELETE") == []
    [config, _] = cluster.sent("POST", "configmaps")
    job = api.read("RayJob", "night")
    assert job is not None
    [owner] = config["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("RayJob", "night", job["metadata"]["uid"])


def test_an_answer_that_is_lost_makes_no_second_job(cluster: Any, api: KubeApi) -> None:
    api.create(documents()[0])  # the server has made it, and its answer was lost
    _, made = launch(api, documents())
    assert not made
    assert api.read("ConfigMap", "night-manifest") is not None


def test_another_manifest_of_a_campaign_that_runs_is_refused(cluster: Any, api: KubeApi) -> None:
    launch(api, documents())
    cluster.report("night", jobDeploymentStatus="Running")
    with pytest.raises(UserError, match="submitted already, with another manifest") as caught:
        launch(api, documents("name: night\nbudget: {hours: 1}\n"))
    assert "raybooth jobs cancel night" in caught.value.do


@pytest.mark.parametrize(
    ("status", "text"),
    [(FAILED, "name: night\n"), (DONE, "name: night\nbudget: {hours: 1}\n")],
)
def test_a_job_that_has_ended_makes_room(
    cluster: Any, api: KubeApi, status: dict[str, Any], text: str
) -> None:
    launch(api, documents())
    before = api.read("RayJob", "night")
    cluster.report("night", **status)
    state, made = launch(api, documents(text))
    after, config = api.read("RayJob", "night"), api.read("ConfigMap", "night-manifest")
    assert made and state.state == "starting"
    assert before and after and config and before["metadata"]["uid"] != after["metadata"]["uid"]
    assert config["data"]["campaign.yaml"] == text
    assert config["metadata"]["ownerReferences"][0]["uid"] == after["metadata"]["uid"]


def test_a_campaign_that_has_succeeded_is_run_again_only_when_asked_to(cluster: Any, api: KubeApi) -> None:
    launch(api, documents())
    cluster.report("night", **DONE)
    state, made = launch(api, documents())
    assert not made and state.state == "succeeded"
    state, made = launch(api, documents(), again=True)
    assert made and state.state == "starting"


@pytest.mark.parametrize("status", ["Suspended", "Suspending", "Retrying", "Running"])
def test_a_job_that_its_queue_holds_back_is_still_there(cluster: Any, api: KubeApi, status: str) -> None:
    launch(api, documents())
    cluster.report("night", jobDeploymentStatus=status)
    _, made = launch(api, documents(), again=True)
    assert not made and cluster.sent("DELETE") == []


def test_a_job_of_somebody_else_is_left_alone(cluster: Any, api: KubeApi) -> None:
    theirs = documents()[0]
    api.create({**theirs, "metadata": {"name": "night", "namespace": "team-a"}})
    cluster.report("night", **DONE)
    with pytest.raises(UserError, match="there is another job night"):
        launch(api, documents())


# -- followed ----------------------------------------------------------------------------------------------


def test_a_job_is_followed_through_its_states_to_what_the_campaign_said(cluster: Any, api: KubeApi) -> None:
    launch(api, documents())
    steps = iter([{"jobDeploymentStatus": "Initializing"}, {"jobDeploymentStatus": "Running"}, DONE])
    outcome = {
        "campaign": "night",
        "state": "partial",
        "subjects": [{"state": "succeeded"}, {"state": "failed"}],
    }
    pod(cluster, "night-old", "2026-11-27T08:00:00Z")
    pod(cluster, "night-new", "2026-11-27T09:00:00Z", "training ...", json.dumps(outcome))
    told: list[str] = []

    def tell(state: Any) -> None:
        told.append(state.state)
        if status := next(steps, None):
            cluster.report("night", **status)

    state = follow(api, "night", tell)
    assert [told[0], told[-1]] == ["starting", "succeeded"] and "running" in told
    assert (state.exit_code, state.facts["outcome"]) == (3, outcome)
    assert "1 of 2 subjects succeeded" in state.what


def test_a_job_that_is_deleted_meanwhile_ends_the_wait(cluster: Any, api: KubeApi) -> None:
    launch(api, documents())

    def tell(state: Any) -> None:
        if state.state == "starting":
            cluster.report("night", jobDeploymentStatus="Running")
        else:
            cancel(api, "night")

    with pytest.raises(UserError, match=r"was deleted.*last state was running"):
        follow(api, "night", tell)


def test_a_name_that_is_not_there_is_answered_with_those_that_are(cluster: Any, api: KubeApi) -> None:
    launch(api, documents())
    assert [state.facts["job"] for state in jobs(api)] == ["night"]
    for act in (state_of, cancel, log_lines):
        with pytest.raises(UserError, match=r"no job knight in team-a\. there are night"):
            act(api, "knight", *([False] if act is log_lines else []))


# -- the command line --------------------------------------------------------------------------------------


SUBMIT = ("submit", "night.yaml", "--memory", "4", "--image", "registry.example/raybooth:0.1.0")


def test_submit_status_logs_and_cancel(cluster: Any, booth: Callable[..., Any]) -> None:
    done = booth(*SUBMIT, "--queue", "gpu", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["job"], said["namespace"], said["created"], said["state"]) == (
        "night",
        "team-a",
        True,
        "queued",
    )
    cluster.report("night", **FAILED, message="0/3 nodes are available")
    assert booth("jobs", "status", "night").exit_code == 0
    waited = booth("jobs", "status", "night", "-w", "--json")
    error = json.loads(waited.stdout.splitlines()[-1])["error"]
    assert waited.exit_code == 1 and error["seen"] == "0/3 nodes are available" and error["do"]
    pod(cluster, "night-x", "2026-11-27T09:00:00Z", "one", "two")
    assert booth("jobs", "logs", "night", "-f").stdout == "one\ntwo\n"
    assert booth("jobs", "cancel", "night").exit_code == 0
    assert booth("jobs", "cancel", "night").exit_code == 2


def test_submit_asks_nobody_for_a_dry_run_and_the_server_for_the_other(
    cluster: Any, booth: Callable[..., Any], complaints: Any
) -> None:
    done = booth(*SUBMIT, "--namespace", "team-b", "--dry-run=client")
    job, config = yaml.safe_load_all(done.stdout)
    assert done.exit_code == 0 and cluster.server.seen == []
    assert job["metadata"]["namespace"] == config["metadata"]["namespace"] == "team-b"
    assert complaints(job) == []
    checked = booth(*SUBMIT, "--dry-run=server")
    assert checked.exit_code == 0, checked.output
    assert all("dryRun=All" in path for _, path, _ in cluster.server.seen) and len(cluster.server.seen) == 2


def test_a_quota_that_is_full_is_the_users_to_know(cluster: Any, booth: Callable[..., Any]) -> None:
    cluster.fail("POST", "rayjobs", status=403, body={"message": "exceeded quota: team-a, requested: cpu=4"})
    done = booth(*SUBMIT, "--json")
    assert done.exit_code == 2
    assert "quota is full" in json.loads(done.stdout.splitlines()[-1])["error"]["what"]


# -- leaving -----------------------------------------------------------------------------------------------


PATIENT = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: exit(143))
print(1, flush=True)
time.sleep(60)
"""


def test_the_driver_is_told_to_end_and_waited_for(tmp_path: Path) -> None:
    script = tmp_path / "raybooth"
    script.write_text(PATIENT)
    begin = [sys.executable, str(script)]
    with (
        subprocess.Popen([*begin, "campaign", "run", "x"], stdout=subprocess.PIPE) as driver,
        subprocess.Popen([*begin, "serve"], stdout=subprocess.PIPE) as other,
    ):
        assert driver.stdout and driver.stdout.readline() and other.stdout and other.stdout.readline()
        processes = tmp_path / "proc"  # of this test alone, not of everything that runs here
        processes.mkdir()
        for process in (driver, other):
            (processes / str(process.pid)).symlink_to(f"/proc/{process.pid}")
        leave_driver(0.1, processes)  # a child that nobody has waited for stays in the list
        assert driver.wait(10) == 143 and other.poll() is None
        assert leave_driver(5, processes)
        other.kill()


def test_a_pod_in_which_ray_has_ended_has_nothing_to_wait_for(tmp_path: Path) -> None:
    (tmp_path / str(os.getpid())).mkdir()
    (tmp_path / str(os.getpid()) / "cmdline").write_bytes(b"python\0-m\0pytest\0")
    assert leave_node(5, tmp_path)


def test_options_of_a_submission_are_told_apart_by_their_digest() -> None:
    other = render_job("night", "", "name: night\n", SIZE, replace(OPTIONS, retries=5))
    assert other[0]["metadata"]["annotations"] != documents()[0]["metadata"]["annotations"]
