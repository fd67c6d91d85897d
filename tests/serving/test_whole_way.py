"""Photos go in over HTTP, images come out over HTTP, and a deletion leaves nothing of either: all of it for real."""

import json
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from orchestrator.erasure import Erasure
from orchestrator.trainings import CampaignTrainer
from serving.tenancy import stored_name
from training.png import encode_png

pytestmark = pytest.mark.slow
PATIENCE_S = 540.0  # a Ray of its own is started, on a busy machine


def test_a_subject_is_trained_drawn_and_deleted_over_http(serve, subjects, base, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{subjects.uri}/mlflow.db")
    ledger = f"sqlite:///{subjects.uri}/campaigns.db"
    trainer = CampaignTrainer(subjects, ledger, base.model, defaults={"checkpoint": {"every": 2}})
    settings = {"rates": {"burst": 10_000}, "predictions": {"sweep_s": 0.2}, "trainings": {"follow_s": 0.2}}
    clients = serve(trainer=trainer, eraser=Erasure(subjects, ledger), **settings)
    client = clients.of("acme")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), dtype=np.uint8)
    photos = [
        ("images", (f"{i}.png", encode_png(photo, None), "image/png")) for i, photo in enumerate(pixels)
    ]
    form = {"subject": "ada", "class": "dog", "params": json.dumps({"steps": 4, "prior_weight": 0})}
    asked = client.post("/v1/trainings", data=form, files=photos).json()
    until, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not (done := client.get(f"/v1/trainings/{asked['id']}").json())["completed_at"]:
        assert time.monotonic() < until, done
        pause.wait(0.5)
    assert (done["status"], done["version"], done["step"]) == ("succeeded", "v1", 4), done
    assert client.get(f"/v1/trainings/{asked['id']}/events").text.count("event: completed") == 1

    body = {"model": "ada", "prompt": "a photo of {subject}", "steps": 1, "guidance_scale": 1}
    assert client.post("/v1/images/generations", json=body).status_code == 200
    while (gone := client.delete("/v1/models/ada")).status_code == 409:  # its controller is about to leave
        assert time.monotonic() < until
        pause.wait(0.5)
    receipt = gone.json()
    assert any("MLflow's run" in line for line in receipt["removed"]), receipt
    assert "MLflow's model ada--" in " ".join(receipt["removed"])
    name = stored_name("acme", "ada")
    left = [str(p.relative_to(subjects.uri)) for p in Path(subjects.uri).rglob("*") if p.is_file()]
    assert [p for p in left if name in p and not p.startswith("locks/")] == []
    assert not any(p.startswith(("subjects/", "latents/", "runs/", "uploads/")) for p in left), left
    assert client.post("/v1/images/generations", json=body).status_code == 404
    with sqlite3.connect(f"{subjects.uri}/campaigns.db") as record:
        assert record.execute("select count(*) from runs").fetchone() == (0,)
    record.close()
