"""This file is where tests of training get a process group and a run to train."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from cluster.session import session
from cluster.storage import Storage
from training.artifact import open_artifact, write_weights
from training.batches import Batches
from training.conditioning import trained_parts
from training.dataplan import DataPlan
from training.lease import LatentTable, Lease
from training.loop import ResidentBase
from training.lora import attach
from training.pipeline import (
    BaseInfo,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    open_base,
    token_ids,
)
from training.recipe import Run
from training.wish import Wish


@pytest.fixture(scope="module")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A private Ray."""
    with session(None, 4, Storage(str(tmp_path_factory.mktemp("root")))):
        yield


@pytest.fixture(scope="session")
def group() -> Iterator[None]:
    """A process group of one, as a gang's worker has it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def resident(tiny_base: Path) -> ResidentBase:
    """The tiny base, loaded."""
    return load_resident(tiny_base)


def load_resident(folder: Path) -> ResidentBase:
    return ResidentBase.load(str(folder), open_base(str(folder)).revision, torch.device("cpu"))


def latents(seed: int, rows: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    mean = generator.standard_normal((rows, 4, 8, 8), dtype=np.float32)
    return {"mean": mean, "std": np.full_like(mean, 0.1)}


@pytest.fixture
def make_lease(tmp_path: Path) -> Callable[..., Lease]:
    """A lease without latents, for `ResidentBase` and recipe sections; tests bring their own tables."""

    def make(base: ResidentBase, name: str = "rex", **sections: Any) -> Lease:
        prompts = token_ids(
            load_tokenizer(base.info), ["a photo of a zwx dog", "a photo of a dog"], base.info.token_limit
        )
        run = Run.model_validate({"subject": {"name": name, "class": "dog", "images": ["x"]}, **sections})
        return Lease(
            run=run.model_dump(mode="json", by_alias=True),
            name=name,
            version="v1",
            base_model=base.info.model,
            base_revision=base.info.revision,
            storage_uri=str(tmp_path / "storage"),
            subject_latents=[],
            class_latents=[],
            subject_ids=prompts[0].tolist(),
            class_ids=prompts[1].tolist(),
            identity={
                "identifier": "zwx",
                "class_noun": "dog",
                "template": "a {identifier} {class}",
                "token_ids": [1],
            },
            meta={"fingerprint": f"{name}-f", "prior_key": "p"},
        )

    return make


@pytest.fixture
def make_batches() -> Callable[..., Batches]:
    """The batches of a lease over random latents: 3 of the subject, 5 of the class."""

    def make(lease: Lease, base: ResidentBase, rank: int = 0, world: int = 1) -> Batches:
        run = lease.recipe
        plan = DataPlan(run.train.seed, 3, 5, run.train.pairs_per_step, 1000, run.prior.weight)
        tables = [LatentTable(**latents(seed, rows)) for seed, rows in ((1, 3), (2, 5))]
        ids = torch.tensor(lease.prompts)
        whole = [np.tile(np.asarray([16, 16, 0, 0, 16, 16], np.float32), (rows, 1)) for rows in (3, 5)]
        return Batches(
            plan,
            tables,
            ids,
            base.info.scaling_factor,
            rank,
            world,
            run.train.accumulation,
            torch.device("cpu"),
            sizes=whole if base.info.kind.sized else None,
        )

    return make


# -- what stock diffusers draws ----------------------------------------------------------------------------


@pytest.fixture
def write_artifact() -> Callable[..., None]:
    """Writes an artifact as if trained: weights moved far enough that the picture changes."""

    def write(base: BaseInfo, run: Run, folder: Path, far: float = 0.02) -> None:
        unet, text_encoder = load_unet(base), load_text_encoder(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            if run.train.method == "lora":
                attach(unet, text_encoder, run.train.lora, run.train.text_encoder.train, seed=1)
                for p in (p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad):
                    nn.init.normal_(p, std=0.4)
            else:
                for p in (p for m in trained_parts(unet, text_encoder).values() for p in m.parameters()):
                    p.data.add_(torch.randn_like(p), alpha=far)
        write_weights(base, run, unet, text_encoder, folder)

    return write


@pytest.fixture
def stock_images() -> Callable[..., NDArray[np.uint8]]:
    """Draws a prompt with a stock pipeline, an image [H, W, 3] for each seed; settings as its call takes them."""

    def draw(pipe: Any, prompt: str, seeds: Sequence[int], **call: Any) -> NDArray[np.uint8]:
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        images = pipe([prompt] * len(seeds), generator=generators, output_type="np", **call).images
        rounded: NDArray[np.uint8] = (images * 255).round().astype(np.uint8)
        return rounded

    return draw


@pytest.fixture
def assert_same_picture() -> Callable[[Any, NDArray[np.uint8]], None]:
    """At most 1/255 apart, and at most one value in a hundred: sums are taken in another order."""

    def look(ours: Any, theirs: NDArray[np.uint8]) -> None:
        apart = np.abs(np.stack(ours).astype(int) - theirs.astype(int))
        assert apart.max() <= 1
        assert (apart > 0).mean() <= 0.01
        assert theirs.std() > 5  # a picture, not a flat field

    return look


# -- whole runs without Ray --------------------------------------------------------------------------------

WORKER = Path(__file__).with_name("worker.py")
Trained = dict[str, Any]  # `metrics` (None: left) or `error`, and `events`
Wishes = Mapping[int, Mapping[int, Wish]]  # by rank, by step from 0


@pytest.fixture
def make_job(make_lease: Callable[..., Lease], resident: ResidentBase) -> Callable[..., Lease]:
    """A lease with random latents in it (3 photos, 5 class images) that `alone` and `pair` train."""

    def make(name: str, **sections: Any) -> Lease:
        lease = make_lease(resident, name=name, **sections)
        prompts = token_ids(load_tokenizer(resident.info), ["", "a zwx dog"], resident.info.token_limit)
        meta = {**lease.meta, "subject_names": ["one.png", "two.png", "three.png"]}
        return replace(
            lease,
            subject_latents=[latents(1, 3)],
            class_latents=[latents(2, 5)],
            sample_ids=prompts.tolist(),
            meta=meta,
        )

    return make


@pytest.fixture
def alone(group: None, resident: ResidentBase, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    """Trains a job in this process, a group of one."""
    spec = spec_from_file_location("worker", WORKER)
    assert spec is not None and spec.loader is not None
    worker = module_from_spec(spec)
    spec.loader.exec_module(worker)
    monkeypatch.setattr("training.lease.fetch", list)

    def run(lease: Lease, wishes: Wishes | None = None) -> Trained:
        result: Trained = worker.train(lease, resident, 0, (wishes or {}).get(0, {}))
        return result

    return run


class Pair:
    """Two processes that train together, started once for all tests."""

    def __init__(self, folder: Path) -> None:
        address = str(folder / "address")
        with Listener(address) as listener:
            self._processes = [
                subprocess.Popen(
                    [
                        sys.executable,
                        "-W",
                        "ignore",
                        str(WORKER),
                        str(rank),
                        "2",
                        str(folder / "store"),
                        address,
                    ]
                )
                for rank in range(2)
            ]
            connections = [listener.accept() for _ in range(2)]
        self._connections: dict[int, Connection] = {c.recv(): c for c in connections}

    def __call__(self, lease: Lease, wishes: Wishes | None = None) -> list[Trained]:
        """What came of a job on each rank."""
        for rank, connection in self._connections.items():
            connection.send((lease, (wishes or {}).get(rank, {})))
        return [self._connections[rank].recv() for rank in range(2)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()  # they have nothing to lose, and a tidy end takes seconds
            process.wait()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Trains a job in two processes together."""
    both = Pair(tmp_path_factory.mktemp("pair"))
    yield both
    both.close()


@pytest.fixture(autouse=True)
def _own_linear() -> Iterator[None]:
    """Takes back what DeepSpeed's stage 3 replaces, for engines that a test does not close."""
    before = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = before


@pytest.fixture
def weights(storage: Storage) -> Callable[[str], dict[str, bytes]]:
    """The bytes of every tensor of a subject's artifact."""

    def read(name: str) -> dict[str, bytes]:
        with open_artifact(storage, name, "v1") as artifact:
            return {
                f"{file.name}/{key}": tensor.numpy().tobytes()
                for file in sorted(artifact.folder.rglob("*.safetensors"))
                for key, tensor in load_file(file).items()
            }

    return read
