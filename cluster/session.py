"""This file is where Ray is started or joined, and asked what it has."""

import importlib
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import services, worker
from ray.exceptions import RayError

from cluster.errors import SystemFailure, UserError
from cluster.storage import Storage

OBJECT_STORE_BYTES = 512 * 1024**2  # of a private Ray: latents and photos are small, /dev/shm often is too
CONNECT_S = 10  # to a cluster's head
START_S = 120  # for Ray's own processes; Ray itself gives up after 30 s, which a busy machine may need
LONGEST_TEMPORARY = 40  # characters: a socket's path ends at 107, and Ray appends about 60 of its own

# What every process of a session sees, drivers and workers alike, unless the user has set it.
_EVERYWHERE = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads do not survive a fork
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how late the end of a gang is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # for room that Ray still counts on a node that is gone
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # a spot instance has 30 s, a pod often as much
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",  # it polls the dashboard that is not started
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # people look at ours
    "RAY_DATA_USAGE_DISABLED": "1",  # a process of its own, to tell Ray's makers what streams are used for
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's core writes warnings of its own plumbing to the terminal
    # A machine that is busy elsewhere takes minutes to start a process; Ray would give up after 30 to 60 s.
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_gcs_server_port_wait_time_s": "120",
}
# Of a private Ray, which nobody drains and nobody watches: each of these is a process or work for one.
_PRIVATE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_METRICS_ENABLED": "0"}
# Where there is no GPU: DeepSpeed would compile kernels nobody calls (91 s), and imports inductor (2-3 s).
_WITHOUT_GPU = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
# Passed on to workers when the driver has them.
_INHERITED = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "RAYBOOTH_STORAGE")


@contextmanager
def session(address: str | None, cpus: int, storage: Storage) -> Iterator[None]:
    """Ray for the time of a `with`.

    Args:
        address: The cluster to join (see `resolve_address`). A private Ray runs on this machine and ends with the
            `with`. Whatever else runs here is never joined.
        cpus: Logical CPUs of a private Ray: workers + encoders + 1. Actors wait for a logical CPU, so there must be
            enough of them, whatever the machine has.
        storage: The storage root, which every node must reach.

    Raises:
        UserError: The cluster cannot be reached, or has several nodes that do not share the storage root.
        SystemFailure: Ray does not start.
    """
    if ray.is_initialized():  # in an actor of the cluster
        yield
        return
    address = resolve_address(address)
    for name, value in _EVERYWHERE.items():
        os.environ.setdefault(name, value)
    worker.print_to_stdstream = _tell_people
    common = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _joined(address, common) if address else _private(cpus, common):
        _check_shared(storage)
        yield


class _Detached:
    """An actor that calls a function and ends itself; begun again by Ray should its node be lost."""

    def __init__(self, target: str, arguments: Sequence[Any]) -> None:
        self._target, self._arguments = target, arguments
        self._handle = ray.get_runtime_context().current_actor
        threading.Thread(target=self._run, name="detached", daemon=True).start()

    def ready(self) -> None:
        """Answers once the actor is there."""

    def _run(self) -> None:
        module, _, function = self._target.partition(":")
        try:
            getattr(importlib.import_module(module), function)(*self._arguments)
        except Exception:
            logging.getLogger("raybooth").exception("%s ended", self._target)
        finally:
            ray.kill(self._handle, no_restart=True)


def run_detached(address: str, name: str, target: str, arguments: Sequence[Any], storage: Storage) -> None:
    """Have a function called by an actor of a cluster that outlives this process.

    Args:
        address: The cluster.
        name: Of the actor.
        target: `module:function`.
        arguments: What it is called with.
        storage: The storage root, which every node must reach.

    Raises:
        UserError: The cluster cannot be used, or an actor of that name lives.
    """
    with session(address, 0, storage):
        options = {
            "name": name,
            "namespace": "raybooth",
            "lifetime": "detached",
            "num_cpus": 0,
            "max_restarts": -1,
        }
        try:
            actor = ray.remote(_Detached).options(**options).remote(target, list(arguments))
            ray.get(actor.ready.remote())
        except ValueError as error:
            raise UserError(f"{name} runs on the cluster already", str(error).splitlines()[0]) from error
        except RayError as error:
            seen = str(error).splitlines()[0]
            raise SystemFailure(
                f"{name} does not start on the cluster", seen, "see Ray's logs there"
            ) from error


def resolve_address(address: str | None) -> str | None:
    """The cluster to join: `address`, or else RAY_ADDRESS. `None` is a private Ray, and so is the word `local`."""
    wanted = address or os.environ.get("RAY_ADDRESS")
    return None if wanted in (None, "", "local") else wanted


@contextmanager
def _joined(address: str, common: Mapping[str, Any]) -> Iterator[None]:
    """A cluster that runs already."""
    try:
        _check_reachable(address)
        ray.init(address=address, runtime_env={"env_vars": _environment()}, **common)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at {address} cannot be joined",
            str(error).splitlines()[0],
            "check --address, or leave it and RAY_ADDRESS out to use this machine",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _private(cpus: int, common: Mapping[str, Any]) -> Iterator[None]:
    """A Ray of our own on this machine."""
    # Other users of this machine must not run code in it; the secret ends with this process. Ray turns token mode
    # on for a local cluster by itself; set here, it would come too late, because Ray reads the mode when it is
    # imported.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Its processes inherit ours. As a runtime environment of the job, Ray would start every worker for it anew.
    with _environ(_PRIVATE if sees_gpu() else _PRIVATE | _WITHOUT_GPU), _temporary_folder() as folder:
        try:
            with _nothing_on_stderr(), _few_processes(), _patience():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(folder),
                    **common,
                )
        except Exception as error:  # Ray raises that very class when its processes do not come up
            raise SystemFailure(
                "Ray does not start on this machine", str(error), "run `raybooth doctor`"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _environ(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables, where they are not set, for the time of a `with`: no cluster joined later sees them."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _few_processes() -> Iterator[None]:
    """Have Ray start without those of its processes that a private one has no use for.

    They are what follows logs for drivers that show them, what asks a cloud for nodes, and the modules of a dashboard
    that is not shown: 5 CPU seconds. Ray has no setting for it; the version that we pin has these two places.
    """
    parameters, dependencies = (
        ray._private.parameter.RayParams,
        ray._private.utils.get_dashboard_dependency_error,
    )
    ray._private.parameter.RayParams = partial(parameters, include_log_monitor=False, no_monitor=True)
    ray._private.utils.get_dashboard_dependency_error = lambda: ImportError("not wanted")
    try:
        yield
    finally:
        ray._private.parameter.RayParams = parameters
        ray._private.utils.get_dashboard_dependency_error = dependencies


def is_private() -> bool:
    """Whether the Ray of this process is one that it has started: all of it ends with this process."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def _check_reachable(address: str) -> None:
    """Ask for a connection first: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S):
            pass


def cpu_count() -> int:
    """Logical CPUs of the cluster."""
    return int(ray.cluster_resources().get("CPU", 0))


def gpu_count() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def free_resources() -> str:
    """What of the cluster is free, for people: `3 of 8 CPUs, 0 of 1 GPUs`."""
    there, free = ray.cluster_resources(), ray.available_resources()
    kinds = [kind for kind in ("CPU", "GPU") if there.get(kind)]
    return ", ".join(f"{free.get(kind, 0):g} of {there[kind]:g} {kind}s" for kind in kinds)


def node_count() -> int:
    """Nodes of the cluster that are alive."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def check_fits(workers: int, cpus_per_worker: int, gpus_per_worker: float, fixed: bool) -> None:
    """Refuse workers that would wait forever. Call it in a session.

    Args:
        workers: How many.
        cpus_per_worker: Logical CPUs of each.
        gpus_per_worker: GPUs of each.
        fixed: The cluster does not grow, as a private Ray; one that may grow is trusted to.

    Raises:
        UserError: The whole cluster is smaller than the workers together.
    """
    demands = (
        ("GPU", "gpus_per_worker", gpus_per_worker, gpu_count()),
        ("CPU", "cpus_per_worker", cpus_per_worker, cpu_count()),
    )
    for unit, setting, each, there in demands:
        if fixed and workers * each > there:
            raise UserError(
                f"the run needs {workers * each:g} {unit}s",
                f"{workers} workers with {each:g} each, and the cluster has {there}",
                f"lower cluster.workers or cluster.{setting}",
            )


def _check_shared(storage: Storage) -> None:
    if storage.is_local and node_count() > 1:
        raise UserError(
            f"the nodes of the cluster do not share the storage root {storage.uri}",
            f"the cluster has {node_count()} nodes, and the root is a folder of one",
            "name an object store with --storage s3://BUCKET/PREFIX",
        )


def _environment() -> dict[str, str]:
    """Environment variables of every worker of a cluster that was joined."""
    names = {*_EVERYWHERE, *_INHERITED}
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def sees_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU and CUDA_VISIBLE_DEVICES does not hide it, without importing torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and Path("/dev/nvidiactl").exists()


def _tell_people(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Ray's core has its warnings printed on stdout, which is for programs."""
    _print_to_stdstream({**data, "is_err": True}, ignore_prefix)


_print_to_stdstream = worker.print_to_stdstream


@contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """Ray's core announces its log level on the terminal; what goes wrong in here is raised, not written."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _patience() -> Iterator[None]:
    """Wait for a node that starts, where Ray would ask in a loop for 30 s."""
    get_node = services.get_node

    def patiently(*wanted: Any) -> Any:
        until = time.monotonic() + START_S
        while True:
            try:
                return get_node(*wanted)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.05)

    services.get_node = patiently
    try:
        yield
    finally:
        services.get_node = get_node


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for Ray's sockets and logs, with a short path; kept, for its logs, after a `SystemFailure`."""
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="rb-", dir=parent if len(parent) <= LONGEST_TEMPORARY else "/tmp"))
    kept = False
    try:
        yield folder
    except SystemFailure as error:
        kept = True
        error.do = "; ".join(part for part in (error.do, f"Ray's logs are in {folder}") if part)
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
