"""This file is where the Kubernetes API is spoken to: objects made, read, watched and deleted, and logs of pods.

Every call has a timeout, and is tried again when the server is busy (429), ill (5xx) or away. It sends no more verbs
than `k8s/base` grants: create, get, list, watch, update and delete.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

from cluster.errors import SystemFailure, UserError
from cluster.kubecalls import BUSY, PAUSE_S, TRIES, Calls, Missing, Taken, checked, plain

Document = dict[str, Any]

TIMEOUT_S = (10.0, 30.0)  # to connect, and between two bytes of an answer
SILENT_S = 300.0  # that a log which is followed may say nothing before it is asked for again
WATCH_S = 60  # after which the server ends a watch, and it is begun again
_RAW: dict[str, Any] = {"_request_timeout": TIMEOUT_S, "_preload_content": False}
_STRICT = {"field_validation": "Strict"}  # a field that the server does not know is refused, not dropped
_RAY = {"RayJob": "rayjobs", "RayService": "rayservices", "RayCluster": "rayclusters"}
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class KubeApi:
    """One namespace of a cluster.

    Args:
        configuration: Of the server and the credentials.
        namespace: The namespace.
        sleep: Waits some seconds.
    """

    def __init__(
        self, configuration: client.Configuration, namespace: str, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        configuration.retries = False  # ours are told apart by what failed
        self.namespace, self.server = namespace, str(configuration.host)
        self._sleep, self._calls = sleep, Calls(self.server, namespace, sleep)
        api = client.ApiClient(configuration)
        self._core, self._custom = client.CoreV1Api(api), client.CustomObjectsApi(api)

    @classmethod
    def connect(cls, namespace: str | None, context: str | None) -> "KubeApi":
        """The cluster of the kubeconfig, or the one that this process runs in.

        Args:
            namespace: `None` takes the context's, else `default`.
            context: Of the kubeconfig; `None` takes the current one.

        Raises:
            UserError: There is neither.
        """
        found, file = (
            client.Configuration(),
            os.environ.get("KUBECONFIG"),
        )  # the client reads it only when imported
        try:
            try:
                config.load_kube_config(file, context, found)
                contexts, current = config.list_kube_config_contexts(file)
                named = next((c for c in contexts if c["name"] == context), current)
                home = named["context"].get("namespace")
            except ConfigException:
                if context is not None or "KUBERNETES_SERVICE_HOST" not in os.environ:
                    raise
                config.load_incluster_config(client_configuration=found)
                home = _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else None
        except (ConfigException, OSError) as error:
            raise UserError(
                "no Kubernetes cluster is configured",
                " ".join(str(error).split()),
                "set KUBECONFIG or --context; --dry-run=client needs no cluster",
            ) from error
        return cls(found, namespace or home or "default")

    # -- objects ---------------------------------------------------------------------------------------------

    def create(self, document: Mapping[str, Any], dry_run: bool = False) -> Document | None:
        """Make an object.

        Args:
            document: A RayJob, a RayService or a ConfigMap.
            dry_run: The server checks it, and makes nothing.

        Returns:
            It, as the server has it; `None` when there is one of that name.
        """
        kind, name = document["kind"], document["metadata"]["name"]
        options: dict[str, Any] = {**_STRICT, **({"dry_run": "All"} if dry_run else {})}
        custom, core = self._custom.create_namespaced_custom_object, self._core.create_namespaced_config_map
        try:
            if kind in _RAY:
                return self._ask(f"{kind} {name} is not made", custom, *self._at(kind), document, **options)
            return self._ask(f"{kind} {name} is not made", core, self.namespace, document, **options)
        except Taken:
            return None

    def read(self, kind: str, name: str) -> Document | None:
        """An object; `None` when there is none."""
        custom, core = self._custom.get_namespaced_custom_object, self._core.read_namespaced_config_map
        try:
            if kind in _RAY:
                return self._ask(f"{kind} {name} is not read", custom, *self._at(kind), name)
            return self._ask(f"{kind} {name} is not read", core, name, self.namespace)
        except Missing:
            return None

    def replace(self, document: Mapping[str, Any]) -> Document | None:
        """Put an object in the place of the one that was read; `None` when that has changed since, or is gone.

        Args:
            document: A RayService with the `metadata.resourceVersion` that was read.
        """
        kind, name = document["kind"], document["metadata"]["name"]
        custom = self._custom.replace_namespaced_custom_object
        try:
            return self._ask(
                f"{kind} {name} is not updated", custom, *self._at(kind), name, document, **_STRICT
            )
        except (Missing, Taken):
            return None

    def delete(self, kind: str, name: str, uid: str | None = None) -> bool:
        """Delete an object and what belongs to it.

        Args:
            kind: Its kind.
            name: Its name.
            uid: Of the very object that is meant; one of the same name that was made since is left.

        Returns:
            Whether there was one.
        """
        preconditions = client.V1Preconditions(uid=uid) if uid else None
        body = client.V1DeleteOptions(propagation_policy="Background", preconditions=preconditions)
        custom, core = self._custom.delete_namespaced_custom_object, self._core.delete_namespaced_config_map
        try:
            if kind in _RAY:
                self._ask(f"{kind} {name} is not deleted", custom, *self._at(kind), name, body=body)
            else:
                self._ask(f"{kind} {name} is not deleted", core, name, self.namespace, body=body)
        except (Missing, Taken):
            return False
        return True

    def listed(self, kind: str, selector: str) -> list[Document]:
        """The objects of a kind, or the pods, with some labels."""
        what = f"{kind}s are not listed"
        if kind in _RAY:
            custom = self._custom.list_namespaced_custom_object
            return list(self._ask(what, custom, *self._at(kind), label_selector=selector)["items"])
        return list(
            self._ask(what, self._core.list_namespaced_pod, self.namespace, label_selector=selector)["items"]
        )

    def watch(self, kind: str, name: str) -> Iterator[Document | None]:
        """An object as it is now and whenever it changes; `None`, and the end, once it is gone.

        A watch that ends, expires (410) or breaks is begun again from what there is then, so nothing is missed but
        states that have passed.
        """
        broken = 0
        while (found := self.read(kind, name)) is not None:
            yield found
            began = time.monotonic()
            try:
                for event in watch.Watch().stream(
                    self._custom.list_namespaced_custom_object,
                    *self._at(kind),
                    field_selector=f"metadata.name={name}",
                    resource_version=found["metadata"].get("resourceVersion"),
                    timeout_seconds=WATCH_S,
                    _request_timeout=(TIMEOUT_S[0], WATCH_S + TIMEOUT_S[1]),
                ):
                    if event["type"] == "DELETED":
                        yield None
                        return
                    if event["type"] in ("ADDED", "MODIFIED"):
                        yield event["object"]
            except ApiException as error:
                if error.status not in (410, *BUSY):
                    raise self._calls.failure(f"{kind} {name} is not watched", error) from error
            except HTTPError:
                pass
            broken = min(broken + 1, TRIES) if time.monotonic() - began < PAUSE_S else 0
            self._sleep(PAUSE_S * (2**broken - 1))
        yield None

    # -- pods ------------------------------------------------------------------------------------------------

    def log(self, pod: str, container: str, follow: bool) -> Iterator[str]:
        """The lines of a container's log, each once, also when the connection breaks.

        Args:
            pod: Name of the pod.
            container: Of its container.
            follow: Go on until it ends.
        """
        told, idle = 0, 0
        while idle < TRIES:
            began = told
            response = self._calls.call(
                f"the log of {pod} is not read",
                lambda: checked(
                    self._core.read_namespaced_pod_log(
                        pod,
                        self.namespace,
                        container=container,
                        follow=follow,
                        _preload_content=False,
                        _request_timeout=(TIMEOUT_S[0], SILENT_S if follow else TIMEOUT_S[1]),
                    )
                ),
            )
            try:
                for number, line in enumerate(_lines(response)):
                    if number >= told:
                        told += 1
                        yield line
                return
            except HTTPError:
                idle = 0 if told > began else idle + 1
                self._sleep(PAUSE_S)
            finally:
                with suppress(Exception):
                    response.release_conn()
        raise SystemFailure(f"the log of {pod} breaks off", f"after line {told}", "ask for it again")

    def _ask(self, what: str, method: Callable[..., Any], *args: Any, **options: Any) -> Document:
        """Call a method of the client, and read the server's JSON ourselves: its models drop what they do not know."""
        return self._calls.call(what, lambda: plain(method(*args, **options, **_RAW)))

    def _at(self, kind: str) -> tuple[str, str, str, str]:
        return "ray.io", "v1", self.namespace, _RAY[kind]


def _lines(response: Any) -> Iterator[str]:
    rest = b""
    for chunk in response.stream(amt=None, decode_content=False):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")
