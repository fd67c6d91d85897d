"""What KubeRay says becomes a sentence and an exit code: a table."""

from typing import Any

import pytest

from cluster.errors import SystemFailure, UserError
from cluster.jobstate import job_state, service_state


def job(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "night", "namespace": "team-a"}, "status": status}


ENDED = (
    "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars): ..."
)


@pytest.mark.parametrize(
    ("status", "state", "code", "said"),
    [
        ({}, "queued", 0, "not looked at it yet"),
        ({"jobDeploymentStatus": "Initializing"}, "starting", 0, "pods are starting"),
        ({"jobDeploymentStatus": "Waiting"}, "starting", 0, "waits to be handed to Ray"),
        ({"jobDeploymentStatus": "Suspended"}, "queued", 0, "waits in its queue"),
        ({"jobDeploymentStatus": "Suspending"}, "suspending", 0, "takes its quota back"),
        ({"jobDeploymentStatus": "Retrying", "failed": 1}, "retrying", 0, "attempt 2 begins"),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, "running", 0, "campaign runs"),
        ({"jobDeploymentStatus": "Sparkling"}, "running", 0, "KubeRay says Sparkling"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "succeeded", 0, "ran to its end"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "failed", 1, "was stopped"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "FAILED"}, "failed", 1, "ended with an error"),
        ({"jobDeploymentStatus": "Failed", "reason": "SubmissionFailed"}, "failed", 1, "handed to Ray"),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, "failed", 1, "--hours"),
        (
            {"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"},
            "failed",
            1,
            "not there in time",
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "AppFailed"}, "failed", 1, "raybooth jobs logs night"),
        (
            {"jobDeploymentStatus": "Failed", "reason": "JobDeploymentStatusTransitionGracePeriodExceeded"},
            "failed",
            1,
            "its submitter did not",
        ),
        (
            {"jobDeploymentStatus": "Failed", "reason": "JobStatusCheckTimeoutExceeded"},
            "failed",
            1,
            "NetworkPolicy",
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "ValidationFailed"}, "failed", 2, "refuses the job"),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "too long"}, "failed", 2, "too long"),
        (
            {"jobDeploymentStatus": "Failed", "reason": "NewInKubeRay2"},
            "failed",
            1,
            "KubeRay says NewInKubeRay2",
        ),
        (
            {"jobDeploymentStatus": "Failed", "reason": "AppFailed", "message": ENDED.format(2)},
            "failed",
            2,
            "was refused",
        ),
        (
            {"jobDeploymentStatus": "Failed", "reason": "AppFailed", "message": ENDED.format(3)},
            "failed",
            3,
            "some subjects did not succeed",
        ),
        (
            {"jobDeploymentStatus": "Failed", "reason": "AppFailed", "message": ENDED.format(143)},
            "failed",
            1,
            "told to end, and saved",
        ),
    ],
)
def test_every_state_of_a_job_is_a_sentence_and_a_code(
    status: dict[str, Any], state: str, code: int, said: str
) -> None:
    found = job_state(job(**status), kueue=True)
    assert (found.state, found.exit_code) == (state, code)
    assert said in found.line()
    assert found.ended == (state in ("succeeded", "failed"))
    if state == "failed":
        assert found.do and isinstance(found.failure(), UserError if code == 2 else SystemFailure)
    assert found.as_json()["reason"] == status.get("reason")


def test_a_job_that_is_being_deleted_is_stopping_whatever_it_was() -> None:
    document = job(jobDeploymentStatus="Running")
    document["metadata"]["deletionTimestamp"] = "2026-11-27T08:00:00Z"
    assert job_state(document).state == "stopping"


def condition(kind: str, status: str = "True", reason: str = "", message: str = "") -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def serving(status: str, message: str = "") -> dict[str, Any]:
    return {
        "applicationStatuses": {"raybooth": {"status": status, "message": message}},
        "rayClusterName": "booth-1",
    }


@pytest.mark.parametrize(
    ("status", "state", "code", "said"),
    [
        ({}, "starting", 0, "not looked at it yet"),
        ({"conditions": [condition("Ready", "False", "Initializing", "no pods")]}, "starting", 0, "no pods"),
        ({"conditions": [condition("Ready")], "numServeEndpoints": 2}, "serving", 0, "2 pods serve"),
        (
            {"conditions": [condition("Ready"), condition("UpgradeInProgress")]},
            "upgrading",
            0,
            "old one serves",
        ),
        ({"conditions": [condition("RollbackInProgress")]}, "upgrading", 0, "given up"),
        ({"conditions": [condition("Suspended")]}, "queued", 0, "suspended"),
        ({"pendingServiceStatus": serving("DEPLOY_FAILED", "no base x")}, "failed", 1, "no base x"),
        (
            {"conditions": [condition("Ready")], "activeServiceStatus": serving("UNHEALTHY")},
            "serving",
            0,
            "pods serve",
        ),
        (
            {
                "conditions": [condition("Ready"), condition("UpgradeInProgress")],
                "activeServiceStatus": serving("RUNNING"),
                "pendingServiceStatus": serving("DEPLOY_FAILED", "no base y"),
            },
            "failed",
            1,
            "no base y",
        ),
        (
            {"conditions": [condition("Ready", "False", "ValidationFailed", "bad name")]},
            "failed",
            2,
            "bad name",
        ),
    ],
)
def test_every_state_of_a_service_is_a_sentence_and_a_code(
    status: dict[str, Any], state: str, code: int, said: str
) -> None:
    metadata = {"name": "booth", "namespace": "team-a", "generation": 3}
    observed = {"observedGeneration": 3} if status else {}
    found = service_state({"metadata": metadata, "status": {**observed, **status}})
    assert (found.state, found.exit_code) == (state, code)
    assert said in found.line()


def test_a_state_from_before_the_last_change_counts_for_nothing() -> None:
    old = {"observedGeneration": 2, "conditions": [condition("Ready")]}
    assert service_state({"metadata": {"name": "booth", "generation": 3}, "status": old}).state == "starting"
