"""This file is where Ray Train enters: workers that train together, base resident, one run after another.

Ray Train gives placement, the process group, restarts, resizing and the notice that a node is taken away, and nothing
else: its report and its checkpoints belong to the job and not to a run, so runs have their own (mailbox,
`training/checkpoint.py`).
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import ResizingState

from cluster.errors import RayboothError
from cluster.mailbox import LEAVE, MEMORY, MailboxClient, Withdrawn, connect, failure
from cluster.session import is_private
from training.household import control, keep_house
from training.imports import forgo
from training.lease import Bank, Calibrate, Draw, Lease
from training.listener import Listener
from training.wish import Dropped, no_wish

RESIZE_EVERY_S = 10.0  # how often an elastic gang looks for more room
LEAVE_S = 20.0  # that the workers of an elastic gang get to save before it is resized
ASK_S = 5.0  # for an answer of Ray's own actors


class Left(Exception):
    """The gang has left its run on purpose and starts again: elsewhere, or with another number of workers."""


@dataclass(frozen=True)
class GangShape:
    """Who trains together: runs of another shape need another gang."""

    workers: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    min_workers: int | None = None
    """Fewest workers it starts or goes on with while there is no room for `workers`; `None` waits for all."""


def run_gang(mailbox_name: str, shape: GangShape, scratch: str | None = None) -> None:
    """Run a gang in the calling thread until the mailbox has no more leases.

    Args:
        mailbox_name: Of the campaign's mailbox.
        shape: Number and size of the workers.
        scratch: A folder of all nodes, or a URI, for Ray Train's own notes, of which nothing is read again; `None`
            takes a temporary folder of this node.
    """
    elastic = shape.min_workers is not None and shape.min_workers < shape.workers
    with tempfile.TemporaryDirectory(prefix="raybooth-gang-") as temporary:
        trainer = _Trainer(
            _work,
            train_loop_config={"mailbox": mailbox_name, **asdict(shape)},
            torch_config=TorchConfig(backend="nccl" if shape.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(shape.min_workers, shape.workers) if elastic else shape.workers,
                elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
                use_gpu=shape.gpus_per_worker > 0,
                resources_per_worker=_resources(shape),
            ),
            run_config=RunConfig(
                name=mailbox_name,
                storage_path=scratch or temporary,
                # without limit: the mailbox gives up on a run, not Ray on the gang
                failure_config=FailureConfig(max_failures=-1, max_preemption_failures=-1),
                callbacks=[_Resizing(mailbox_name)] if elastic else None,
                logging_config=LoggingConfig(log_level="ERROR"),
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(shape.cpus_per_worker)}},
            ),
        )
        trainer.fit()


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types here
    """Ray's trainer without what starts a process, 2 CPU seconds each, that does nothing for a gang.

    In a private Ray its controller is a thread. It reads no dataset of Ray Train's. What frees the room of the workers
    of a controller that was killed is for clusters that outlive it.
    """

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if not is_private():
            return super()._initialize_and_run_controller(**settings)
        keep_house()
        return control(**settings)

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, *((PlacementGroupCleanerCallback,) if is_private() else ()))
        return [
            callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)
        ]


def _resources(shape: GangShape) -> dict[str, float]:
    cpus = {"CPU": float(shape.cpus_per_worker)}
    return {**cpus, "GPU": shape.gpus_per_worker} if shape.gpus_per_worker else cpus


class _Resizing(ControllerCallback):  # type: ignore[misc]  # Ray has no types here
    """What Ray's elasticity needs so that a resize costs no steps and a lost node no minutes. Runs in its controller.

    Args:
        mailbox_name: Of the campaign's mailbox.
    """

    def __init__(self, mailbox_name: str) -> None:
        self._mailbox_name = mailbox_name

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Have the nodes counted now: Ray does it every 20 s, and until then would wait for one that is gone."""
        coordinator = default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()
        counted = coordinator.get_reserved_resources
        with suppress(RayError):  # then it takes longer; raised here, it would end the gang
            ray.get(counted.remote(self._mailbox_name, recompute=True), timeout=ASK_S)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Let the workers save and leave before they are ended for a resize."""
        if isinstance(current_state, ResizingState):
            mailbox = connect(self._mailbox_name)
            if mailbox.ask(LEAVE):
                mailbox.quiet(LEAVE_S)
        elif current_state is previous_state:
            time.sleep(0.5)  # with too few nodes Ray's controller asks again at once, and would burn a CPU


def _work(config: Mapping[str, Any]) -> None:
    """What every rank does: take a lease, train it, take the next."""
    from training.loop import ResidentBase  # only workers pay for the models' imports

    forgo()
    torch.set_num_threads(int(config["cpus_per_worker"]))
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    try:
        mailbox = connect(config["mailbox"])
    except ValueError:  # whoever started the gang has given it up while it was not there
        return
    device = _device(config["gpus_per_worker"])
    base: ResidentBase | None = None
    number = [mailbox.resume() if rank == 0 else 0]
    dist.broadcast_object_list(number, src=0)
    listener = Listener(mailbox, _reclaimed) if rank == 0 else None
    while (lease := mailbox.take(number[0])) is not None:
        if not isinstance(lease, Withdrawn):
            with _last_words(mailbox, number[0], rank):
                first: Lease = lease.first
                if base is None or base.info.revision != first.base_revision:
                    base = ResidentBase.load(first.base_model, first.base_revision, device)
                if listener:
                    listener.begin(number[0])
                gang = _Rank(mailbox, number[0], rank, world, base, listener)
                gang.train(lease)
            dist.barrier()  # no rank is in the next run while another still uses this one's groups
        number[0] += 1


def _reclaimed() -> bool:
    """Whether Ray was told that a node of this gang is taken away (a spot instance, a drained Kubernetes node).

    Read where Ray puts it: the public `get_preemption_info` is a barrier of all workers, too dear for every step.
    """
    return get_train_context().preemption_context.preemption_info is not None


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
    except Left:
        raise
    except Exception as error:
        line, *_ = [*str(error).strip().splitlines(), "no message"]
        text = f"worker {rank}: {type(error).__name__}: {line}"
        kind = MEMORY if _is_out_of_memory(error) else ""
        mailbox.report(number, rank, "note", {"text": text, "died": True, "kind": kind})
        raise


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch's allocator for the CPU has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@dataclass(frozen=True)
class _Rank:
    """This worker with the lease it took."""

    mailbox: MailboxClient
    number: int
    rank: int
    world: int
    base: Any
    listener: Listener | None

    def train(self, lease: Any) -> None:
        """Train a lease; an error that every rank raises ends the run and not the gang.

        Raises:
            Left: It was left with a checkpoint.
        """
        if isinstance(lease, Bank):
            self._bank(lease)
        elif isinstance(lease, Calibrate):
            self._calibrate(lease)
        elif isinstance(lease, Draw):
            self._draw(lease)
        else:
            self._one(lease)

    def _report(self, slot: int, kind: str, payload: Any) -> None:
        if self.rank == 0:
            self.mailbox.report(self.number, self.rank, kind, payload, slot)

    def _one(self, lease: Lease) -> None:
        from training.loop import train_run

        saved = 0

        def report(kind: str, payload: Any) -> None:
            nonlocal saved
            saved = payload["step"] if kind == "checkpoint" else saved
            self._report(0, kind, payload)

        wish = self.listener.of_one if self.listener else no_wish
        try:
            metrics = train_run(lease, self.base, self.rank, self.world, report, wish)
        except RayboothError as error:
            self._report(0, "failed", failure(error))
        except Dropped as dropped:
            self._report(0, "dropped", {"step": dropped.step})
        else:
            if metrics is None:
                self._report(0, "left", {"step": saved})
                raise Left(f"saved at step {saved}")
            self._report(0, "published", {"metrics": metrics})

    def _bank(self, bank: Bank) -> None:
        from training.bank_run import train_bank

        listener = self.listener
        assert listener  # one worker trains a bank
        try:
            done = train_bank(bank.slots, self.base, self._report, listener, listener.dropped)
        except RayboothError as error:
            for slot, lease in enumerate(bank.slots):
                if lease:
                    self._report(slot, "failed", failure(error))
            return
        if not done:
            raise Left("the runs of the bank are saved")

    def _calibrate(self, asked: Calibrate) -> None:
        from training.calibrate import choose_width

        try:
            found = choose_width(asked.first, self.base, asked.room)
        except RayboothError as error:
            self._report(0, "failed", failure(error))
        else:
            self._report(0, "published", {"metrics": asdict(found)})

    def _draw(self, asked: Draw) -> None:
        from training.draw import draw_grid

        if self.rank:
            return
        try:
            models = self.base.fresh(share=True)
            draw_grid(asked, self.base.info, models, lambda steps: self._report(0, "drawn", {"steps": steps}))
        except RayboothError as error:
            self._report(0, "failed", failure(error))
        else:
            self._report(0, "published", {"metrics": {}})
