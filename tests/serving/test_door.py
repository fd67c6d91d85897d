"""Nobody gets in without a key, nor beyond its rate, scopes and tenant; the log says who came, and no secret."""

import asyncio
import json
import logging
from collections.abc import Awaitable

import httpx2
import pytest
from pydantic import ValidationError

from serving.door import Door
from serving.keys import Keys
from serving.settings import ServingSettings, is_loopback

BODY = {"model": "base", "prompt": "a dog", "steps": 1, "guidance_scale": 1}


def test_without_a_valid_key_every_path_below_v1_is_401(clients) -> None:
    for token in (None, "wrong", f"rb_{'0' * 12}_{'a' * 43}"):
        client = clients.with_token(token)
        for method, path in (
            ("POST", "/v1/images/generations"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/rex"),
            ("GET", "/v1/nowhere"),
            ("DELETE", "/v1/models"),
        ):
            answer = client.request(method, path, content=b"{")
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
            assert answer.json()["error"]["type"] == "authentication_error"
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_a_key_does_what_its_scopes_allow(clients) -> None:
    answer = clients.of(scopes=["trainings"]).post("/v1/images/generations", json=BODY)
    assert answer.status_code == 403 and "trainings, not images" in answer.json()["error"]["message"]
    assert clients.of(scopes=["images"]).post("/v1/images/generations", json=BODY).status_code == 200


def test_a_revoked_key_is_out(clients) -> None:
    key, token = clients.keys.create("x")
    client = clients.with_token(token)
    assert client.get("/v1/models").status_code == 200
    clients.keys.revoke(key.id)
    assert client.get("/v1/models").status_code == 401


def test_a_key_that_asks_too_often_waits(serve, clock) -> None:
    clients = serve(rates={"per_minute": 60, "burst": 2})
    client, other = clients.of(), clients.of()
    answers = [client.get("/v1/models") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["1", "0", "0"]
    assert answers[2].headers["retry-after"] == "1"
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert other.get("/v1/models").status_code == 200
    clock.now += 1
    assert client.get("/v1/models").status_code == 200
    own = clients.of(per_minute=6)
    assert own.get("/v1/models").headers["x-ratelimit-limit"] == "6"


def test_a_key_has_so_many_requests_at_a_time(serve, artist) -> None:
    clients = serve(rates={"at_once": 1})
    client = clients.of()
    artist.hold(1)
    with client.stream("POST", "/v1/images/generations", json={**BODY, "stream": True}) as held:
        assert held.status_code == 200
        refused = clients.with_token(client.headers["authorization"].removeprefix("Bearer ")).get(
            "/v1/models"
        )
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_at_once")
        artist.release()
        held.read()
    assert client.get("/v1/models").status_code == 200


def test_who_has_its_answer_may_ask_again_though_the_application_has_not_returned(storage, clock) -> None:
    keys = Keys(storage, clock)
    _, token = keys.create("x")
    seen: list[str | int] = []

    async def application(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"first", b"last"):
            await send({"type": "http.response.body", "body": part, "more_body": part != b"last"})

    door = Door(application, ServingSettings(rates={"at_once": 1}), keys, clock)

    def ask(answered) -> Awaitable[None]:
        header = (b"authorization", f"Bearer {token}".encode())
        return door({"type": "http", "path": "/v1/models", "headers": [header]}, None, answered)

    async def again(message) -> None:
        if message["type"] == "http.response.start":
            seen.append(message["status"])

    async def first(message) -> None:
        if message["type"] == "http.response.body":
            seen.append(message["body"].decode())
            await ask(again)

    asyncio.run(ask(first))
    assert seen == ["first", 429, "last", 200]


def test_without_keys_only_this_machine_is_served_and_by_its_own_name(serve) -> None:
    client = serve(auth="off").with_token(None)
    assert client.post("/v1/images/generations", json=BODY).status_code == 200
    rebound = client.get("/v1/models", headers={"host": "evil.example"})
    assert rebound.status_code == 403 and "loopback" in rebound.json()["error"]["message"]
    with pytest.raises(ValidationError, match="only the loopback is served"):
        ServingSettings(auth="off", host="0.0.0.0")


def test_a_loopback_is_known_by_its_address() -> None:
    hosts = ("localhost", "localhost:8000", "127.0.0.1", "127.8.8.8:1", "::1", "[::1]", "[::1]:8000")
    assert all(map(is_loopback, hosts))
    assert not any(
        map(is_loopback, ("", "0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "127.0.0.1.nip.io"))
    )


def test_a_body_that_is_too_large_is_413_before_it_is_read(serve) -> None:
    client = serve(limits={"body_bytes": 1000}).of()
    declared = client.post("/v1/images/generations", json={**BODY, "prompt": "a" * 2000})
    chunked = client.post(
        "/v1/images/generations",
        content=iter([b"{", b'"prompt":"', b"a" * 2000]),
        headers={"content-type": "application/json"},
    )
    assert [declared.status_code, chunked.status_code] == [413, 413]
    assert chunked.json()["error"]["code"] == "too_large"


def test_tenants_do_not_see_each_others_subjects(clients, artist) -> None:
    acme, operator = clients.of("acme"), clients.of()
    names = [
        [model["id"] for model in client.get("/v1/models").json()["data"]] for client in (acme, operator)
    ]
    assert names == [["base", "tom"], ["base", "rex"]]
    stored = next(name for name in clients.keys._storage.names("registry") if name.startswith("tom"))
    for client, foreign in ((acme, "rex"), (operator, "tom"), (operator, stored.removesuffix(".json"))):
        assert client.get(f"/v1/models/{foreign}").status_code == 404
        answer = client.post("/v1/images/generations", json={**BODY, "model": foreign})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert artist.orders == []
    assert acme.post("/v1/images/generations", json={**BODY, "model": "tom"}).status_code == 200


def test_every_answer_has_an_id_and_a_line_in_the_log_without_the_secret(clients, caplog) -> None:
    key, token = clients.keys.create("x", "acme")
    client = clients.with_token(token)
    with caplog.at_level(logging.INFO, "raybooth.access"):
        given = client.get("/v1/models", headers={"x-request-id": "mine-1"})
        made = client.get("/v1/nowhere?secret=1", headers={"x-request-id": "no id"})
        clients.with_token(f"{token[:-4]}AAAA").get("/v1/models")
    assert given.headers["x-request-id"] == "mine-1" and len(made.headers["x-request-id"]) == 32
    lines = [json.loads(record.message) for record in caplog.records if record.name == "raybooth.access"]
    assert [(line["status"], line["tenant"], line["key"]) for line in lines] == [
        (200, "acme", key.prefix),
        (404, "acme", key.prefix),
        (401, None, None),
    ]
    assert lines[0]["request_id"] == "mine-1" and lines[0]["route"] == "/v1/models"
    assert token.split("_", 2)[2][:8] not in caplog.text and "secret=1" not in caplog.text


def test_what_the_framework_refuses_has_the_same_shape(clients) -> None:
    client = clients.of()
    wrong = client.put("/v1/models")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")
    for answer in (wrong, client.get("/v1/nowhere"), client.post("/v1/images/generations", content=b"{")):
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_metrics_count_routes_and_name_no_subject(clients) -> None:
    client = clients.of()
    client.post("/v1/images/generations", json={**BODY, "model": "rex"})
    client.get("/v1/models/rex")
    text = client.get("/metrics").text
    assert 'raybooth_requests_total{method="GET",route="/v1/models/{model}",status="200"} 1.0' in text
    assert 'raybooth_images_total{outcome="drawn"} 1.0' in text
    assert 'raybooth_generate_seconds_count{model="subject"} 1.0' in text
    assert "raybooth_replica_rows_running 0.0" in text and "rex" not in text


def test_a_crash_is_a_500_that_tells_nothing(clients, artist, caplog) -> None:
    async def stats() -> dict[str, float]:
        raise RuntimeError("password=hunter2")

    artist.stats = stats
    answer = clients.of().get("/readyz")
    assert answer.status_code == 500 and "hunter2" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error" and answer.headers["x-request-id"]
    assert "hunter2" in caplog.text


def test_clients_share_a_connection(clients) -> None:
    client: httpx2.Client = clients.of()
    assert [client.get("/healthz").json() for _ in range(2)] == [{"status": "ok"}] * 2
