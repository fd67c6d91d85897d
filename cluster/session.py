"""This file is where Ray is started or joined, and asked what it has."""

import importlib
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import auto_init_hook, worker
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RayError

from cluster.errors import SystemFailure, UserError
from cluster.private import private_ray
from cluster.storage import Storage

CONNECT_S = 10  # to a cluster's head

# A call of Ray's outside a session fails: a thread that has not heard of its end would have Ray start anew, for nobody.
auto_init_hook.enable_auto_connect = False

# What every process of a session sees, drivers and workers alike, unless the user has set it.
_EVERYWHERE = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads do not survive a fork
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how late the end of a gang is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # for room that Ray still counts on a node that is gone
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # a spot instance has 30 s, a pod often as much
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",  # it polls the dashboard that is not started
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # people look at ours
    "RAY_DATA_USAGE_DISABLED": "1",  # a process of its own, to tell Ray's makers what streams are used for
    # What a served request costs beside its image: proxies call by gRPC, small bodies go beside their heads, and an
    # ingress or a replica works in the loop that it is called from.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.bodies:middlewares",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's core writes warnings of its own plumbing to the terminal
    # A machine that is busy elsewhere takes minutes to start a process; Ray would give up after 30 to 60 s.
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_gcs_server_port_wait_time_s": "120",
}
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
    with _joined(address, common) if address else private_ray(cpus, common):
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
    except AuthenticationError as error:
        raise UserError(
            f"the Ray cluster at {address} does not know our token",
            "RAY_AUTH_TOKEN is set" if os.environ.get("RAY_AUTH_TOKEN") else "RAY_AUTH_TOKEN is not set",
            "set RAY_AUTH_MODE=token and the cluster's own RAY_AUTH_TOKEN",
        ) from error
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


def is_private() -> bool:
    """Whether the Ray of this process is one that it has started: all of it ends with this process."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def _check_reachable(address: str) -> None:
    """Ask for a connection first, and show the token: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S):
            pass
        if "://" not in address:
            GcsClient(address)


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


def _tell_people(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Ray's core has its warnings printed on stdout, which is for programs."""
    _print_to_stdstream({**data, "is_err": True}, ignore_prefix)


def hush() -> None:
    """Show nothing more of what Ray's core says in this session: it tells of what ends on purpose as of a loss."""
    worker.print_to_stdstream = lambda data, ignore_prefix: None


_print_to_stdstream = worker.print_to_stdstream
