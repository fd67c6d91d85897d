"""A subject that is deleted is gone with all that is of it alone, and the receipt says what went."""

import json
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage
from orchestrator.erasure import Erasure
from orchestrator.ledger import Ledger
from orchestrator.manifest import load_campaign
from orchestrator.submission import enroll
from serving.tenancy import stored_name

FAST = {"steps": 1, "guidance_scale": 1}


@pytest.fixture
def ledger(subjects: Storage) -> str:
    return f"sqlite:///{subjects.uri}/campaigns.db"


@pytest.fixture
def clients(serve, subjects: Storage, ledger: str):
    return serve(eraser=Erasure(subjects, ledger))


def fill(storage: Storage, name: str, photos: str) -> None:
    """What training leaves of a subject."""
    storage.write(f"subjects/{name}/{photos}/photos.parquet", b"photos")
    storage.write_json(f"latents/of-{photos}/manifest.json", {"images": photos})
    storage.write(f"runs/{name}/v1/events.jsonl", b"{}")
    storage.write(f"campaigns/night/images/{name}-v1/a.png", b"image")
    storage.write(f"campaigns/night/images/manifests/{name}-v1/a.json", b"{}")
    storage.write("campaigns/night/report/index.html", b"shows it")
    spec = {"subjects": [{"subject": {"name": name}}]}
    storage.write_json(f"studies/of-{photos}/study.json", {"spec": spec})
    storage.write(f"studies/of-{photos}/report/index.html", b"shows it")
    storage.write(f"evaluations/images/{name}-v1/a.png", b"image")
    storage.write(f"evaluations/images/manifests/{name}-v1/a.json", b"{}")
    storage.write(f"evaluations/subjects/{name}/v1/index.html", b"shows it")


def test_nothing_is_left_of_a_deleted_subject_and_the_others_stay(clients, subjects: Storage) -> None:
    for name, photos in (("rex", "p1"), ("rex-2", "p2"), (stored_name("acme", "tom"), "p3")):
        fill(subjects, name, photos)
    fill(subjects, "eve", "shared")
    subjects.write("subjects/rex/shared/photos.parquet", b"photos")
    client = clients.of()
    body = {"prompt": "a photo of {subject}", **FAST}
    client.post("/v1/images/generations", json={**body, "model": "rex", "response_format": "url"})
    made = client.post(
        "/v1/predictions", json={"model": "rex", "input": body}, headers={"prefer": "wait=60"}
    ).json()
    image = made["output"][0]
    assert client.get(image).status_code == 200

    receipt = client.delete("/v1/models/rex")
    assert receipt.status_code == 200, receipt.text
    about = receipt.json()
    assert about["subject"] == "rex" and about["removed"][0] == "registry/rex.json" and about["files"] >= 10
    assert "studies/of-p1/report" in about["removed"] and "studies/of-p2/report" not in about["removed"]
    assert "latents/of-p1" in about["removed"] and f"predictions/default/{made['id']}" in about["removed"]
    assert subjects.read_json(f"receipts/{about['id']}.json")["subject"] == "rex"

    left = [str(p.relative_to(subjects.uri)) for p in Path(subjects.uri).rglob("*") if p.is_file()]
    named = [p for p in left if "rex" in p and "rex-2" not in p and not p.startswith("locks/")]
    assert named == []
    assert {"latents/of-shared/manifest.json", "latents/of-p2/manifest.json"} <= set(left)
    assert "subjects/rex-2/p2/photos.parquet" in left and "campaigns/night/images/rex-2-v1/a.png" in left
    assert client.get(image).status_code == 404
    assert client.post("/v1/images/generations", json={**body, "model": "rex"}).status_code == 404
    assert client.get(f"/v1/predictions/{made['id']}").status_code == 404
    assert client.delete("/v1/models/rex").status_code == 404
    assert clients.of("acme").get("/v1/models/tom").status_code == 200


def test_only_its_tenant_deletes_a_subject_and_only_with_the_scope(clients, subjects: Storage) -> None:
    assert clients.of(scopes=["images", "trainings"]).delete("/v1/models/rex").status_code == 403
    acme, operator = clients.of("acme"), clients.of()
    for client, model in (
        (acme, "rex"),
        (operator, "tom"),
        (operator, stored_name("acme", "tom")),
        (operator, "base"),
    ):
        answer = client.delete(f"/v1/models/{model}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert len(Registry(subjects).names()) == 2
    receipt = acme.delete("/v1/models/tom").json()
    assert receipt["subject"] == "tom" and len(Registry(subjects).names()) == 1


def test_a_subject_that_is_being_trained_is_not_deleted(
    clients, subjects: Storage, ledger: str, tmp_path: Path
) -> None:
    manifest = tmp_path / "night.yaml"
    manifest.write_text(
        "subjects: [{name: rex, class: dog, images: ./rex}, {name: eve, class: dog, images: ./eve}]"
    )
    client = clients.of()
    with Ledger(ledger) as record:
        enroll(load_campaign(str(manifest)), record, subjects)
        with record.claim("night"):
            answer = client.delete("/v1/models/rex")
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "is_trained")
            assert "raybooth campaign cancel night rex" in answer.json()["error"]["message"]
        with subjects.lock("locks/train-rex"):
            assert client.delete("/v1/models/rex").status_code == 409
        assert client.delete("/v1/models/rex").status_code == 200
        assert {row.name: row.state for row in record.runs("night")} == {"rex": "cancelled", "eve": "queued"}


def test_the_command_says_what_went(subjects: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.main import get_command

    from orchestrator.cli import app

    fill(subjects, "rex", "p1")
    get_command(app).main(
        ["subjects", "delete", "rex", "--yes", "--json", "--storage", subjects.uri], standalone_mode=False
    )
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["subject"] == "rex" and "artifacts/rex" in said["removed"]


def test_a_name_that_is_none_is_refused(subjects: Storage, ledger: str) -> None:
    for name in ("../keys", "", "rax"):
        with pytest.raises(UserError):
            Erasure(subjects, ledger).erase(name)
