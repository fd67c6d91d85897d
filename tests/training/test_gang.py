"""Real gangs on a tiny base: Ray Train, the mailbox, DeepSpeed, published artifacts."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import ray

from cluster.errors import UserError
from cluster.mailbox import NOBODY, Event, create, put
from cluster.storage import Storage
from training.artifact import open_artifact
from training.batches import Batches
from training.draw import Drawer
from training.gang import GangShape, _last_words, run_gang
from training.lease import Draw, Lease
from training.loop import ResidentBase
from training.png import decode_png, grid
from training.request import DrawRequest

FULL = {
    "method": "full",
    "steps": 4,
    "lr": 1e-4,
    "pairs_per_step": 3,
    "text_encoder": {"train": True, "lr": 1e-5},
}


@pytest.fixture
def with_latents(make_lease: Callable[..., Lease], resident: ResidentBase) -> Callable[..., Lease]:
    """Leases with latents in the object store: the subject's in two blocks, 5 of the class in one."""

    def block(seed: int, rows: int) -> Any:
        mean = np.random.default_rng(seed).standard_normal((rows, 4, 8, 8), dtype=np.float32)
        return put({"mean": mean, "std": np.full_like(mean, 0.1)})

    def make(name: str, **sections: Any) -> Lease:
        lease = make_lease(resident, name=name, **sections)
        return replace(lease, subject_latents=[block(1, 2), block(2, 1)], class_latents=[block(3, 5)])

    return make


def train(leases: list[Lease], workers: int) -> list[Event]:
    name = f"test-{uuid4().hex[:8]}"
    box = create(name)
    for lease in leases:
        box.post(lease)
    box.stop()
    run_gang(name, GangShape(workers=workers))
    events = box.drain()
    box.close()
    return events


def losses(events: list[Event], lease: int) -> list[list[float]]:
    keys = ("loss_subject", "loss_class", "grad_norm")
    return [[e.payload[k] for k in keys] for e in events if (e.lease, e.kind) == (lease, "step")]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_gang_trains_lease_after_lease_and_two_workers_give_the_losses_of_one(
    with_latents: Callable[..., Lease], resident: ResidentBase, storage: Storage
) -> None:
    lora = with_latents("ada", train={**FULL, "method": "lora"}, checkpoint={"every": 2})
    asked = [DrawRequest("a photo of a zwx dog", seed, steps=2) for seed in range(2)]
    bad = with_latents("bad", train={**FULL, "lr": 1.0, "steps": 60, "max_grad_norm": None})
    rex = with_latents("rex", train=FULL)
    again = [replace(rex, name="rex-again"), replace(lora, name="ada-again")]
    drawn = [Draw(of, tuple(asked), 2, f"{of.name}.png") for of in (rex, lora)]
    alone = train([rex, bad, lora, *drawn, *again], workers=1)
    assert [e.kind for e in alone if e.lease == NOBODY] == ["awake"]
    kinds = [(e.lease, e.kind) for e in alone if e.kind != "step" and e.lease in (0, 1, 2)]
    assert kinds == [
        (0, "started"),
        (0, "validation"),
        (0, "published"),
        (1, "started"),
        (1, "failed"),
        (2, "started"),
        (2, "validation"),
        (2, "checkpoint"),
        (2, "validation"),
        (2, "published"),
    ]
    failed = next(e for e in alone if e.kind == "failed")
    assert "diverged" in failed.payload["what"] and failed.payload["do"]
    steps = [e.payload for e in alone if (e.lease, e.kind) == (0, "step")]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert all((s["lr"], s["lr_text"]) == (1e-4, 1e-5) and s["steps_per_second"] > 0 for s in steps)
    assert [e.kind for e in alone if e.lease in (3, 4)] == ["drawn", "drawn", "published"] * 2
    for name, method in (("rex", "full"), ("ada", "lora")):
        with open_artifact(storage, name, "v1") as artifact:
            assert artifact.manifest["method"] == method and artifact.manifest["metrics"]["loss_subject"] > 0
            assert artifact.identity.identifier == "zwx"
            drawer = Drawer(resident.info, artifact.folder, artifact.manifest)
            picture = decode_png(storage.read(f"{name}.png"))
            assert np.array_equal(picture, grid(drawer.draw(asked), columns=2))
        # whatever was trained and drawn in between, a diverged run among it, nothing of it is left in the gang
        first, second = (storage.manifest(f"artifacts/{of}/v1") for of in (name, f"{name}-again"))
        assert first and second and first["files"] == second["files"]

    sharded = [with_latents(f"rex{stage}", train=FULL, engine={"zero_stage": stage}) for stage in (0, 2)]
    together = train([*sharded, replace(lora, name="ada2")], workers=2)
    for lease in (0, 1):
        assert np.allclose(losses(together, lease), losses(alone, 0), atol=1e-5)
    assert np.allclose(losses(together, 2), losses(alone, 2), atol=1e-5)
    for name in ("rex2", "ada2"):
        with open_artifact(storage, name, "v1") as artifact:
            assert artifact.folder.is_dir()
    # what controls and coordinates them is in this process
    actors = {actor["ActorClassName"] for actor in ray._private.state.actors().values()}
    assert actors == {"Mailbox", "RayTrainWorker"}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_gang_whose_mailbox_is_closed_ends() -> None:
    name = f"test-{uuid4().hex[:8]}"
    box, gang = create(name), threading.Thread(target=run_gang, args=(name, GangShape()), daemon=True)
    gang.start()
    assert box.drain(60)[0].kind == "awake"
    box.close()
    gang.join(60)
    assert not gang.is_alive()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_more_micro_batches_than_a_worker_has_pairs_are_refused(
    with_latents: Callable[..., Lease], resident: ResidentBase
) -> None:
    lease = with_latents("rex", train={**FULL, "pairs_per_step": 4, "accumulation": 3})
    assert Batches.of(lease, resident.info, resident.device, rank=0, world=1).per_step == 3
    with pytest.raises(UserError, match=r"train\.accumulation to 2 or less"):
        Batches.of(lease, resident.info, resident.device, rank=0, world=2)


class Ear:
    """A mailbox that only listens."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def report(self, *event: Any) -> None:
        self.heard.append(event)


def test_every_worker_tells_what_it_dies_of() -> None:
    ear = Ear()
    with pytest.raises(OSError), _last_words(ear, 3, rank=1):  # type: ignore[arg-type]
        raise OSError(28, "No space left on device\nand more")
    text = "worker 1: OSError: [Errno 28] No space left on device"
    assert ear.heard == [(3, 1, "note", {"text": text, "died": True, "kind": ""})]
