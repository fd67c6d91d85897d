"""This file is where a call to the Kubernetes API is tried again, and what the server refuses becomes an error."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from kubernetes.client.exceptions import ApiException, OpenApiException
from urllib3.exceptions import HTTPError

from cluster.errors import RayboothError, SystemFailure, UserError

TRIES = 6
PAUSE_S = 0.5  # before a call is tried again, doubled each time, unless the server says how long
LONGEST_S = 20.0
BUSY = (408, 429, 500, 502, 503, 504)
_T = TypeVar("_T")


class Missing(RayboothError):
    """There is no such object."""


class Taken(RayboothError):
    """There is one already, or another than was meant."""


class Calls:
    """Calls of one server.

    Args:
        server: Its address, for people.
        namespace: What is called for.
        sleep: Waits some seconds.
    """

    def __init__(self, server: str, namespace: str, sleep: Callable[[float], None]) -> None:
        self._server, self._namespace, self._sleep = server, namespace, sleep

    def call(self, what: str, act: Callable[[], _T]) -> _T:
        """Call the server, again and again while it is busy, ill or away.

        Args:
            what: What happened when it fails, for people.
            act: The call.

        Raises:
            Missing, Taken: The object is not there; one of that name is.
            UserError: The server refuses it.
            SystemFailure: It does not answer.
        """
        pause = PAUSE_S
        for left in reversed(range(TRIES)):
            try:
                return act()
            except ApiException as error:
                if error.status not in BUSY or not left:
                    raise self.failure(what, error) from error
                self._sleep(min(_retry_after(error) or pause, LONGEST_S))
            except HTTPError as error:
                if not left:
                    seen = f"{self._server}: {error}"
                    raise SystemFailure(
                        f"{what}: the cluster does not answer", seen, "check the network and try again"
                    ) from error
                self._sleep(pause)
            except OpenApiException as error:  # the client refuses what it is given
                raise SystemFailure(what, str(error), "report it") from error
            pause = min(2 * pause, LONGEST_S)
        raise AssertionError("the last try returns or raises")

    def failure(self, what: str, error: ApiException) -> RayboothError:
        """The error that an answer is."""
        said = _said(error)
        if error.status == 409:
            return Taken(what, said)
        if error.status == 404:
            if "could not find the requested resource" in said or "page not found" in said:
                return UserError(
                    f"{what}: the cluster does not know KubeRay's kinds", said, "install KubeRay 1.7 or newer"
                )
            if "namespaces " in said:
                return UserError(
                    f"{what}: there is no namespace {self._namespace}", said, "make it, or give --namespace"
                )
            return Missing(what, said)
        if error.status == 401:
            return UserError(
                f"{what}: the cluster does not know you", said, "log in again, or check the kubeconfig"
            )
        if error.status == 403:
            if "exceeded quota" in said:
                return UserError(
                    f"{what}: the namespace's quota is full",
                    said,
                    "wait for others to end, or ask for less: --gangs",
                )
            return UserError(
                f"{what}: it is not allowed", said, "ask for the rights in k8s/base: kubectl auth can-i"
            )
        if error.status in (400, 422):
            return UserError(f"{what}: the cluster refuses it", said, "correct what it names")
        return SystemFailure(f"{what}: the cluster says {error.status}", said, "try again later")


def checked(response: Any) -> Any:
    """An answer of which nothing was read yet.

    Raises:
        ApiException: It is a refusal.
    """
    if not 200 <= response.status <= 299:
        response.read()
        raise ApiException(http_resp=response)
    return response


def plain(response: Any) -> dict[str, Any]:
    """What the server says; raises as `checked`."""
    return dict(json.loads(checked(response).read()))


def _said(error: ApiException) -> str:
    """The server's own words."""
    body = error.body or ""
    if isinstance(body, bytes):
        body = body.decode(errors="replace")
    try:
        message = json.loads(body).get("message")
    except (ValueError, AttributeError):
        message = body
    return " ".join(str(message or error.reason or error.status).split())[:600]


def _retry_after(error: ApiException) -> float | None:
    value = (error.headers or {}).get("Retry-After", "")
    return float(value) if str(value).isdigit() else None
