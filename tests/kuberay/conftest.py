"""This file is where tests get a Kubernetes API over real HTTP that checks what it is sent, and KubeRay's schemas."""

import asyncio
import json
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp.web
import attrs
import jsonschema
import kmock
import pytest
import yaml
from kubernetes import client
from typer.testing import CliRunner

from cluster.kuberay import KubeApi
from orchestrator.cli import app

CRDS = Path(__file__).parents[3] / "shared" / "crds"
FILES = {"RayJob": "ray.io_rayjobs.yaml", "RayService": "ray.io_rayservices.yaml"}
JOBS = "/apis/ray.io/v1/namespaces/team-a/rayjobs"


# -- schemas -----------------------------------------------------------------------------------------------


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A CRD's schema as JSON schema in which a field that it does not name is a mistake.

    Differs from OpenAPI in what Kubernetes adds: numbers or texts, null, defaults (which may stand for what is
    required), and parts that hold anything.
    """
    out = {key: schema[key] for key in ("type", "enum", "pattern", "minimum", "maximum") if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if schema.get("nullable"):
        out["type"] = [schema["type"], "null"]
    if "properties" in schema:
        inner = {key: strict(value) for key, value in schema["properties"].items()}
        out["properties"] = inner
        given = {key for key, value in schema["properties"].items() if "default" in value}
        out["required"] = [key for key in schema.get("required", []) if key not in given]
        out["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    elif isinstance(schema.get("additionalProperties"), Mapping):
        out["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        out["items"] = strict(schema["items"])
    return out


@pytest.fixture(scope="session")
def complaints() -> Callable[[Mapping[str, Any]], list[str]]:
    """What the schema of KubeRay 1.7 has against an object."""
    if not CRDS.is_dir():
        pytest.skip(f"the CRDs of KubeRay are not in {CRDS}")
    known: dict[str, Any] = {}

    def check(document: Mapping[str, Any]) -> list[str]:
        kind = document["kind"]
        if kind not in known:
            crd = yaml.load((CRDS / FILES[kind]).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            [version] = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
            known[kind] = jsonschema.Draft202012Validator(schema)
        return [
            f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
            for error in known[kind].iter_errors(document)
        ]

    return check


# -- a server ----------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """What the server does once instead of answering."""

    method: str
    path: str
    status: int = 200
    body: Any = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    """The connection breaks after the body."""
    wait_s: float = 0.0


@attrs.define(kw_only=True)
class Server(kmock.KubernetesEmulator):
    """kmock's emulator of Kubernetes, with what our client relies on beyond it."""

    check: Any = None
    faults: list[Fault] = attrs.field(factory=list)
    seen: list[tuple[str, str, Any]] = attrs.field(factory=list)

    async def __call__(self, raw_request: Any) -> Any:
        body = await raw_request.read()
        data = json.loads(body) if body else None
        self.seen.append((raw_request.method, raw_request.path_qs, data))
        for fault in self.faults:
            if fault.method == raw_request.method and fault.path in raw_request.path_qs:
                self.faults.remove(fault)
                return await self._fail(raw_request, fault)
        if raw_request.method in ("POST", "PUT") and (refused := self._admit(data)):
            return refused
        if raw_request.method == "POST" and "dryRun=All" in raw_request.path_qs:
            return aiohttp.web.json_response(data)
        if raw_request.method == "DELETE" and (uid := ((data or {}).get("preconditions") or {}).get("uid")):
            name = raw_request.path.rpartition("/")[2]
            there = [o for (_, _, known), o in self.objects.items() if known == name and not o.deleted]
            if there and uid != there[0].raw["metadata"]["uid"]:
                return self._status(409, "the UID in the precondition does not match")
        if raw_request.method == "POST":
            now = f"2026-11-27T08:00:{len(self.seen) % 60:02}Z"
            data["metadata"].update(
                uid=str(uuid4()), resourceVersion=str(len(self.seen)), creationTimestamp=now
            )
            raw_request._read_bytes = json.dumps(data).encode()  # what kmock reads next
        if raw_request.method == "PUT":
            return self._put(raw_request.path.rpartition("/")[2], data)
        return await super().__call__(raw_request)

    def _put(self, name: str, document: dict[str, Any]) -> Any:
        """kmock updates by PATCH alone; a PUT of what has changed since it was read is a conflict."""
        [there] = [o for (_, _, known), o in self.objects.items() if known == name and not o.deleted]
        before = there.raw["metadata"]
        if document["metadata"].get("resourceVersion") != before["resourceVersion"]:
            return self._status(409, "the object has been modified")
        document["metadata"].update(uid=before["uid"], resourceVersion=str(len(self.seen)))
        there.create(document)
        return aiohttp.web.json_response(document)

    def _admit(self, document: Mapping[str, Any]) -> Any:
        """What a real server refuses: unknown fields, values that do not fit."""
        if document["kind"] in FILES and self.check and (wrong := self.check(document)):
            return self._status(422, f"{document['kind']} is invalid: {'; '.join(wrong)}")
        return None

    def _status(self, code: int, message: str) -> Any:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}
        return aiohttp.web.json_response(status, status=code)

    async def _fail(self, request: Any, fault: Fault) -> Any:
        await asyncio.sleep(fault.wait_s)
        body = fault.body if isinstance(fault.body, str) else json.dumps(fault.body)
        response = aiohttp.web.StreamResponse(status=fault.status, headers=dict(fault.headers))
        await response.prepare(request)
        await response.write(body.encode())
        if fault.cut:
            request.transport.close()
        else:
            await response.write_eof()
        return response


@dataclass
class Cluster:
    """The server, as a test sees it."""

    url: str
    server: Server

    def fail(self, method: str, path: str, **how: Any) -> None:
        """Have the next such request fail."""
        self.server.faults.append(Fault(method, path, **how))

    def report(self, name: str, plural: str = "rayjobs", **status: Any) -> None:
        """Say something of an object, as the operator does."""
        self.patch(f"/apis/ray.io/v1/namespaces/team-a/{plural}/{name}", {"status": status})

    def patch(self, path: str, body: Mapping[str, Any]) -> None:
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/merge-patch+json"},
            method="PATCH",
        )
        urllib.request.urlopen(request).close()

    def sent(self, method: str, path: str = "") -> list[Any]:
        """The bodies of requests that came."""
        return [body for verb, at, body in self.server.seen if verb == method and path in at]


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A Kubernetes API on the loopback, in a thread of its own; it checks bodies where the CRDs are there."""
    check = request.getfixturevalue("complaints") if CRDS.is_dir() else None
    ready, state = threading.Event(), dict[str, Any]()

    async def serve() -> None:
        server = Server(check=check)
        for resource in ("ray.io/v1/rayjobs", "ray.io/v1/rayservices", "v1/configmaps", "v1/pods"):
            server.resources[resource] = {}
        state["end"] = asyncio.Event()
        async with server, kmock.Server(server) as listening:
            state.update(url=str(listening.url).rstrip("/"), server=server, loop=asyncio.get_running_loop())
            ready.set()
            await state["end"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    yield Cluster(state["url"], state["server"])
    state["loop"].call_soon_threadsafe(state["end"].set)
    thread.join(30)


@pytest.fixture
def naps() -> list[float]:
    """How long the client would have waited between tries."""
    return []


@pytest.fixture
def api(cluster: Cluster, naps: list[float]) -> KubeApi:
    """Our client of it."""
    return KubeApi(client.Configuration(host=cluster.url), "team-a", naps.append)


# -- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def booth(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """The command line, with a kubeconfig for the server and a campaign.yaml in its folder."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": cluster.url}}],
        "users": [{"name": "me", "user": {"token": "t"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me", "namespace": "team-a"}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    (tmp_path / "night.yaml").write_text("subjects: [{name: rex, class: dog, images: s3://b/rex/}]\n")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    yield lambda *words: CliRunner().invoke(app, list(words))
