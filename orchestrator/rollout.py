"""This file is where a service is handed to a cluster or brought up to date there, and waited for."""

import time
from collections.abc import Callable

from cluster.errors import SystemFailure, UserError
from cluster.jobstate import JobState, service_state
from orchestrator.launch import TRIES, Api, Document, digest_of
from orchestrator.rayservice import SERVICE


def deploy(api: Api, document: Document) -> tuple[JobState, str]:
    """Make a service, or bring it up to date; an unchanged one is left alone.

    Args:
        api: The cluster.
        document: Of `render_service`.

    Returns:
        Where it stands, and what was done: `created`, `updated` or `unchanged`.

    Raises:
        UserError: The name is somebody else's, or the cluster refuses it.
        SystemFailure: The cluster does not answer.
    """
    name = document["metadata"]["name"]
    for _ in range(TRIES):
        if made := api.create(document):
            return service_state(made), "created"
        there = api.read("RayService", name)
        if there is None:
            continue
        metadata = there["metadata"]
        if SERVICE not in (metadata.get("annotations") or {}):
            raise UserError(
                f"there is another service {name} in {api.namespace}", "it was not made by raybooth",
                "deploy under another --name",
            )  # fmt: skip
        if digest_of(there) == digest_of(document):
            return service_state(there), "unchanged"
        version = {"resourceVersion": metadata.get("resourceVersion")}
        if updated := api.replace({**document, "metadata": {**document["metadata"], **version}}):
            return service_state(updated), "updated"
    raise SystemFailure(f"the service {name} is not deployed", "it keeps changing", "deploy it again")


def service_state_of(api: Api, name: str) -> JobState:
    """Where a service stands; raises `UserError` when there is none."""
    if (there := api.read("RayService", name)) is None:
        raise _no_service(api, name)
    return service_state(there)


def follow_service(api: Api, name: str, tell: Callable[[JobState], None], wait_s: float) -> JobState:
    """Watch a service until it serves what was last deployed, or has failed.

    Args:
        api: The cluster.
        name: Of the service.
        tell: Told of every state that differs from the one before.
        wait_s: How long at most.

    Raises:
        UserError: There is no such service, or it was deleted meanwhile.
        SystemFailure: It does not serve in time.
    """
    last, until = None, time.monotonic() + wait_s
    for service in api.watch("RayService", name):
        if service is None:
            raise _no_service(api, name)
        state = service_state(service)
        if state != last:
            tell(state)
        last = state
        if state.state in ("serving", "failed"):
            return state
        if time.monotonic() > until:
            break
    raise SystemFailure(
        f"the service {name} does not serve after {wait_s:g} s", last.line() if last else "",
        f"see kubectl describe rayservice {name}, and its pods",
    )  # fmt: skip


def _no_service(api: Api, name: str) -> UserError:
    found = api.listed("RayService", "app.kubernetes.io/managed-by=raybooth")
    known = ", ".join(service["metadata"]["name"] for service in found[:10])
    return UserError(
        f"there is no service {name} in {api.namespace}", f"there are {known}" if known else "there is none",
        "give --namespace",
    )  # fmt: skip
