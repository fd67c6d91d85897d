"""What leaves for MLflow: a real one, in SQLite; and for W&B: into a folder of its own, without a server."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from mlflow import MlflowClient

from cluster.storage import Storage
from orchestrator.campaign_mirror import CampaignMirror
from orchestrator.mlflow_tracker import MlflowTracker
from orchestrator.tracking import Mirrors, mirror
from orchestrator.wandb_tracker import WandbTracker
from training.png import decode_png, encode_png

PATIENCE_S = 300  # on a machine that is busy elsewhere


def said(first: int, last: int) -> list[dict[str, Any]]:
    """Steps `first` to `last` with a validation and a look after every second, as `events.jsonl` has them."""
    entries: list[dict[str, Any]] = [{"event": "started", "from_step": first - 1}]
    for step in range(first, last + 1):
        losses = {"loss_subject": step / 10, "loss_class": step / 20}
        entries.append({"event": "step", "time": "t", "step": step, "lr": 1e-4, "lr_text": None, **losses})
        if step % 2 == 0:
            entries.append({"event": "validation", "time": "t", "step": step, "loss": step / 5, **losses})
            entries.append({"event": "score", "time": "t", "step": step, "score": step / 4, "dino": 0.5})
    return entries


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow in SQLite; its first use makes the tables, which takes long."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.mark.slow
def test_a_run_that_goes_on_has_every_step_once_and_what_the_machine_did(
    storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")

    def opened(run_id: str | None) -> tuple[MlflowTracker, Mirrors]:
        tracker = MlflowTracker(uri, "raybooth", storage, "rex-v1", {"train.steps": 5}, {}, run_id)
        return tracker, Mirrors([tracker], pytest.fail)

    storage.write("runs/rex/v1/samples/step_000002.png", encode_png(np.zeros((4, 4, 3), np.uint8)))
    tracker, mirrors = opened(None)
    sample = {"event": "sample", "step": 2, "path": "runs/rex/v1/samples/step_000002.png"}
    mirror([*said(1, 3), sample], mirrors, storage)
    client, until = MlflowClient(tracking_uri=uri), time.monotonic() + PATIENCE_S
    while "system/cpu_utilization_percentage" not in client.get_run(tracker.run_id).data.metrics:
        assert time.monotonic() < until
        time.sleep(0.1)
    mirrors.finish("interrupted")

    later, mirrors = opened(tracker.run_id)
    assert later.run_id == tracker.run_id
    mirror(
        [*said(1, 4), sample], mirrors, storage
    )  # what is there already, and step 4, which was not mirrored
    mirror(said(5, 5), mirrors, storage)
    began = time.monotonic()
    mirrors.finish("succeeded")
    assert time.monotonic() - began < 60.0  # MLflow itself would wait for a sample of the machine

    history = {
        key: [m.step for m in client.get_metric_history(tracker.run_id, key)]
        for key in (
            *("loss_subject", "loss_class", "lr"),
            "validation_loss",
            "validation_loss_class",
            "drawn_score",
        )
    }
    assert history == {
        "loss_subject": [1, 2, 3, 4, 5],
        "loss_class": [1, 2, 3, 4, 5],
        "lr": [1, 2, 3, 4, 5],
        "validation_loss": [2, 4],
        "validation_loss_class": [2, 4],
        "drawn_score": [2, 4],
    }
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and "system/cpu_utilization_percentage" in run.data.metrics
    assert [file.path for file in client.list_artifacts(tracker.run_id, "samples")] == [
        "samples/samples_000002.png"
    ]


@pytest.mark.slow
def test_a_campaign_is_a_run_with_one_below_it_for_every_subject(storage: Storage, uri: str) -> None:
    manifest = {"defaults": {"train": {"steps": 2}}, "prompts": ["a photo of {subject}"], "subjects": ["no"]}

    def opened(run_id: str | None) -> CampaignMirror:
        began = time.time() - 100
        return CampaignMirror(uri, "albums", storage, "album", manifest, began, run_id, pytest.fail)

    first = opened(None)
    rex = first.of_run("rex-v1", {"train.steps": 2}, {"raybooth.subject": "rex"}, None)
    assert rex is not None
    Mirrors([rex], pytest.fail).metrics([{"step": 1, "loss_subject": 0.5}])
    first.counts({"training": 1, "queued": 1}, 1.5, at_once=True)
    first.counts({"training": 2}, 2.0)  # too soon after the one before
    first.finish("interrupted")

    again = opened(first.run_id)
    later = again.of_run("rex-v1", {}, {}, rex.run_id)
    tom = again.of_run("tom-v1", {}, {}, None)
    assert (
        again.run_id == first.run_id and later is not None and later.run_id == rex.run_id and tom is not None
    )
    mirror(said(1, 2), Mirrors([later], pytest.fail), storage)
    later.finish("succeeded")
    tom.finish("failed", "03.jpg is damaged: broken")
    again.counts({"succeeded": 1, "failed": 1}, 3.0)
    storage.write("campaigns/album/report/index.html", b"<!doctype html>")
    again.report("campaigns/album/report")
    again.finish("failed", "1 of 2 subjects did not succeed")

    client = MlflowClient(tracking_uri=uri)
    parent = client.get_run(again.run_id)
    found = client.get_experiment_by_name("albums")
    assert found is not None
    below = client.search_runs([found.experiment_id], f"tags.`mlflow.parentRunId` = '{again.run_id}'")
    assert {run.info.run_name: run.info.status for run in below} == {"rex-v1": "FINISHED", "tom-v1": "FAILED"}
    assert {run.data.tags["raybooth.campaign"] for run in below} == {"album"}
    assert client.get_run(tom.run_id).data.tags["mlflow.note.content"] == "03.jpg is damaged: broken"
    assert [m.step for m in client.get_metric_history(rex.run_id, "loss_subject")] == [1, 2]
    assert parent.info.status == "FAILED" and parent.data.params["defaults.train.steps"] == "2"
    assert "subjects" not in parent.data.params
    assert parent.data.metrics["runs/succeeded"] == 1 and parent.data.metrics["worker_seconds"] == 3.0
    assert [m.value for m in client.get_metric_history(again.run_id, "runs/training")] == [1]
    [at] = [m.step for m in client.get_metric_history(again.run_id, "runs/queued")]
    assert 100 <= at < 200  # seconds since the campaign began
    assert [file.path for file in client.list_artifacts(again.run_id, "report")] == ["report/index.html"]


@pytest.mark.slow
def test_an_mlflow_that_fails_is_one_note_and_the_runs_go_on(storage: Storage, uri: str) -> None:
    notes: list[str] = []
    mirror_of = CampaignMirror(uri, "lost", storage, "album", {}, time.time(), None, notes.append)
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("lost")
    assert found is not None
    client.delete_experiment(found.experiment_id)  # by somebody who tidies up
    assert [mirror_of.of_run(f"s{i}-v1", {}, {}, None) for i in range(100)] == [None] * 100
    mirror_of.counts({"failed": 100}, 1.0, at_once=True)
    mirror_of.finish("failed")
    assert f"MLflow at {uri} cannot be used" in notes[0] and len(notes) <= 2


@pytest.fixture
def own_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """W&B that reads its environment anew, and whose process ends with the test."""
    yield monkeypatch
    wandb.teardown()


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """The rows that a W&B run in a folder has: a log of LevelDB's kind, with one protobuf in each record."""
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its process has written everything when it ends, and not before
    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole, rows = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block ends with zeros where no head would fit
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record.FromString(whole)
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            rows += [{key: json.loads(value) for key, value in items.items()}] if items else []
            whole = b""
    return rows


def test_a_run_in_wandbs_folder_has_every_step_once(
    storage: Storage, tmp_path: Path, own_wandb: pytest.MonkeyPatch
) -> None:
    own_wandb.setenv("WANDB_MODE", "offline")
    storage.write("runs/rex/v1/samples/step_000002.png", encode_png(np.zeros((4, 4, 3), np.uint8)))
    sample = {"event": "sample", "step": 2, "path": "runs/rex/v1/samples/step_000002.png"}

    def told(entries: list[dict[str, Any]], state: str) -> None:
        params = {"train.steps": 4, "base.model": "s3://key:secret@bucket/base"}
        tracker = WandbTracker("booth", tmp_path, "rex-v1", params, {}, None, pytest.fail)
        assert tracker.run_id is tracker.url is None
        mirrors = Mirrors([tracker], pytest.fail)
        mirror(entries, mirrors, storage)
        assert mirrors.register("rex", "v1", storage, "artifacts/rex/v1", "champion") is None
        mirrors.finish(state, None if state == "succeeded" else "it was stopped")

    told([*said(1, 3), sample], "interrupted")
    told([*said(1, 3), sample, *said(4, 4)], "succeeded")  # begun anew in its place, and told all of it
    rows = wandb_history(tmp_path)
    steps = {row["step"]: row for row in rows if "loss_subject" in row}
    assert list(steps) == [1, 2, 3, 4] and "lr_text" not in steps[1]
    assert [steps[n]["loss_subject"] for n in steps] == [0.1, 0.2, 0.3, 0.4]
    found = [(row["validation_step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    assert found == [(2, 0.4), (4, 0.8)]
    [picture] = tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png")
    assert decode_png(picture.read_bytes()).shape == (4, 4, 3)
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"secret" not in file.read_bytes() and b"artifacts/rex/v1" in file.read_bytes()


def test_a_run_that_goes_on_in_wandb_gets_what_it_lacks_of_each_kind(
    storage: Storage, tmp_path: Path, own_wandb: pytest.MonkeyPatch
) -> None:
    storage.write("runs/rex/v1/samples/step_000004.png", encode_png(np.zeros((4, 4, 3), np.uint8)))
    sample = {"event": "sample", "step": 4, "path": "runs/rex/v1/samples/step_000004.png"}
    init = wandb.init

    def resumed(**given: Any) -> Any:
        """A run that had step 4, and of validations and scores those of step 2, when its process died."""
        run = init(**{**given, "id": None, "resume": None, "mode": "offline"})
        run.summary.update({"step": 4, "validation_step": 2, "drawn_step": 2})
        return run

    own_wandb.setenv("WANDB_MODE", "online")
    own_wandb.setattr(wandb, "init", resumed)
    tracker = WandbTracker("booth", tmp_path, "rex-v1", {}, {}, "abc", pytest.fail)
    mirrors = Mirrors([tracker], pytest.fail)
    mirror([*said(1, 4), sample], mirrors, storage)  # as its record has it
    mirror(said(5, 6), mirrors, storage)
    mirrors.finish("succeeded")
    rows = wandb_history(tmp_path)
    assert [row["step"] for row in rows if "lr" in row] == [5, 6]
    assert [row["validation_step"] for row in rows if "validation_loss" in row] == [4, 6]
    assert [row["drawn_step"] for row in rows if "drawn_score" in row] == [4, 6]
    assert [row["samples_step"] for row in rows if "samples._type" in row] == [4]


def test_a_wandb_that_cannot_be_reached_is_a_note_and_a_folder_for_each_run(
    storage: Storage, tmp_path: Path, own_wandb: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own_wandb.setenv("WANDB_MODE", "online")
    own_wandb.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    own_wandb.setenv("WANDB_API_KEY", "a" * 40)
    own_wandb.setattr("orchestrator.wandb_tracker.REACH_S", 1.0)
    notes: list[str] = []
    for name in ("rex", "tom"):  # the second one does not try
        tracker = WandbTracker("booth", tmp_path / name, f"{name}-v1", {}, {}, None, notes.append)
        mirror(said(1, 2), Mirrors([tracker], pytest.fail), storage)
        tracker.finish("succeeded")
    first, second = notes
    assert "W&B cannot be reached" in first and str(tmp_path / "rex") in first and "wandb sync" in first
    assert "W&B did not answer before" in second and str(tmp_path / "tom") in second
    for name in ("rex", "tom"):
        assert [row["step"] for row in wandb_history(tmp_path / name) if "lr" in row] == [1, 2]
    assert capfd.readouterr() == ("", "")
