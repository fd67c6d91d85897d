"""Predictions are on record before they are acknowledged, and are drawn by whichever process is there."""

import subprocess
import sys
import threading

import httpx2
import pytest

from cluster.storage import Storage
from training.png import decode_png

INPUT = {"prompt": "a photo of {subject}", "n": 2, "steps": 3, "guidance_scale": 1}
BODY = {"model": "rex", "input": INPUT}
QUICK = {"predictions": {"sweep_s": 0.05, "heartbeat_s": 0.05}}
WAIT = {"prefer": "wait=60"}
WAIT_S = 60.0


def ended(client: httpx2.Client, identity: str) -> dict:
    """A prediction once it has ended, however often it has to be asked for."""
    beat = threading.Event()
    for _ in range(600):
        found = client.get(f"/v1/predictions/{identity}").json()
        if found["completed_at"]:
            return found
        beat.wait(0.1)
    raise AssertionError(found)


def test_a_prediction_is_drawn_while_nobody_waits(clients, artist) -> None:
    client = clients.of()
    artist.hold(1)
    answer = client.post("/v1/predictions", json={**BODY, "metadata": {"order": "17"}})
    asked = answer.json()
    assert answer.status_code == 202 and asked["status"] in ("starting", "processing")
    assert asked["version"] == "v1" and asked["output"] is None and asked["metadata"] == {"order": "17"}
    assert artist.is_held.wait(WAIT_S)
    artist.release()
    done = ended(client, asked["id"])
    assert (done["status"], done["error"]) == ("succeeded", None) and done["metrics"]["total_time"] >= 0
    images = [clients.with_token(None).get(url) for url in done["output"]]
    assert [decode_png(image.content).shape for image in images] == [(16, 16, 3)] * 2
    alone = client.post(
        "/v1/images/generations", json={"model": "rex", "response_format": "url", **done["input"]}
    )
    assert client.get(alone.json()["data"][1]["url"]).content == images[1].content


def test_a_client_may_prefer_to_wait(clients, artist) -> None:
    client = clients.of()
    done = client.post("/v1/predictions", json=BODY, headers=WAIT)
    assert (done.status_code, done.json()["status"]) == (200, "succeeded")
    assert done.headers["preference-applied"] == "wait=60"
    artist.hold(1)
    early = client.post("/v1/predictions", json=BODY, headers={"prefer": "respond-async, wait=0"})
    assert early.status_code == 202


def test_the_same_key_is_the_same_prediction(clients, artist) -> None:
    client, key = clients.of(), {"idempotency-key": "order 17"}
    first = client.post("/v1/predictions", json=BODY, headers={**key, **WAIT})
    again = client.post("/v1/predictions", json=BODY, headers=key)
    assert again.json()["id"] == first.json()["id"] and len(artist.orders) == 2
    other = client.post("/v1/predictions", json={**BODY, "model": "base"}, headers=key)
    assert other.status_code == 422, "the base knows no subject, and this is found first"
    other = client.post("/v1/predictions", json={**BODY, "model": "rex@v1"}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert (
        clients.of("acme").post("/v1/predictions", json={**BODY, "model": "tom"}, headers=key).status_code
        == 202
    )


def test_a_cancelled_prediction_gives_its_rows_up_and_keeps_nothing(
    clients, artist, subjects: Storage
) -> None:
    client = clients.of()
    artist.hold(2)
    identity = client.post("/v1/predictions", json=BODY).json()["id"]
    assert artist.is_held.wait(WAIT_S)
    canceled = client.post(f"/v1/predictions/{identity}/cancel").json()
    assert (canceled["status"], canceled["output"]) == ("canceled", None)
    assert set(artist.outcome().values()) == {"given up"}
    assert client.post(f"/v1/predictions/{identity}/cancel").json()["status"] == "canceled"
    assert [n for n in subjects.names(f"predictions/default/{identity}") if n.endswith(".png")] == []


def test_what_cannot_be_drawn_fails_with_the_reason(clients) -> None:
    body = {"model": "base", "input": {"prompt": "dog " * 40, "steps": 1}}
    failed = clients.of().post("/v1/predictions", json=body, headers=WAIT).json()
    assert failed["status"] == "failed" and "tokens" in failed["error"]["message"]


def test_a_full_queue_is_waited_out(clients, artist) -> None:
    client = clients.of()
    artist.room, artist.retry_after_s = 0, 0.01
    identity = client.post("/v1/predictions", json=BODY).json()["id"]
    assert artist.refused.wait(WAIT_S)
    artist.room = 100
    assert ended(client, identity)["status"] == "succeeded"


def test_mistakes_name_the_field_within(clients) -> None:
    client = clients.of()
    for body, param in (
        ({**BODY, "input": {**INPUT, "n": 11}}, "input.n"),
        ({**BODY, "input": {**INPUT, "steps": 101}}, "input.steps"),
        ({**BODY, "input": {**INPUT, "prompt": "{x}"}}, "input.prompt"),
        ({**BODY, "webhook": "http://example.com/"}, "webhook"),
        ({**BODY, "webhook": "https://127.0.0.1/"}, "webhook"),
        ({"model": "rex"}, "input"),
    ):
        answer = client.post("/v1/predictions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    assert client.post("/v1/predictions", json={**BODY, "model": "rax"}).status_code == 404
    assert client.get("/v1/predictions").json()["data"] == []


def test_a_tenant_has_only_so_many_at_a_time(serve, artist) -> None:
    clients = serve(predictions={"waiting": 1})
    artist.hold(1)
    client = clients.of()
    identity = client.post("/v1/predictions", json=BODY).json()["id"]
    refused = client.post("/v1/predictions", json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_predictions")
    assert clients.of("acme").post("/v1/predictions", json={**BODY, "model": "tom"}).status_code == 202
    artist.release()
    assert ended(client, identity)["status"] == "succeeded"


def test_pages_go_back_in_time(clients, clock) -> None:
    client = clients.of()
    made = []
    for _ in range(5):
        clock.now += 1
        made.insert(0, client.post("/v1/predictions", json=BODY, headers=WAIT).json()["id"])
    first = client.get("/v1/predictions?limit=3").json()
    rest = client.get(f"/v1/predictions?limit=3&cursor={first['next']}").json()
    assert [each["id"] for each in first["data"] + rest["data"]] == made and rest["next"] is None


def test_predictions_expire_with_their_images(serve, clock, subjects: Storage) -> None:
    clients = serve(predictions={"sweep_s": 0.05, "deadline_s": 60}, retention={"outputs_s": 60})
    client = clients.of()
    done = client.post("/v1/predictions", json=BODY, headers=WAIT).json()
    assert client.get(done["output"][0]).status_code == 200
    clock.now += 121
    assert client.get(done["output"][0]).status_code == 404
    assert client.get(f"/v1/predictions/{done['id']}").status_code == 404
    pause = threading.Event()
    while subjects.names("predictions/default"):
        pause.wait(0.05)


def test_a_removed_prediction_leaves_nothing(clients, artist, subjects: Storage) -> None:
    client = clients.of()
    done = client.post("/v1/predictions", json=BODY, headers=WAIT).json()
    artist.hold(1)
    running = client.post("/v1/predictions", json=BODY).json()
    assert artist.is_held.wait(WAIT_S)
    for each in (done, running):
        assert client.delete(f"/v1/predictions/{each['id']}").json() == {"deleted": 1, "left": []}
        assert client.get(f"/v1/predictions/{each['id']}").status_code == 404
    assert subjects.names("predictions/default") == []
    artist.release()
    client.post("/v1/predictions", json=BODY, headers=WAIT)
    assert clients.of(scopes=["images"]).delete("/v1/predictions").status_code == 403
    assert client.delete("/v1/predictions").json()["deleted"] == 1
    assert client.get("/v1/predictions").json()["data"] == []


def test_a_model_that_is_deleted_meanwhile_leaves_no_images(clients, artist, subjects: Storage) -> None:
    client = clients.of()
    artist.hold(3)
    identity = client.post("/v1/predictions", json=BODY).json()["id"]
    assert artist.is_held.wait(WAIT_S)
    subjects.remove("registry/rex.json")
    artist.release()
    failed = ended(client, identity)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "model_not_found")
    assert [n for n in subjects.names(f"predictions/default/{identity}") if n.endswith(".png")] == []


# -- processes that come and go ----------------------------------------------------------------------------


def test_what_a_process_leaves_undone_the_next_one_does(serve, artist) -> None:
    first = serve(**QUICK)
    _, token = first.keys.create("x")
    artist.hold(2)
    body = {**BODY, "input": {**INPUT, "seed": 3}}
    identity = first.with_token(token).post("/v1/predictions", json=body).json()["id"]
    assert artist.is_held.wait(WAIT_S)
    first.stop()
    assert "given up" in artist.outcome().values()
    artist.release()
    client = serve(**QUICK).with_token(token)
    done = ended(client, identity)
    assert done["status"] == "succeeded" and done["input"]["seed"] == 3
    assert done["input"]["sampler"] == "ddim"  # the base's own


ORPHANS = """
import os, sys, time
from cluster.storage import Storage
from serving.predictions import Prediction, PredictionStore, new_id
from serving.presence import Presence

storage, now = Storage(sys.argv[1]), float(sys.argv[2])
presence = Presence(storage, 3600)
presence.beat()
store = PredictionStore(storage, presence, lambda: now, 3600)
settled = {"prompt": "{subject}", "n": 2, "steps": 2, "guidance_scale": 1.0, "seed": 1}
for _ in range(2):
    made = store.create(Prediction(
        id=new_id(now), tenant="default", model="rex", subject="rex", version="v1", input=settled,
        address="http://127.0.0.1", created=now, expires=now + 3600,
    ))
    print(made.id, flush=True)
os._exit(9)
"""


def test_what_a_killed_process_had_accepted_is_drawn_by_another(
    serve, clock, subjects: Storage, artist
) -> None:
    said = subprocess.run(
        [sys.executable, "-c", ORPHANS, subjects.uri, str(clock.now)], capture_output=True, text=True
    )
    assert said.returncode == 9, said.stderr
    first, second = said.stdout.split()
    subjects.write(f"predictions/default/{second}/cancel", b"")
    clients = serve(**QUICK)
    client = clients.of()
    assert ended(client, first)["status"] == "succeeded"
    assert ended(client, second)["status"] == "canceled", "cancelled while nobody had it"
    assert len(artist.orders) == 2
    assert "raybooth_predictions_taken_over_total 2.0" in client.get("/metrics").text
    while any(subjects.names(f"pending/{name}") for name in subjects.names("pending")):
        threading.Event().wait(0.05)


def test_one_process_cancels_what_another_draws(serve, artist) -> None:
    here, there = serve(**QUICK), serve(**QUICK)
    _, token = here.keys.create("x")
    artist.hold(1)
    identity = here.with_token(token).post("/v1/predictions", json=BODY).json()["id"]
    assert artist.is_held.wait(WAIT_S)
    other = there.with_token(token)
    assert other.delete(f"/v1/predictions/{identity}").status_code == 409
    other.post(f"/v1/predictions/{identity}/cancel")
    assert ended(other, identity)["status"] == "canceled"


@pytest.mark.parametrize("path", ["", "/cancel"])
def test_another_tenants_prediction_is_404(clients, path: str) -> None:
    identity = clients.of().post("/v1/predictions", json=BODY, headers=WAIT).json()["id"]
    foreign = clients.of("acme")
    for method in ("GET", "DELETE") if not path else ("POST",):
        assert foreign.request(method, f"/v1/predictions/{identity}{path}").status_code == 404
    assert foreign.get("/v1/predictions").json()["data"] == []
