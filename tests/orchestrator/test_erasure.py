"""What of a deleted subject cannot be deleted from here is on its receipt."""

from pathlib import Path

from cluster.storage import Storage
from orchestrator.erasure import Erasure


def test_what_trackers_left_elsewhere_is_told(bucket: str, tmp_path: Path) -> None:
    storage = Storage(f"{bucket}/booth")
    track = {"wandb": True, "tensorboard": False}
    record = {"run": {"track": track}, "wandb": {"url": "https://wandb.example/rex"}}
    storage.write_json("runs/rex/v1/run.json", record)
    erasure = Erasure(storage, f"sqlite:///{tmp_path / 'c.db'}", f"sqlite:///{tmp_path / 'mlflow.db'}")
    receipt = erasure.erase("rex")
    assert "runs/rex" in receipt.removed and not storage.names("runs")
    kept = " ".join(receipt.kept)
    assert "W&B's run https://wandb.example/rex" in kept
    assert "raybooth-wandb/runs/rex in the working folder" in kept and "raybooth-tensorboard" not in kept
