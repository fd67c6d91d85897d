"""This file is where Ray Train enters: workers that train together, base resident, one run after another.

Ray Train gives placement, the process group and restarts, and nothing else: its report and its checkpoints belong to
the job and not to a run, so runs have their own (mailbox, `training/checkpoint.py`).
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from cluster.errors import RayboothError
from cluster.mailbox import MailboxClient, connect, failure


@dataclass(frozen=True)
class GangShape:
    """Who trains together: runs of another shape need another gang."""

    workers: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0


def run_gang(mailbox_name: str, shape: GangShape, scratch: str | None = None) -> None:
    """Run a gang in the calling thread until the mailbox has no more leases.

    Args:
        mailbox_name: Of the campaign's mailbox.
        shape: Number and size of the workers.
        scratch: A folder (of all nodes, if there are several) for Ray Train's own notes, of which nothing is read
            again; `None` takes a temporary one.
    """
    with tempfile.TemporaryDirectory(prefix="raybooth-gang-") as temporary:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"mailbox": mailbox_name, **asdict(shape)},
            torch_config=TorchConfig(backend="nccl" if shape.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=shape.workers,
                use_gpu=shape.gpus_per_worker > 0,
                resources_per_worker=_resources(shape),
            ),
            run_config=RunConfig(
                name=mailbox_name,
                storage_path=str(Path(scratch or temporary).absolute()),
                # without limit: the mailbox gives up on a run, not Ray on the gang
                failure_config=FailureConfig(max_failures=-1),
                logging_config=LoggingConfig(log_level="ERROR"),
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(shape.cpus_per_worker)}},
            ),
        )
        trainer.fit()


def _resources(shape: GangShape) -> dict[str, float]:
    cpus = {"CPU": float(shape.cpus_per_worker)}
    return {**cpus, "GPU": shape.gpus_per_worker} if shape.gpus_per_worker else cpus


def _work(config: Mapping[str, Any]) -> None:
    """What every rank does: take a lease, train it, take the next."""
    from training.loop import ResidentBase  # only workers pay for the models' imports

    torch.set_num_threads(int(config["cpus_per_worker"]))
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device, mailbox = _device(config["gpus_per_worker"]), connect(config["mailbox"])
    base: ResidentBase | None = None
    number = [mailbox.resume() if rank == 0 else 0]
    dist.broadcast_object_list(number, src=0)
    while (lease := mailbox.take(number[0])) is not None:
        with _last_words(mailbox, number[0], rank):
            if base is None or base.info.revision != lease.base_revision:
                base = ResidentBase.load(lease.base_model, lease.base_revision, device)
            _train_leased(mailbox, number[0], lease, base, rank, world)
        number[0] += 1
        dist.barrier()  # no rank is in the next run while another still uses this one's groups


def _device(gpus_per_worker: float) -> torch.device:
    """Where this worker computes; one that asked for no GPU takes none, even where one is visible."""
    device = get_device() if gpus_per_worker else torch.device("cpu")
    assert isinstance(device, torch.device)
    return device


@contextmanager
def _last_words(mailbox: MailboxClient, number: int, rank: int) -> Iterator[None]:
    """Report what this worker dies of, whichever rank it is: the gang restarts, and the cause would be lost."""
    try:
        yield
    except Exception as error:
        line, *_ = [*str(error).strip().splitlines(), "no message"]
        text = f"worker {rank}: {type(error).__name__}: {line}"
        mailbox.report(number, rank, "note", {"text": text, "died": True})
        raise


def _train_leased(mailbox: MailboxClient, number: int, lease: Any, base: Any, rank: int, world: int) -> None:
    """Train one lease; an error that every rank raises ends the run and not the gang."""
    from training.loop import train_run

    def report(kind: str, payload: Any) -> None:
        if rank == 0:
            mailbox.report(number, rank, kind, payload)

    try:
        metrics = train_run(lease, base, rank, world, report)
    except RayboothError as error:
        report("failed", failure(error))
    else:
        report("published", {"metrics": metrics})
