"""Webhooks are signed, sent until they are heard, and never sent where a user may not reach from here."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.errors import SystemFailure, UserError
from cluster.storage import Storage
from serving.outbound import Outbound
from serving.settings import Outward
from serving.webhooks import WebhookSecrets, signed

INPUT = {"prompt": "a dog", "steps": 1, "guidance_scale": 1}
WAIT_S = 60.0


class Receiver(ThreadingHTTPServer):
    """A server on the loopback that keeps what it hears and answers what it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.heard: list[tuple[str, dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.called = threading.Condition()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def wait_for(self, calls: int) -> list[tuple[str, dict[str, str], bytes]]:
        with self.called:
            assert self.called.wait_for(lambda: len(self.heard) >= calls, WAIT_S)
        return self.heard


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with self.server.called:
            self.server.heard.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(self.server.statuses.pop(0) if self.server.statuses else 204)
            self.send_header("location", "/elsewhere")
            self.end_headers()
            self.server.called.notify_all()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"x" * 1000)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    yield server
    server.shutdown()
    server.server_close()


def verify(secret: str, headers: dict[str, str], body: bytes) -> bool:
    """As the standard-webhooks libraries do."""
    text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    good = "v1," + base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
    return good in headers["webhook-signature"].split(" ")


def test_a_webhook_hears_of_the_end_signed_by_the_tenants_secrets(serve, receiver) -> None:
    clients = serve(outward={"allow_loopback": True})
    client = clients.of()
    old = client.get("/v1/webhooks/secret").json()["key"]
    new = client.post("/v1/webhooks/secret/rotate").json()["key"]
    assert old != new == client.get("/v1/webhooks/secret").json()["key"]
    assert clients.of(scopes=["images"]).get("/v1/webhooks/secret").status_code == 403
    other = clients.of("acme").get("/v1/webhooks/secret").json()["key"]
    body = {"model": "base", "input": INPUT, "webhook": f"{receiver.url}/hook?a=1"}
    body["webhook_events_filter"] = ["start", "completed"]
    asked = client.post("/v1/predictions", json=body, headers={"prefer": "wait=60"}).json()
    (path, headers, data), (_, last, final) = receiver.wait_for(2)
    assert path == "/hook?a=1" and headers["webhook-id"] == f"{asked['id']}-start"
    assert json.loads(data)["status"] == "processing"
    assert last["webhook-id"] == f"{asked['id']}-completed" and json.loads(final)["status"] == "succeeded"
    assert [verify(secret, last, final) for secret in (old, new, other)] == [True, True, False]
    assert not verify(new, last, final + b" ")
    image = json.loads(final)["output"][0]
    assert client.get(image).headers["content-type"] == "image/png"


def test_a_webhook_that_fails_is_sent_again_as_the_same_message(serve, receiver) -> None:
    receiver.statuses = [500, 302, 200]
    clients = serve(outward={"allow_loopback": True, "retries_s": [0, 0, 0]})
    body = {"model": "base", "input": INPUT, "webhook": receiver.url}
    client = clients.of()
    asked = client.post("/v1/predictions", json=body, headers={"prefer": "wait=60"}).json()
    heard = receiver.wait_for(3)
    assert len({headers["webhook-id"] for _, headers, _ in heard}) == 1
    assert {path for path, _, _ in heard} == {"/"}, "a redirect is not followed"
    while (state := client.get(f"/v1/predictions/{asked['id']}").json()["webhook_state"]) is None:
        threading.Event().wait(0.05)
    assert state == "delivered" and len(receiver.heard) == 3


@pytest.mark.parametrize(("statuses", "calls"), [([500, 500], 2), ([410], 1)])
def test_a_webhook_is_given_up_in_the_end(serve, receiver, statuses: list[int], calls: int) -> None:
    receiver.statuses = list(statuses)
    clients = serve(outward={"allow_loopback": True, "retries_s": [0]})
    client = clients.of()
    body = {"model": "base", "input": INPUT, "webhook": receiver.url}
    asked = client.post("/v1/predictions", json=body, headers={"prefer": "wait=60"}).json()
    while (state := client.get(f"/v1/predictions/{asked['id']}").json()["webhook_state"]) is None:
        threading.Event().wait(0.05)
    assert (state, len(receiver.heard)) == ("given up", calls)


def test_a_secret_that_was_rotated_out_signs_for_a_day(storage: Storage, clock) -> None:
    secrets = WebhookSecrets(storage, clock)
    [first] = secrets.of("acme")
    second = secrets.rotate("acme")
    assert secrets.of("acme") == [second, first] == WebhookSecrets(storage, clock).of("acme")
    clock.now += 25 * 3600
    assert secrets.of("acme") == [second]


def test_the_signature_is_the_standards_own_example() -> None:
    # https://github.com/standard-webhooks/standard-webhooks, "Signature scheme"
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    headers = signed([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330.0, body)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


# -- where it does not go ----------------------------------------------------------------------------------


def reaching(*addresses: str, **settings: object) -> Outbound:
    """An outbound whose every name has these addresses."""
    return Outbound(
        Outward.model_validate(settings), lambda host, port: [(0, 0, 0, "", (a, port)) for a in addresses]
    )


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.8", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1"),
        *("::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("2002:7f00:1::", "2002:0a00:1::", "2001:0:7f00:1::", "2001:db8::1"),
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    with pytest.raises(UserError, match="is not public"):
        reaching(address).target("https://hook.example/")
    with pytest.raises(UserError, match="is not public"):
        reaching("93.184.216.34", address).target("https://hook.example/")


def test_public_addresses_are_taken() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"):
        target = reaching(address).target("https://hook.example:8443/a?b=c")
        assert (target.address, target.host, target.port, target.path) == (
            address,
            "hook.example",
            8443,
            "/a?b=c",
        )


@pytest.mark.parametrize(
    "url",
    [
        *("http://hook.example/", "ftp://hook.example/", "file:///etc/passwd", "//hook.example", "hook", ""),
        *("https://", "https://user:pw@hook.example/", "https://hook.example:0/", "https://hook.example:x/"),
        *(
            "https://hook.example/a b",
            "https://hook.example/\r\nx: y",
            "https://h\u00f6ok.example/",
            "https://[::1",
        ),
    ],
)
def test_what_is_no_https_url_is_refused(url: str) -> None:
    with pytest.raises(UserError):
        reaching("93.184.216.34").target(url)


def test_the_loopback_is_reached_only_by_the_flag_and_nothing_private_is(receiver) -> None:
    url = f"http://127.0.0.1:{receiver.server_port}/"
    with pytest.raises(UserError):
        Outbound(Outward()).target(url)
    assert Outbound(Outward(allow_loopback=True)).target(url).address == "127.0.0.1"
    with pytest.raises(UserError):
        reaching("10.0.0.1", allow_loopback=True).target("http://hook.example/")


def test_a_name_is_resolved_once_so_that_rebinding_gains_nothing(receiver) -> None:
    asked = []

    def resolve(host: str, port: int) -> list[tuple[object, ...]]:
        asked.append(host)
        return [(0, 0, 0, "", ("127.0.0.1" if len(asked) == 1 else "10.0.0.1", port))]

    outbound = Outbound(Outward(allow_loopback=True), resolve)
    status = asyncio.run(outbound.post(f"http://hook.example:{receiver.server_port}/x", {}, b"{}"))
    assert status == 204 and asked == ["hook.example"]
    [(_, headers, _)] = receiver.wait_for(1)
    assert headers["host"] == f"hook.example:{receiver.server_port}"
    with pytest.raises(UserError, match=r"10\.0\.0\.1"):
        asyncio.run(outbound.post(f"http://hook.example:{receiver.server_port}/x", {}, b"{}"))


def test_a_download_is_bounded(receiver) -> None:
    outbound = Outbound(Outward(allow_loopback=True))
    assert len(asyncio.run(outbound.get(receiver.url, 1000))) == 1000
    with pytest.raises(UserError, match="too large"):
        asyncio.run(outbound.get(receiver.url, 999))


def test_what_does_not_answer_is_a_failure() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        with pytest.raises(SystemFailure, match="cannot be reached"):
            asyncio.run(Outbound(Outward(allow_loopback=True, timeout_s=1)).post(url, {}, b""))
