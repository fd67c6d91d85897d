"""What a run does besides its steps: it validates, draws, saves the best, hears wishes, and stops when it diverges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from cluster.errors import SystemFailure, UserError
from cluster.storage import Storage
from training import checkpoint
from training.artifact import open_artifact
from training.draw import Drawer
from training.lease import Lease
from training.loop import ResidentBase
from training.png import decode_png, grid
from training.request import DrawRequest
from training.wish import Dropped, Wish

Trained = dict[str, Any]
TRAIN: dict[str, Any] = {"method": "lora", "steps": 6, "lr": 1e-2, "pairs_per_step": 2}
OFF = {"every": 0}
UNET = "unet/diffusion_pytorch_model.safetensors"


def of_kind(trained: Trained, kind: str) -> list[Any]:
    return [payload for event, payload in trained["events"] if event == kind]


def rows(trained: Trained) -> list[dict[str, Any]]:
    return [row for part in of_kind(trained, "steps") for row in part]


def test_a_run_validates_draws_and_saves_when_it_is_due(
    make_job: Callable[..., Lease], alone: Callable[..., Trained], storage: Storage
) -> None:
    validate = {"every": 3, "samples": 4, "steps": 2, "num_images": 2, "guidance": 2.0}
    done = alone(make_job("rex", train=TRAIN, validate=validate, checkpoint={"every": 2, "keep": 1}))
    assert [said["step"] for said in of_kind(done, "validation")] == [2, 3, 4, 6]
    assert [(said["step"], said["why"]) for said in of_kind(done, "checkpoint")] == [
        (2, "schedule"),
        (4, "schedule"),
    ]
    assert of_kind(done, "sample") == [{"step": 3, "path": "runs/rex/v1/samples/step_000003.png"}]
    picture = decode_png(storage.read("runs/rex/v1/samples/step_000003.png"))
    assert picture.shape == (16 * 2 + 2, 16 * 2 + 2, 3)  # guided and not, two seeds
    assert done["metrics"]["validation_loss"] == of_kind(done, "validation")[-1]["loss"]
    assert [row["step"] for row in rows(done)] == [1, 2, 3, 4, 5, 6]
    assert all(row["memory_mb"] > 100 and row["workers"] == 1 for row in rows(done))
    [started] = of_kind(done, "started")
    assert (started["from_step"], started["workers"], started["zero_stage"]) == (0, 1, 0)
    manifest = storage.manifest("runs/rex/v1/checkpoints/step_000004")
    assert manifest is not None and (manifest["world"], manifest["zero_stage"]) == (1, 0)
    assert manifest["validation_loss"] == of_kind(done, "validation")[2]["loss"]


@pytest.mark.resume
def test_a_published_run_that_was_not_heard_of_tells_its_rows_again(
    make_job: Callable[..., Lease], alone: Callable[..., Trained]
) -> None:
    job = make_job("rex", train=TRAIN, validate=OFF)
    first, again = alone(job), alone(job)
    assert again["metrics"] == first["metrics"]
    assert rows(again) == rows(first) and not of_kind(again, "started")


def test_the_validation_loss_is_the_same_for_the_same_weights_and_of_photos_held_out(
    make_job: Callable[..., Lease], alone: Callable[..., Trained]
) -> None:
    still = {**TRAIN, "lr": 1e-12, "weight_decay": 0.0, "steps": 3}
    losses = []
    for name, data in (("all", {}), ("held", {"holdout": 1})):
        done = alone(make_job(name, train=still, data=data, validate={"every": 1, "prompts": []}))
        said = [{k: v for k, v in s.items() if k != "step"} for s in of_kind(done, "validation")]
        assert all(s == pytest.approx(said[0], abs=1e-6) for s in said)
        assert said[0]["loss"] == pytest.approx(said[0]["loss_subject"] + said[0]["loss_class"])
        losses.append(said[0])
    assert losses[0]["loss_class"] == losses[1]["loss_class"]
    assert losses[0]["loss_subject"] != losses[1]["loss_subject"]


def test_the_best_checkpoint_is_kept_and_published_when_the_end_is_worse(
    make_job: Callable[..., Lease], alone: Callable[..., Trained], storage: Storage
) -> None:
    sections: dict[str, Any] = {
        "train": {**TRAIN, "method": "full", "steps": 3, "lr": 0.5, "ema_decay": 0.5},
        "checkpoint": {"every": 1, "keep": 1},
        "validate": {"every": 1, "samples": 4, "prompts": []},
    }
    last = alone(make_job("last", **sections))
    sections["train"]["load_best_at_end"] = True
    best = alone(make_job("best", **sections))
    losses = {said["step"]: said["loss"] for said in of_kind(best, "validation")}
    step = min(losses, key=lambda s: losses[s])
    assert step < 2, losses  # at so high a rate it only goes up
    assert checkpoint.steps_saved(storage, "runs/best/v1") == [step, 2]
    assert best["metrics"] == last["metrics"] | {"validation_loss": losses[step], "best_step": step}
    state = checkpoint.load(storage, "runs/best/v1", step, "best-f")
    assert state.average is not None
    published = _weights(storage, "best", UNET)
    assert published and published != _weights(storage, "last", UNET)
    saved = {tensor.numpy().tobytes() for tensor in state.average.values()}
    assert set(published.values()) <= saved


def _weights(storage: Storage, name: str, file: str = "pytorch_lora_weights.safetensors") -> dict[str, bytes]:
    with open_artifact(storage, name, "v1") as artifact:
        tensors = load_file(artifact.folder / file)
    return {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}


def test_a_checkpoint_that_is_asked_for_is_saved_once_and_the_run_goes_on(
    make_job: Callable[..., Lease], alone: Callable[..., Trained], storage: Storage
) -> None:
    asked = alone(make_job("asked", train=TRAIN, validate=OFF), {0: {0: Wish.CHECKPOINT, 1: Wish.CHECKPOINT}})
    calm = alone(make_job("calm", train=TRAIN, validate=OFF))
    assert [(said["step"], said["why"]) for said in of_kind(asked, "checkpoint")] == [(3, "asked")]
    manifest = storage.manifest("runs/asked/v1/checkpoints/step_000003")
    assert manifest is not None and manifest["validation_loss"] is None
    assert _weights(storage, "asked") == _weights(storage, "calm") and asked["metrics"] == calm["metrics"]


def test_a_wish_that_the_end_overtakes_is_void(
    make_job: Callable[..., Lease], alone: Callable[..., Trained]
) -> None:
    assert alone(make_job("rex", train=TRAIN, validate=OFF), {0: {4: Wish.LEAVE}})["metrics"]


def test_losses_that_are_no_numbers_end_the_run_with_its_step_and_images(
    make_job: Callable[..., Lease], alone: Callable[..., Trained], storage: Storage
) -> None:
    job = make_job("rex", train=TRAIN, validate=OFF, checkpoint={"every": 1, "keep": 9})
    [table] = job.subject_latents
    table["mean"][1] = np.nan  # two.png, damaged
    done = alone(job)
    error = done["error"]
    assert isinstance(error, UserError) and "loss_subject is nan" in error.seen and "two.png" in error.seen
    good = [row["step"] for row in rows(done)]
    assert error.what == f"the training diverged at step {len(good) + 1}"
    assert good == list(range(1, len(good) + 1)) == checkpoint.steps_saved(storage, "runs/rex/v1")


def test_the_grid_shows_what_the_artifact_draws(
    make_job: Callable[..., Lease],
    alone: Callable[..., Trained],
    resident: ResidentBase,
    storage: Storage,
) -> None:
    """The grid after step 6 of 7 whose last step changes nothing, beside the artifact's own pictures."""
    train = {**TRAIN, "steps": 7, "lr_scheduler": "linear", "lr": 1e-2, "weight_decay": 0.0}
    validate = {"every": 6, "samples": 1, "steps": 3, "num_images": 2, "guidance": 2.0}
    alone(make_job("rex", train={**train, "ema_decay": 0.999}, validate=validate))
    ours = decode_png(storage.read("runs/rex/v1/samples/step_000006.png"))
    with open_artifact(storage, "rex", "v1") as artifact:
        drawer = Drawer(resident.info, artifact.folder, artifact.manifest, device="cpu")
        requests = [
            DrawRequest("a zwx dog", seed, steps=3, guidance=guidance)
            for guidance in (2.0, 1.0)
            for seed in range(2)
        ]
        theirs = grid(drawer.draw(requests), columns=2)
    assert np.abs(ours.astype(int) - theirs).mean() < 2.0


def test_a_checkpoint_that_cannot_be_written_is_a_note_and_an_artifact_a_failure(
    make_job: Callable[..., Lease], alone: Callable[..., Trained], storage: Storage
) -> None:
    for folder in ("runs/rex/v1", "artifacts"):
        Path(storage.full(folder)).parent.mkdir(parents=True, exist_ok=True)
        Path(storage.full(folder)).write_text("a file where a folder should be")
    done = alone(make_job("rex", train=TRAIN, validate=OFF, checkpoint={"every": 4}))
    [note] = of_kind(done, "note")
    assert "not written" in note["text"] and not of_kind(done, "checkpoint")
    assert isinstance(done["error"], SystemFailure) and "runs/rex" in done["error"].what


@pytest.mark.slow
def test_one_of_two_workers_wishes_and_both_hear_it(
    make_job: Callable[..., Lease], pair: Any, storage: Storage
) -> None:
    one, two = pair(make_job("rex", train=TRAIN, validate=OFF), {1: {0: Wish.CHECKPOINT}})
    assert [(said["step"], said["why"]) for said in of_kind(one, "checkpoint")] == [(3, "asked")]
    assert one["metrics"].keys() == two["metrics"].keys()
    lines = storage.read("runs/rex/v1/figures.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_all_workers_of_a_run_that_diverges_end_it_together(
    make_job: Callable[..., Lease], pair: Any
) -> None:
    job = make_job("rex", train=TRAIN, validate=OFF)
    [table] = job.subject_latents
    table["mean"][1] = np.nan
    one, two = pair(job)
    assert str(one["error"]) == str(two["error"]) and "two.png" in str(one["error"])


def test_all_workers_of_a_run_that_nobody_wants_any_more_end_it_together_without_a_checkpoint(
    make_job: Callable[..., Lease], pair: Any, storage: Storage
) -> None:
    job = make_job("rex", train={**TRAIN, "steps": 30}, validate=OFF)
    one, two = pair(job, {1: {2: Wish.DROP}})  # said by one of them
    assert [type(end["error"]) for end in (one, two)] == [Dropped, Dropped]
    assert one["error"].step == two["error"].step == 5
    assert storage.names("runs/rex/v1/checkpoints") == [] and storage.manifest("artifacts/rex/v1") is None
