"""This file is where Ray's own helpers live in the driver of a private Ray, in place of a process each.

Ray Data and Ray Train keep what they coordinate, count and control in actors, so that it may be anywhere in a cluster.
A private Ray is one machine with one driver: each of them is a Python that starts, imports Ray and hears hardly a call,
1 to 4 CPU seconds of a run. The version of Ray that we pin has these places where they are made; where a Ray was joined
they are made as ever.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import ray
from ray._private import worker
from ray.data._internal import stats
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data._internal.utils import cached_ray_internals
from ray.runtime_context import RuntimeContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client
from ray.train.v2._internal.execution.worker_group import state, worker_group

from cluster.errors import SystemFailure
from cluster.private import lodging
from cluster.session import is_private


class InProcess:
    """An object of this process that is called as an actor is: `thing.method.remote(...)` answers with a reference.

    What it has no method for does nothing. Its handle may travel to other processes, where no call does anything.

    Args:
        target: The object; `None` has no method.
    """

    def __init__(self, target: Any = None) -> None:
        self._target = target

    def __getattr__(self, name: str) -> "_Method":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Method(getattr(self._target, name, _nothing))

    def __reduce__(self) -> tuple[type["InProcess"], tuple[()]]:
        return InProcess, ()


class _Method:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return ray.put(self._function(*arguments, **named))


def _nothing(*arguments: Any, **named: Any) -> None:
    return None


class _Statistics:
    """Of Ray Data's figures, which go to a dashboard, only the names of datasets are needed."""

    def gen_dataset_id(self) -> str:
        return uuid4().hex


class _Locations:
    """Every actor is on the one node."""

    def get_actor_locations(self, actors: Sequence[str]) -> Mapping[str, str]:
        return dict.fromkeys(actors, ray.get_runtime_context().get_node_id())


class _Coordinator(default_autoscaling_coordinator._AutoscalingCoordinatorActor):  # type: ignore[misc]
    """Who may use which part of the machine. Its thread, which would look for new nodes, sleeps: there will be none."""

    TICK_INTERVAL_S = 1e8


class _NobodyWaits:
    """In place of Ray Train's barrier for reports and checkpoints, which our gangs do not make by it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def options(self, **settings: Any) -> Any:
        return self if is_private() else self._actor.options(**settings)

    def remote(self, **settings: Any) -> InProcess:
        return InProcess()


_making = threading.RLock()  # threads of a driver stream and control at the same time
_houses: WeakKeyDictionary[Any, dict[type, InProcess]] = WeakKeyDictionary()  # by private Ray


def _housed(kind: type) -> InProcess:
    """The one helper of a kind that the private Ray of this process has."""
    with _making:
        house = _houses.setdefault(worker._global_node, {})
        if kind not in house:
            house[kind] = InProcess(kind())
        return house[kind]


def keep_house() -> None:
    """From here on Ray's helpers live in this process while its Ray is private."""
    with _making:
        _move_in()


@cache
def _move_in() -> None:
    for modules, name, kind in (
        ((stats,), "get_or_create_stats_actor", _Statistics),
        (
            (actor_pool_map_operator, cached_ray_internals),
            "get_or_create_actor_location_tracker",
            _Locations,
        ),
        (
            (default_autoscaling_coordinator, autoscaling_coordinator_client),
            "get_or_create_autoscaling_coordinator",
            _Coordinator,
        ),
    ):
        for module in modules:
            setattr(module, name, _here_or_there(kind, getattr(module, name)))
    worker_group.SynchronizationActor = _NobodyWaits(worker_group.SynchronizationActor)
    end, state._shutdown_sync_actor = (
        state._shutdown_sync_actor,
        lambda actor: None if isinstance(actor, InProcess) else end(actor),
    )
    current = RuntimeContext.current_actor.fget
    # workers are told of the actor that controls them, to ask it for checkpoints, which ours do not
    RuntimeContext.current_actor = property(lambda self: None if is_private() else current(self))


def _here_or_there(kind: type, there: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: _housed(kind) if is_private() else there()


def control(**settings: Any) -> Any:
    """Control a group of Ray Train's workers in this thread, until they are done or the private Ray ends.

    Args:
        settings: What a `TrainController` takes.

    Returns:
        Ray Train's result, with the error of workers that failed for good.

    Raises:
        SystemFailure: Ray ends before they do.
    """
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what a worker dies of is ours to tell
    with lodging() as ending:
        controller = TrainController(**settings)
        asyncio.run(_controlled(controller, ending.is_set))
    if not controller.get_state().is_terminal():
        raise SystemFailure("the workers end with their Ray")
    return controller.get_result()


async def _controlled(controller: Any, ending: Callable[[], bool]) -> None:
    while not (controller.get_state().is_terminal() or ending()):
        await controller._run_control_loop_iteration()
