"""Photos in, images out: the whole path with its real parts, through the command line as a user would."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.numpy import load_file

from pocket.subject import SUBJECT_CLASS, write_photos
from training.png import decode_png

pytestmark = pytest.mark.slow
RAYBOOTH = [sys.executable, "-m", "orchestrator"]
QUICK = [
    *("--set", "prior.num_images=4", "--set", "prior.steps=4"),
    *("--set", "train.steps=12", "--set", "train.pairs_per_step=1", "--set", "checkpoint.every=4"),
    *("--set", "validate.num_images=1", "--set", "validate.steps=3"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos with spaces é")
    write_photos(folder)
    return folder


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, booth: Callable[..., dict[str, Any]]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    root = tmp_path_factory.mktemp("root")
    yield root, booth(root, "train", str(photos), "--class", SUBJECT_CLASS, "--name", "rex", *QUICK)


def weights(artifact: str) -> dict[str, bytes]:
    tensors = load_file(Path(artifact) / "pytorch_lora_weights.safetensors")
    return {name: tensor.tobytes() for name, tensor in sorted(tensors.items())}


def test_train_answers_with_the_contract(trained: tuple[Path, dict[str, Any]]) -> None:
    root, answer = trained
    assert answer["state"] == "succeeded"
    assert (answer["subject"], answer["version"]) == ("rex", "v1")
    assert answer["prior_images_drawn"] == 4
    assert Path(answer["artifact"], "manifest.json").is_file()
    assert {"loss_subject", "loss_class"} <= set(answer["metrics"])
    assert not (root / "runs/rex/v1/checkpoints").exists()
    steps = [
        json.loads(line)["step"]
        for line in (root / "runs/rex/v1/events.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "step"
    ]
    assert steps == list(range(1, 13))


def test_mlflow_has_the_figures_the_samples_and_the_champion(trained: tuple[Path, dict[str, Any]]) -> None:
    root, answer = trained
    client = MlflowClient(
        tracking_uri=f"sqlite:///{root}/mlflow.db", registry_uri=f"sqlite:///{root}/mlflow.db"
    )
    run = client.get_run(answer["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "12"
    assert len(client.get_metric_history(answer["run_id"], "loss_subject")) == 12
    assert {"loss_class", "lr", "steps_per_second", "grad_norm"} <= set(run.data.metrics)
    assert [f.path for f in client.list_artifacts(answer["run_id"], "samples")] == [
        "samples/samples_000012.png"
    ]
    assert client.get_model_version_by_alias("rex", "champion").tags["raybooth.version"] == "v1"


def test_the_same_command_again_does_nothing(
    trained: tuple[Path, dict[str, Any]], photos: Path, booth: Callable[..., dict[str, Any]]
) -> None:
    root, first = trained
    again = booth(root, "train", str(photos), "--class", SUBJECT_CLASS, "--name", "rex", *QUICK)
    assert again["already_there"]
    assert again["version"] == "v1"
    assert again["artifact"] == first["artifact"]
    assert (root / "runs/rex").is_dir()
    assert [p.name for p in (root / "runs/rex").iterdir()] == ["v1"]


def test_an_image_is_the_same_to_the_byte_whatever_is_drawn_beside_it(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, booth: Callable[..., dict[str, Any]]
) -> None:
    root, _ = trained
    ask = ("generate", "rex", "a photo of {subject}", "--seed", "0", "--steps", "3")
    four = booth(root, *ask, "-n", "4", "--out", str(tmp_path / "four"))
    one = booth(root, *ask, "-n", "1", "--out", str(tmp_path / "another place"))
    assert four["seeds"] == [0, 1, 2, 3]
    assert Path(one["images"][0]).read_bytes() == Path(four["images"][0]).read_bytes()
    assert len({Path(image).read_bytes() for image in four["images"]}) == 4
    assert Path(four["grid"]).is_file()
    # the worker that trained has drawn what anybody draws of the artifact, who then puts a watermark into it
    sample, first, second = (
        decode_png(Path(path).read_bytes()).astype(int)
        for path in (root / "runs/rex/v1/samples.png", *four["images"][:2])
    )
    assert np.abs(sample - first).mean() < 4 < np.abs(sample - second).mean()


def test_prompts_come_from_a_file_too(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, booth: Callable[..., dict[str, Any]]
) -> None:
    root, _ = trained
    (tmp_path / "prompts.txt").write_text(
        "# scenes\na photo of {subject} in the snow\n\n{subject} in space\n"
    )
    options = ("--prompts", str(tmp_path / "prompts.txt"), "-n", "1", "--steps", "3", "--sampler", "dpm++2m")
    drawn = booth(root, "generate", "rex@v1", *options, "--out", str(tmp_path / "out"))
    assert len(drawn["images"]) == 2


def test_a_second_subject_of_the_same_photos_draws_no_prior_and_gets_the_same_tensors(
    trained: tuple[Path, dict[str, Any]], photos: Path, booth: Callable[..., dict[str, Any]]
) -> None:
    root, first = trained
    answer = booth(root, "train", str(photos), "--class", SUBJECT_CLASS, "--name", "tom", *QUICK)
    assert (answer["version"], answer["prior_images_drawn"]) == ("v1", 0)
    assert weights(answer["artifact"]) == weights(first["artifact"])


def test_a_driver_killed_between_publishing_and_registering_goes_on_from_there(
    trained: tuple[Path, dict[str, Any]], photos: Path, booth: Callable[..., dict[str, Any]]
) -> None:
    root, first = trained
    record = root / "runs/rex/v1/run.json"
    (root / "registry/rex.json").unlink()
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": "publishing"}))
    again = booth(root, "train", str(photos), "--class", SUBJECT_CLASS, "--name", "rex", *QUICK)
    assert (again["version"], again["already_there"], again["run_id"]) == ("v1", False, first["run_id"])
    assert again["metrics"] == first["metrics"]
    assert booth(root, "subjects", "show", "rex")["aliases"] == {"champion": "v1"}
    client = MlflowClient(
        tracking_uri=f"sqlite:///{root}/mlflow.db", registry_uri=f"sqlite:///{root}/mlflow.db"
    )
    assert len(client.search_model_versions("name='rex'")) == 1


def test_promote_and_rollback_move_the_champion(
    trained: tuple[Path, dict[str, Any]],
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    booth: Callable[..., dict[str, Any]],
) -> None:
    root, _ = trained
    monkeypatch.setenv("WANDB_MODE", "offline")
    more = [
        *QUICK,
        "--set",
        "train.steps=2",
        "--set",
        "validate.prompts=[]",
        "--set",
        "track.tensorboard=true",
        "--set",
        "track.wandb=true",
    ]
    second = booth(root, "train", str(photos), "--class", SUBJECT_CLASS, "--name", "rex", *more)
    assert second["version"] == "v2"
    assert list((root / "runs/rex/v2/tensorboard").glob("events.out.tfevents.*"))
    [folder] = (root / "runs/rex/v2/wandb").glob("offline-run-*/run-*.wandb")
    assert b"loss_subject" in folder.read_bytes()
    assert booth(root, "subjects", "show", "rex")["aliases"]["champion"] == "v2"
    assert booth(root, "subjects", "promote", "rex", "v1")["aliases"]["champion"] == "v1"
    assert booth(root, "subjects", "rollback", "rex")["aliases"]["champion"] == "v2"
