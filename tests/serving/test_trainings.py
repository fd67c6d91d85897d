"""Trainings are asked for with photos that are checked at once, are campaigns of one, and can be followed."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import numpy as np
import pytest
from PIL import Image

from cluster.storage import Storage
from orchestrator.ledger import Ledger
from orchestrator.records import Change
from orchestrator.trainings import CampaignTrainer, campaign_of
from serving.tenancy import stored_name
from training.pipeline import BaseInfo

FIELDS = {"subject": "ada", "class": "dog"}
QUICK = {"predictions": {"sweep_s": 0.05}, "trainings": {"follow_s": 0.01, "at_once": 1}}


def photo(seed: int, kind: str = "PNG", size: int = 40) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def files(*photos: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("images", (name, data, "image/png")) for name, data in photos]


GOOD = files(("front.png", photo(1)), ("side é.jpg", photo(2, "JPEG")), ("back.png", photo(3)))


class Recorded(CampaignTrainer):
    """Campaigns on a real record; instead of a controller, the test puts down what one would."""

    started: list[str]

    def __init__(self, storage: Storage, ledger: str, base: str) -> None:
        super().__init__(storage, ledger, base)
        self.uri, self.started, self.claims = ledger, [], {}
        self.begun = threading.Condition()

    def run(self, identity: str) -> None:
        with self.begun:
            if identity not in self.claims:
                claim = self.claims[identity] = Ledger(self.uri).claim(campaign_of(identity))
                claim.__enter__()
                self.started.append(identity)
            self.begun.notify_all()

    def puts(self, identity: str, **fields: object) -> None:
        with self.begun:
            assert self.begun.wait_for(lambda: identity in self.claims, 60)
        with Ledger(self.uri) as ledger:
            [row] = ledger.runs(campaign_of(identity))
            ledger.record(self.claims[identity], [Change(row.id, fields)])
            if fields.get("state") in ("succeeded", "failed", "cancelled"):
                self.claims[identity].release()


@pytest.fixture
def trainer(subjects: Storage, base: BaseInfo) -> Iterator[Recorded]:
    trainer = Recorded(subjects, f"sqlite:///{subjects.uri}/campaigns.db", base.model)
    yield trainer
    for claim in trainer.claims.values():
        claim.release()


@pytest.fixture
def clients(serve, trainer: Recorded):
    return serve(trainer=trainer, **QUICK)


def waited(get: Callable[[], object], wanted: Callable[[object], bool]) -> object:
    for _ in range(600):
        found = get()
        if wanted(found):
            return found
        threading.Event().wait(0.1)
    raise AssertionError(found)


def test_photos_become_a_campaign_of_one(clients, trainer: Recorded, subjects: Storage) -> None:
    client = clients.of("acme")
    params = {"steps": 30, "rank": 4, "prior_weight": 0, "seed": 3}
    form = {**FIELDS, "params": json.dumps(params), "metadata": '{"order": "17"}'}
    answer = client.post("/v1/trainings", data=form, files=GOOD)
    assert answer.status_code == 202, answer.text
    asked = answer.json()
    assert asked["photos"] == ["front.png", "side é.jpg", "back.png"]
    assert (asked["status"], asked["steps"], asked["params"]) == ("starting", 30, params)
    with Ledger(trainer.uri) as ledger:
        [row] = ledger.runs(campaign_of(asked["id"]))
        spec = ledger.spec(row.id)
    assert (row.name, row.tenant) == (stored_name("acme", "ada"), "acme")
    assert spec["train"]["lora"] | {} == {**spec["train"]["lora"], "rank": 4, "alpha": 4}
    assert (spec["prior"]["weight"], spec["train"]["seed"]) == (0, 3)
    assert [subjects.read(place.removeprefix(f"{subjects.uri}/")) for place in spec["subject"]["images"]] == [
        data for _, (_, data, _) in GOOD
    ]
    trainer.puts(asked["id"], state="training", step=15, rate=2.5)
    assert client.get(f"/v1/trainings/{asked['id']}").json()["status"] == "processing"
    trainer.puts(
        asked["id"], state="succeeded", step=30, version="v1", metrics={"loss_subject": 0.1}, finished_at=1e9
    )
    done = client.get(f"/v1/trainings/{asked['id']}").json()
    assert (done["status"], done["version"], done["metrics"]) == ("succeeded", "v1", {"loss_subject": 0.1})
    waited(lambda: subjects.names("uploads"), lambda left: left == [])
    assert subjects.names("open-trainings") == []


def test_photos_may_be_urls(serve, trainer: Recorded) -> None:
    served = {"/a.png": photo(1), "/b": photo(2, "WEBP"), "/text": b"hello"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in served else 302)
            self.send_header("location", "/a.png")
            self.end_headers()
            self.wfile.write(served.get(self.path, b""))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        at = f"http://127.0.0.1:{server.server_port}"
        client = serve(trainer=trainer, outward={"allow_loopback": True}, **QUICK).of()
        asked = client.post("/v1/trainings", json={**FIELDS, "image_urls": [f"{at}/a.png", f"{at}/b"]})
        assert asked.status_code == 202 and asked.json()["photos"] == [f"{at}/a.png", f"{at}/b"]
        for path in ("/gone", "/text"):
            wrong = client.post(
                "/v1/trainings", json={**FIELDS, "image_urls": [f"{at}/a.png", f"{at}{path}"]}
            )
            assert wrong.status_code == 422 and f"{at}{path}" in wrong.json()["error"]["message"]
    finally:
        server.shutdown()
        server.server_close()
    closed = serve(trainer=trainer, **QUICK).of()
    for url in (f"{at}/a.png", "https://169.254.169.254/latest/meta-data"):
        refused = closed.post("/v1/trainings", json={**FIELDS, "image_urls": [url]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "image_urls.0")


def test_a_bad_photo_is_refused_by_its_name_and_reason(clients, subjects: Storage) -> None:
    client = clients.of()
    for bad, reason in (
        (("broken.png", photo(1)[:200]), "broken.png is damaged"),
        (("notes.txt", b"hello"), "notes.txt is not a JPEG"),
        (("tiny.png", photo(1, size=8)), "tiny.png is too small"),
        (("again.png", photo(7)), "again.png is a duplicate of good.png"),
        (("../../etc/passwd", b""), "passwd is not a JPEG"),
    ):
        answer = client.post("/v1/trainings", data=FIELDS, files=files(("good.png", photo(7)), bad))
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (422, "images") and reason in error["message"], error
        assert "/tmp" not in error["message"]
    assert subjects.names("uploads") == subjects.names("trainings") == []


def test_mistakes_in_a_request_name_the_field(serve, trainer: Recorded) -> None:
    client = serve(trainer=trainer, limits={"photos": 3, "photo_bytes": 20_000, "training_steps": 100}).of()
    for data, param in (
        ({"subject": "Ada", "class": "dog"}, "subject"),
        ({"subject": "base", "class": "dog"}, "subject"),
        ({"subject": "ada--0123456789", "class": "dog"}, "subject"),
        ({"subject": "ada"}, "class"),
        ({**FIELDS, "params": "{"}, "params"),
        ({**FIELDS, "params": '{"steps": 101}'}, "params.steps"),
        ({**FIELDS, "params": '{"base": "/etc"}'}, "params.base"),
        ({**FIELDS, "track": "http://mlflow.internal"}, "track"),
    ):
        answer = client.post("/v1/trainings", data=data, files=GOOD)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text
    many = files(*((f"{i}.png", photo(i)) for i in range(4)))
    large = files(("large.png", photo(1, size=100)))
    for wrong in (many, large, None):
        assert client.post("/v1/trainings", data=FIELDS, files=wrong).status_code == 422
    assert client.post("/v1/trainings", content=b"{").status_code == 422
    assert client.post("/v1/trainings", json=[1]).status_code == 422
    meaningless = {**FIELDS, "params": '{"method": "full", "rank": 4}'}
    answer = client.post("/v1/trainings", data=meaningless, files=GOOD)
    assert answer.status_code == 422 and "takes no effect" in answer.json()["error"]["message"]


def test_the_same_key_is_the_same_training(clients) -> None:
    client, key = clients.of(), {"idempotency-key": "k"}
    first, again = (
        client.post("/v1/trainings", data=FIELDS, files=GOOD, headers=key).json() for _ in range(2)
    )
    assert first["id"] == again["id"]
    other = client.post("/v1/trainings", data=FIELDS, files=GOOD[:2], headers=key)
    assert other.status_code == 409
    assert len(client.get("/v1/trainings").json()["data"]) == 1


def test_so_many_run_at_a_time_and_a_tenant_has_only_so_many(serve, trainer: Recorded) -> None:
    settings = {**QUICK, "trainings": {"per_tenant": 2, "at_once": 1, "follow_s": 0.01}}
    client = serve(trainer=trainer, **settings).of()
    first, second = (
        client.post("/v1/trainings", data={**FIELDS, "subject": name}, files=GOOD).json()["id"]
        for name in "ab"
    )
    third = client.post("/v1/trainings", data={**FIELDS, "subject": "c"}, files=GOOD)
    assert (third.status_code, third.json()["error"]["code"]) == (429, "too_many_trainings")
    trainer.puts(first, state="failed", reason={"what": "no room", "seen": "x", "do": "y"})
    trainer.puts(second, state="training")
    assert trainer.started == [first, second]
    failed = client.get(f"/v1/trainings/{first}").json()
    assert failed["error"]["message"] == "no room. x. y"


def test_a_training_is_followed_to_its_end_and_cancelled(clients, trainer: Recorded) -> None:
    client = clients.of()
    asked = client.post("/v1/trainings", data=FIELDS, files=GOOD).json()["id"]
    trainer.puts(asked, state="training", step=1)
    assert client.post(f"/v1/trainings/{asked}/cancel").status_code == 200
    with Ledger(trainer.uri) as ledger:
        assert [wish.wish for wish in ledger.wishes(trainer.claims[asked])] == ["cancel"]
    kinds = []
    with client.stream("GET", f"/v1/trainings/{asked}/events") as stream:
        for line in stream.iter_lines():
            kinds += [line.removeprefix("event: ")] if line.startswith("event: ") else []
            if "training" in line and "state" in line and "cancelled" not in kinds:
                trainer.puts(asked, state="cancelled", finished_at=1e9)
                kinds.append("cancelled")
    assert kinds[-1] == "completed" and "progress" in kinds
    whole = client.get(f"/v1/trainings/{asked}/events").text
    rest = client.get(f"/v1/trainings/{asked}/events", headers={"last-event-id": "0"}).text
    assert whole.count("event: state") == rest.count("event: state") + 1


def test_another_tenants_training_is_404(clients) -> None:
    asked = clients.of().post("/v1/trainings", data=FIELDS, files=GOOD).json()["id"]
    foreign = clients.of("acme")
    assert foreign.get("/v1/trainings").json()["data"] == []
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
        assert foreign.request(method, f"/v1/trainings/{asked}{path}").status_code == 404
    assert clients.of(scopes=["images"]).get("/v1/trainings").status_code == 403


def test_without_a_trainer_there_are_no_trainings(serve) -> None:
    client: httpx2.Client = serve().of()
    assert client.get("/v1/trainings").status_code == 404
