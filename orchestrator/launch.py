"""This file is where a campaign's objects are handed to a cluster, once, and what becomes of them is followed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cluster.errors import RayboothError, SystemFailure, UserError
from cluster.jobstate import SOME_FAILED, JobState, job_state
from orchestrator.rayjob import CAMPAIGN, DIGEST, QUEUE

SUBMITTER = "ray-job-submitter"
TRIES = 3  # of an object whose predecessor is still being deleted

Document = Mapping[str, Any]


class Api(Protocol):
    """A namespace of a cluster, as `cluster.kuberay.KubeApi` is."""

    namespace: str

    def create(self, document: Document, dry_run: bool = False) -> dict[str, Any] | None: ...
    def replace(self, document: Document) -> dict[str, Any] | None: ...
    def read(self, kind: str, name: str) -> dict[str, Any] | None: ...
    def delete(self, kind: str, name: str, uid: str | None = None) -> bool: ...
    def listed(self, kind: str, selector: str) -> list[dict[str, Any]]: ...
    def watch(self, kind: str, name: str) -> Any: ...
    def log(self, pod: str, container: str, follow: bool) -> Any: ...


def launch(api: Api, documents: Sequence[Document], again: bool = False) -> tuple[JobState, bool]:
    """Submit a campaign. The same submission again changes nothing while it runs, or after it has succeeded; what has
    failed is replaced, and goes on from what is saved.

    Args:
        api: The cluster.
        documents: Of `render_job`.
        again: Replace what has succeeded too.

    Returns:
        Where its job stands, and whether it was made now.

    Raises:
        UserError: Another submission of the campaign runs, or the cluster refuses this one.
        SystemFailure: The cluster does not answer.
    """
    job, *carried = documents
    name = job["metadata"]["name"]
    for _ in range(TRIES):
        made = api.create(job)
        there = made or api.read("RayJob", name)
        if there is None:
            continue  # it went away in between
        over = ("failed", "stopping", *(("succeeded",) if again else ()))
        if digest_of(there) == digest_of(job) and (made or _state(there).state not in over):
            break
        _make_room(api, job, there)
    else:
        raise SystemFailure(
            f"the job {name} is not made", "one of its name is still being deleted", "submit it again"
        )
    for document in carried:
        _carry(api, document, there)
    return _state(there), made is not None


def follow(api: Api, name: str, tell: Callable[[JobState], None]) -> JobState:
    """Watch a job until it has ended.

    Args:
        api: The cluster.
        name: Of the job.
        tell: Told of every state that differs from the one before.

    Returns:
        The last state.

    Raises:
        UserError: There is no such job, or it was deleted meanwhile.
    """
    last: JobState | None = None
    for job in api.watch("RayJob", name):
        if job is None:
            break
        state = _state(job)
        if state != last:
            tell(state)
        last = state
        if state.ended:
            return with_outcome(api, name, state)
    raise (
        _no_job(api, name)
        if last is None
        else UserError(
            f"the job {name} was deleted", f"its last state was {last.state}", "submit it again to go on"
        )
    )


def state_of(api: Api, name: str) -> JobState:
    """Where a job stands, with what its campaign said in the end; raises `UserError` when there is none."""
    job = api.read("RayJob", name)
    if job is None:
        raise _no_job(api, name)
    return with_outcome(api, name, _state(job))


def cancel(api: Api, name: str) -> None:
    """End a job: what trains is saved first. Raises `UserError` when there is none."""
    if not api.delete("RayJob", name):
        raise _no_job(api, name)


def jobs(api: Api) -> list[JobState]:
    """All jobs of the namespace that were submitted by raybooth, the newest first."""
    found = api.listed("RayJob", "app.kubernetes.io/managed-by=raybooth")
    found.sort(key=lambda job: str(job["metadata"].get("creationTimestamp")), reverse=True)
    return [_state(job) for job in found]


def log_lines(api: Api, name: str, follow: bool) -> Any:
    """What the driver of a job prints, of its newest attempt; nothing before there is one."""
    pods = api.listed("Pod", f"job-name={name}")
    if not pods:
        state = state_of(api, name)
        raise UserError(
            f"{name} has no log yet", state.line(), "wait until it runs: raybooth jobs status NAME -w"
        )
    newest = max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
    return api.log(newest["metadata"]["name"], SUBMITTER, follow)


def with_outcome(api: Api, name: str, state: JobState) -> JobState:
    """The state of a job that ran to its end, with what the campaign's last line says of its subjects, while the
    log is there."""
    if state.state != "succeeded":
        return state
    try:
        lines = [line for line in log_lines(api, name, follow=False) if line.startswith("{")]
        outcome = json.loads(lines[-1])
        subjects = [subject["state"] for subject in outcome["subjects"]]
    except (RayboothError, IndexError, KeyError, TypeError, ValueError):
        return state  # its pods are gone, or it said something else
    there = subjects.count("succeeded")
    code = 0 if outcome["state"] == "succeeded" else SOME_FAILED
    what = f"the campaign ran to its end: {there} of {len(subjects)} subjects succeeded"
    return replace(state, what=what, exit_code=code, facts={**state.facts, "outcome": outcome})


# -- parts -------------------------------------------------------------------------------------------------


def _state(job: Document) -> JobState:
    return job_state(job, kueue=QUEUE in job["metadata"].get("labels", {}))


def digest_of(job: Document) -> str | None:
    annotations: Mapping[str, str] = job["metadata"].get("annotations") or {}
    return annotations.get(DIGEST)


def _make_room(api: Api, job: Document, there: Document) -> None:
    """Delete a job that has ended, for another of its name.

    Raises:
        UserError: It has not ended, or is no job of ours.
    """
    name, metadata = job["metadata"]["name"], there["metadata"]
    campaign = (metadata.get("annotations") or {}).get(CAMPAIGN)
    if campaign != job["metadata"]["annotations"][CAMPAIGN]:
        raise UserError(
            f"there is another job {name} in {api.namespace}",
            f"it was not made for this campaign but for {campaign or 'something else'}",
            "submit under another --name, or delete it",
        )
    state = _state(there)
    if state.state != "stopping" and not state.ended:
        raise UserError(
            f"{name} has been submitted already, with another manifest or other options",
            state.line(),
            f"wait for its end, or end it with raybooth jobs cancel {name}",
        )
    if state.state != "stopping":
        api.delete("RayJob", name, metadata.get("uid"))
    for found in api.watch("RayJob", name):
        if found is None or found["metadata"].get("uid") != metadata.get("uid"):
            return


def _carry(api: Api, document: Document, job: Document) -> None:
    """Make an object that goes when its job goes. Pods wait for it, so it may come after them."""
    metadata, owner = document["metadata"], job["metadata"]["uid"]
    reference = {
        "apiVersion": job["apiVersion"],
        "kind": job["kind"],
        "name": job["metadata"]["name"],
        "uid": owner,
    }
    owned = {**document, "metadata": {**metadata, "ownerReferences": [reference]}}
    for _ in range(TRIES):
        if api.create(owned) is not None:
            return
        there = api.read(document["kind"], metadata["name"])
        if there is None:
            continue
        owners = [reference["uid"] for reference in there["metadata"].get("ownerReferences") or []]
        if owner in owners:
            return
        api.delete(document["kind"], metadata["name"], there["metadata"].get("uid"))
    raise SystemFailure(
        f"{document['kind']} {metadata['name']} is not made", "one of its name comes back", "submit it again"
    )


def _no_job(api: Api, name: str) -> UserError:
    known = ", ".join(str(state.facts["job"]) for state in jobs(api)[:10])
    return UserError(
        f"there is no job {name} in {api.namespace}", f"there are {known}" if known else "there is none",
        "give --namespace, or see raybooth jobs list",
    )  # fmt: skip
