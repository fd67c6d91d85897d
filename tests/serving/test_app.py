"""The service on Ray Serve: what was accepted is answered, whatever happens to the replicas."""

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import ray
from ray import serve
from ray.exceptions import RayActorError

from cluster.session import session
from cluster.storage import Storage
from serving.app import service, start, stop
from serving.bodies import CARRIED_BYTES
from serving.ingress import create_app
from serving.replicas import Replicas
from serving.settings import ServingSettings
from training.png import decode_png, png_parameters

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WAIT_S = 120.0
PAUSE_S = 0.3  # between two requests of a client: replicas that start need the machine too
SUBJECTS = ("lora", "lora2", "wide", "text", "full", "base")
REPLICAS = Replicas(min=2, max=2, cpus=1, waiting=200, drain_s=60)


@dataclass
class Service:
    """A service that is up."""

    port: int
    settings: ServingSettings
    storage: Storage

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def ask(self, **body: Any) -> tuple[int, dict[str, Any], Any]:
        """Status, headers and JSON of an answer of the images route."""
        request = urllib.request.Request(
            f"{self.address}/v1/images/generations",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return answer.status, dict(answer.headers), json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), json.load(error)

    def draw(self, subject: str, seed: int, steps: int = 4) -> bytes:
        """An image's PNG."""
        status, _, told = self.ask(model=subject, prompt="a photo of a dog", seed=seed, steps=steps)
        assert status == 200, told
        return base64.b64decode(told["data"][0]["b64_json"])

    def figures(self) -> dict[str, float]:
        """What `/metrics` says without labels."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=WAIT_S) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.split() for line in lines if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value in pairs}

    def pids(self) -> list[int]:
        """Processes of the replicas that draw; none while one of them has just died."""
        handle = serve.get_deployment_handle("replica", "raybooth")
        try:
            return sorted(handle.broadcast("pid").results())
        except RayActorError:
            return []


@pytest.fixture(scope="module")
def up(zoo: Storage, tiny_base: Path) -> Iterator[Service]:
    """Two replicas and an ingress on a Ray of their own."""
    settings = ServingSettings.model_validate(
        {
            "base": str(tiny_base),
            "sizes": ["16x16"],
            "auth": "off",
            "rates": {"per_minute": 100_000, "burst": 1000, "at_once": 500},
            "limits": {"deadline_s": 120, "steps": 1000},
        }
    )
    with session(None, 4, zoo):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start(service(settings, REPLICAS, zoo, create_app), "127.0.0.1", port)
        yield Service(port, settings, zoo)
        stop()


def test_an_image_over_http_says_who_it_shows(up: Service) -> None:
    png = up.draw("lora", 7)
    assert decode_png(png).shape == (16, 16, 3)
    assert png_parameters(png)["subject"] == "lora-v1"
    assert up.draw("lora", 7) == png and up.draw("base", 7) != png


def test_ray_keeps_a_line_of_each_request(up: Service) -> None:
    request = urllib.request.Request(f"{up.address}/v1/models", headers={"x-request-id": "asked-for-models"})
    with urllib.request.urlopen(request, timeout=WAIT_S):
        pass
    node = ray._private.worker._global_node
    written = (file.read_text(errors="replace") for file in Path(node.get_logs_dir_path()).glob("worker-*"))
    [line] = [line for text in written for line in text.splitlines() if "asked-for-models" in line]
    assert json.loads(line).items() >= {"route": "/v1/models", "status": 200, "tenant": "default"}.items()


def test_what_a_replica_refuses_is_told_as_it_said_it(up: Service) -> None:
    status, _, told = up.ask(model="base", prompt="a dog " * 200, steps=1)
    assert (status, told["error"]["code"]) == (422, "cannot_be_done"), told


@pytest.mark.parametrize("letters", [10_000, CARRIED_BYTES, 900_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_any_size_reaches_the_ingress_whole(up: Service, letters: int, chunked: bool) -> None:
    client = http.client.HTTPConnection(up.address.removeprefix("http://"), timeout=WAIT_S)
    body = json.dumps({"model": "base", "prompt": "a" * letters}).encode()
    sent = iter([body[:100], body[100:]]) if chunked else body
    headers = {"content-type": "application/json"} | ({"transfer-encoding": "chunked"} if chunked else {})
    client.request("POST", "/v1/images/generations", sent, headers, encode_chunked=chunked)
    with closing(client), client.getresponse() as answer:
        error = json.load(answer)["error"]
    assert answer.status == 422 and error["param"] == "prompt" and "2000" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(up: Service, stream: bool) -> None:
    before = up.figures().get("raybooth_replica_cancelled", 0)
    client = http.client.HTTPConnection(up.address.removeprefix("http://"))
    body = json.dumps({"model": "base", "prompt": "a dog", "steps": 1000, "n": 4, "stream": stream})
    client.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    _wait_for(lambda: up.figures().get("raybooth_replica_running", 0) >= 4)
    client.close()
    _wait_for(lambda: up.figures()["raybooth_replica_cancelled"] == before + 4)
    _wait_for(lambda: up.figures()["raybooth_replica_running"] == 0)


def test_every_accepted_request_is_answered_though_a_replica_is_killed_and_all_are_redeployed(
    up: Service,
) -> None:
    calm = {subject: up.draw(subject, 3, steps=30) for subject in SUBJECTS}
    answers: Counter[int] = Counter()
    wrong: list[Any] = []
    over = threading.Event()

    def client(number: int) -> None:
        subject = SUBJECTS[number % len(SUBJECTS)]
        while not over.wait(PAUSE_S):
            status, headers, told = up.ask(model=subject, prompt="a photo of a dog", seed=3, steps=30)
            answers[status] += 1
            if status == 200:
                if base64.b64decode(told["data"][0]["b64_json"]) != calm[subject]:
                    wrong.append(subject)
            elif status not in (429, 503) or "Retry-After" not in {h.title() for h in headers}:
                wrong.append((status, told))

    clients = [threading.Thread(target=client, args=(i,)) for i in range(6)]
    for one in clients:
        one.start()
    try:
        _wait_for(lambda: answers[200] >= 16)
        victim = up.pids()[0]
        os.kill(victim, signal.SIGKILL)
        _wait_for(lambda: len(up.pids()) == 2 and victim not in up.pids())
        seen = answers[200]
        _wait_for(lambda: answers[200] >= seen + 16)
        before = set(up.pids())
        changed = REPLICAS.model_copy(update={"cache_gib": 1.0})
        start(service(up.settings, changed, up.storage, create_app), "127.0.0.1", up.port)
        _wait_for(lambda: (now := set(up.pids())) and not before & now)
        seen = answers[200]
        _wait_for(lambda: answers[200] >= seen + 16)
    finally:
        over.set()
        for one in clients:
            one.join()
    print(f"answers by status: {dict(answers)}")
    assert not wrong and answers[200] >= 48
    assert set(answers) <= {200, 429, 503}


def _wait_for(condition: Any) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.1)


def test_the_ray_that_serves_asks_for_its_token(up: Service) -> None:
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and ray.is_initialized()
    # What each client of Ray does first. Refused, `ray.init` itself asks again for two minutes.
    join = f"from ray._raylet import GcsClient; GcsClient({ray.get_runtime_context().gcs_address!r})"
    known, unknown = (
        subprocess.run(
            [sys.executable, "-c", join],
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
            timeout=WAIT_S,
            capture_output=True,
            text=True,
        )
        for token in (os.environ["RAY_AUTH_TOKEN"], "0" * 64)
    )
    assert known.returncode == 0, known.stderr
    assert unknown.returncode != 0 and "AuthenticationError" in unknown.stderr


def test_a_replica_that_is_called_past_ray_asks_for_the_token_too(up: Service) -> None:
    listening = psutil.Process(up.pids()[0]).net_connections("tcp")
    ports = {one.laddr.port for one in listening if one.status == psutil.CONN_LISTEN}
    said = set()
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=WAIT_S)
            said.add((refused.value.code(), refused.value.details()))
    assert (grpc.StatusCode.UNAUTHENTICATED, "Invalid or missing authentication token") in said


def test_a_service_that_may_sleep_is_ready_with_no_replica_and_looking_at_it_does_not_keep_it_awake(
    up: Service,
) -> None:
    asleep = Replicas(min=0, max=1, cpus=1, upscale_delay_s=0, downscale_delay_s=1)
    start(service(up.settings, asleep, up.storage, create_app), "127.0.0.1", up.port)
    until = time.monotonic() + WAIT_S

    def awake() -> float:
        with urllib.request.urlopen(f"{up.address}/readyz", timeout=WAIT_S) as ready:
            assert ready.status == 200
        time.sleep(0.2)
        assert time.monotonic() < until
        return up.figures().get("raybooth_replica_replicas", 0)

    while awake():
        pass
    assert up.draw("lora", 7)
    assert awake() == 1
    while awake():
        pass
