"""What leaves for MLflow: a real one, in SQLite."""

import time
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from cluster.storage import Storage
from orchestrator.tracking import Mirrors, MlflowTracker, mirror
from training.png import encode_png


def said(first: int, last: int) -> list[dict[str, Any]]:
    """Steps `first` to `last` with a validation after every second, as `events.jsonl` has them."""
    entries: list[dict[str, Any]] = [{"event": "started", "from_step": first - 1}]
    for step in range(first, last + 1):
        losses = {"loss_subject": step / 10, "loss_class": step / 20}
        entries.append({"event": "step", "time": "t", "step": step, "lr": 1e-4, "lr_text": None, **losses})
        if step % 2 == 0:
            entries.append({"event": "validation", "time": "t", "step": step, "loss": step / 5, **losses})
    return entries


@pytest.mark.slow
def test_a_run_that_goes_on_has_every_step_once_and_what_the_machine_did(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    uri = f"sqlite:///{storage.uri}/mlflow.db"

    def opened(run_id: str | None) -> tuple[MlflowTracker, Mirrors]:
        tracker = MlflowTracker(uri, "raybooth", storage, "rex-v1", {"train.steps": 5}, {}, run_id)
        return tracker, Mirrors([tracker], pytest.fail)

    storage.write("runs/rex/v1/samples/step_000002.png", encode_png(np.zeros((4, 4, 3), np.uint8)))
    tracker, mirrors = opened(None)
    sample = {"event": "sample", "step": 2, "path": "runs/rex/v1/samples/step_000002.png"}
    mirror([*said(1, 3), sample], mirrors, storage)
    time.sleep(1.0)
    mirrors.finish("interrupted")

    later, mirrors = opened(tracker.run_id)
    assert later.run_id == tracker.run_id
    mirror(
        [*said(1, 4), sample], mirrors, storage
    )  # what is there already, and step 4, which was not mirrored
    mirror(said(5, 5), mirrors, storage)
    began = time.monotonic()
    mirrors.finish("succeeded")
    assert time.monotonic() - began < 20.0

    client = MlflowClient(tracking_uri=uri)
    history = {
        key: [m.step for m in client.get_metric_history(tracker.run_id, key)]
        for key in ("loss_subject", "loss_class", "lr", "validation_loss", "validation_loss_class")
    }
    assert history == {
        "loss_subject": [1, 2, 3, 4, 5],
        "loss_class": [1, 2, 3, 4, 5],
        "lr": [1, 2, 3, 4, 5],
        "validation_loss": [2, 4],
        "validation_loss_class": [2, 4],
    }
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and "system/cpu_utilization_percentage" in run.data.metrics
    assert [file.path for file in client.list_artifacts(tracker.run_id, "samples")] == [
        "samples/samples_000002.png"
    ]
