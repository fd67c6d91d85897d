"""This file is where what KubeRay says of a job or a service becomes a sentence, what to do, and an exit code."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import RayboothError, SystemFailure, UserError

SOME_FAILED = 3
RUNNING, ENDED, FAILED = "running", "succeeded", "failed"


@dataclass(frozen=True)
class JobState:
    """Where a job or a service stands."""

    state: str
    """`queued`, `starting`, `running`, `retrying`, `suspending`, `stopping` (it is being deleted), `succeeded`,
    `failed`; of a service also `serving` and `upgrading`."""
    what: str
    """A clause for people."""
    seen: str = ""
    """What Kubernetes says, if anything."""
    do: str = ""
    """What to do next, if anything."""
    exit_code: int = 0
    """Of a command that waits for the end."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For programs."""

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in (ENDED, FAILED)

    def line(self) -> str:
        """For people."""
        return ". ".join(
            part.rstrip(".") for part in (f"{self.state}: {self.what}", self.seen, self.do) if part
        )

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        said = {"what": self.what, "seen": self.seen, "do": self.do}
        return {"state": self.state, **self.facts, "said": said}

    def failure(self) -> RayboothError:
        """The error that a failed one is."""
        kind = UserError if self.exit_code == UserError.exit_code else SystemFailure
        return kind(self.what, self.seen, self.do)


_AGAIN = "submit it again: it goes on from what is saved"
# By KubeRay's `reason` of a failed job: what happened, what to do.
_REASONS = {
    "SubmissionFailed": (
        "the job could not be handed to Ray",
        "see the submitter's pod: kubectl describe pod -l job-name=NAME; mostly the image cannot be pulled",
    ),
    "DeadlineExceeded": ("its time was up: activeDeadlineSeconds", f"raise --hours; {_AGAIN}"),
    "PreRunningDeadlineExceeded": (
        "its pods were not there in time: preRunningDeadlineSeconds",
        "see why with kubectl describe pod -l ray.io/originated-from-cr-name=NAME; mostly there is no node with room",
    ),
    "AppFailed": ("the campaign's driver ended with an error", "see raybooth jobs logs NAME"),
    "JobDeploymentStatusTransitionGracePeriodExceeded": (
        "Ray said that the job has ended, and its submitter did not",
        "see raybooth jobs logs NAME",
    ),
    "JobStatusCheckTimeoutExceeded": (
        "the operator could not reach the head for too long",
        f"the head was lost, or a NetworkPolicy keeps the operator out; {_AGAIN}",
    ),
    "ValidationFailed": ("KubeRay refuses the job", "correct what it names"),
}
_EXIT = re.compile(r"exit code (\d+)")


def job_state(job: Mapping[str, Any], kueue: bool = False) -> JobState:
    """Where a RayJob stands.

    Args:
        job: The object.
        kueue: Whether it is in a queue, by its label.

    Returns:
        Its state. A reason that is not known is told as it is.
    """
    status: Mapping[str, Any] = job.get("status") or {}
    name = job["metadata"]["name"]
    deployment, of_ray = status.get("jobDeploymentStatus") or "", status.get("jobStatus") or ""
    reason, message = status.get("reason") or "", _short(status.get("message") or "")
    facts = {
        "job": name,
        "namespace": job["metadata"].get("namespace"),
        "deployment_status": deployment or None,
        "job_status": of_ray or None,
        "reason": reason or None,
        "cluster": status.get("rayClusterName") or None,
        "attempts": (status.get("failed") or 0) + 1,
    }
    if job["metadata"].get("deletionTimestamp"):
        return JobState("stopping", "it is being deleted", facts=facts)
    if deployment in ("Failed", "ValidationFailed"):
        return _failed(name, reason or deployment, message, facts)
    if deployment == "Complete":
        if of_ray == "STOPPED":
            return JobState(FAILED, "it was stopped", message, _AGAIN, 1, facts)
        if of_ray == "FAILED":
            return _failed(name, reason or "AppFailed", message, facts)
        return JobState(ENDED, "the campaign ran to its end", facts=facts)
    what = {
        "": ("queued" if kueue else "starting", "the operator has not looked at it yet"),
        "Initializing": ("starting", "its pods are starting"),
        "Waiting": ("starting", "it waits to be handed to Ray"),
        "Suspended": ("queued", "it waits in its queue for quota" if kueue else "it is suspended"),
        "Suspending": ("suspending", "its queue takes its quota back: what is trained is saved"),
        "Retrying": ("retrying", f"its cluster was lost; attempt {facts['attempts']} begins"),
    }.get(deployment)
    if what:
        return JobState(what[0], what[1], message, facts=facts)
    if deployment == "Running":
        return JobState(RUNNING, "the campaign runs", message, facts=facts)
    return JobState(RUNNING, f"KubeRay says {deployment}", message, facts=facts)


def _failed(name: str, reason: str, message: str, facts: Mapping[str, Any]) -> JobState:
    what, do = _REASONS.get(reason, (f"KubeRay says {reason}", "see kubectl describe rayjob NAME"))
    code = 2 if reason == "ValidationFailed" else 1
    if reason == "AppFailed" and (found := _EXIT.search(message)):
        said = int(found[1])
        if said == UserError.exit_code:
            what, code = "the campaign was refused", 2
        elif said == SOME_FAILED:
            what, code = "some subjects did not succeed", SOME_FAILED
        elif said == 143:
            what, do = "the driver was told to end, and saved", _AGAIN
    return JobState(FAILED, what, message or f"reason {reason}", do.replace("NAME", name), code, facts)


def service_state(service: Mapping[str, Any]) -> JobState:
    """Where a RayService stands, by its conditions and by what its applications say."""
    status: Mapping[str, Any] = service.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    active, pending = status.get("activeServiceStatus") or {}, status.get("pendingServiceStatus") or {}
    facts = {
        "service": service["metadata"]["name"],
        "namespace": service["metadata"].get("namespace"),
        "endpoints": status.get("numServeEndpoints") or 0,
        "cluster": active.get("rayClusterName") or None,
        "pending_cluster": pending.get("rayClusterName") or None,
    }
    if service["metadata"].get("deletionTimestamp"):
        return JobState("stopping", "it is being deleted", facts=facts)
    generation = service["metadata"].get("generation")
    if generation is not None and (status.get("observedGeneration") or 0) < generation:
        return JobState("starting", "the operator has not looked at it yet", facts=facts)

    def holds(condition: str) -> bool:
        return bool(conditions.get(condition, {}).get("status") == "True")

    def said(condition: str) -> str:
        found = conditions.get(condition, {})
        return _short(": ".join(part for part in (found.get("reason"), found.get("message")) if part))

    broken = [
        f"{name}: {_short(application.get('message') or application['status'])}"
        for which in (pending, active)
        for name, application in (which.get("applicationStatuses") or {}).items()
        if application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY")
    ]
    if holds("Suspended"):
        return JobState("queued", "it is suspended", said("Suspended"), facts=facts)
    if holds("RollbackInProgress"):
        return JobState("upgrading", "the new cluster is given up", said("RollbackInProgress"), facts=facts)
    if broken and not (holds("Ready") and not pending.get("applicationStatuses")):
        see = f"see kubectl describe rayservice {facts['service']}, and the log of its replicas"
        return JobState(FAILED, "the application does not come up", "; ".join(broken), see, 1, facts)
    if conditions.get("Ready", {}).get("reason") == "ValidationFailed":
        return JobState(
            FAILED, "KubeRay refuses the service", said("Ready"), "correct what it names", 2, facts
        )
    if holds("UpgradeInProgress"):
        return JobState("upgrading", "a new cluster is made; the old one serves until then", facts=facts)
    if holds("Ready"):
        return JobState("serving", f"{facts['endpoints']} pods serve", facts=facts)
    return JobState("starting", "its pods and models are starting", said("Ready"), facts=facts)


def _short(text: str) -> str:
    return " ".join(text.split())[:500]
