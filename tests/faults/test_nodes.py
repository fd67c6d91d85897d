"""An elastic gang on a cluster whose nodes come, are taken away with notice, and die without."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from safetensors.numpy import load_file

import training.gang
from cluster.leaving import announce
from cluster.mailbox import Event
from cluster.private import WITHOUT_GPU
from cluster.session import _EVERYWHERE
from cluster.storage import Storage
from training.artifact import open_artifact
from training.gang import GangShape
from training.lease import Lease

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1800)]
STEPS = 300


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A cluster of two nodes with a CPU each."""
    # nodes that die are missed after 2 s; Ray's default is 15 s
    config = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    environment = {**_EVERYWHERE, **WITHOUT_GPU}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(training.gang, "RESIZE_EVERY_S", 2.0)
        head = {"num_cpus": 1, "_system_config": config, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(
            cluster.address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": environment},
        )
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        count_nodes()  # a gang that starts before would start with one worker
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def count_nodes() -> None:
    """Have Ray count its nodes now, which it does every 20 s."""
    coordinator = get_or_create_autoscaling_coordinator()
    ray.get(coordinator.get_reserved_resources.remote("test", recompute=True))


def reclaim(cluster: Cluster, node: Any, deadline_s: float) -> None:
    """Announce that a node is taken away, as the preStop hook of a worker pod does."""
    assert announce(cluster.address, node.node_id, deadline_s)


def tensors(storage: Storage, name: str) -> dict[str, Any]:
    with open_artifact(storage, name, "v1") as artifact:
        files = sorted(artifact.folder.rglob("*.safetensors"))
        return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def test_a_gang_goes_on_with_the_nodes_there_are_and_to_the_losses_of_one_worker(
    nodes: Cluster,
    make_lease: Callable[..., Lease],
    tmp_path: Path,
    tell: Any,
    make_gang: Any,
) -> None:
    storage = Storage(str(tmp_path / "root"))
    second = next(iter(nodes.worker_nodes))
    todo = ["reclaim", "die"]

    def act(event: Event, story: Any) -> None:
        nonlocal second
        workers = story.of("started", "workers")
        if event.kind == "checkpoint" and workers == [2] and todo == ["reclaim", "die"]:
            todo.remove("reclaim")
            reclaim(nodes, second, deadline_s=60)  # what watches for notices may still be starting
        elif event.kind == "left" and workers == [2]:
            nodes.remove_node(second, allow_graceful=False)
        elif event.kind == "checkpoint" and workers == [2, 1] and len(nodes.worker_nodes) == 0:
            second = nodes.add_node(num_cpus=1)
            count_nodes()
        elif event.kind == "checkpoint" and workers == [2, 1, 2] and todo == ["die"]:
            todo.remove("die")
            os.kill(second.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    lease = make_lease("hurt", storage.uri, checkpoint={"every": 5}, train={"steps": STEPS, "method": "lora"})
    gang = make_gang(GangShape(workers=2, min_workers=1), tmp_path)
    story = gang.train(lease, act)
    assert story.of("started", "workers")[0] == 2
    kinds = [e.kind for _, e in story.events if e.kind not in ("step", "checkpoint", "note")]
    assert kinds == ["started", "left", "started", "left", "started", "started", "published"]
    assert story.of("started", "workers") == [2, 1, 2, 1]
    left, started = story.of("left", "step"), story.of("started", "from_step")
    assert started[1:3] == left  # neither the notice nor the larger gang costs a step

    calm = gang.train(make_lease("calm", storage.uri, train={"steps": STEPS, "method": "lora"}))
    gang.close()
    alone = {row["step"]: row["loss_subject"] for row in calm.of("step")}
    for row in story.of("step"):
        assert row["loss_subject"] == pytest.approx(alone[row["step"]], abs=1e-5)
    for name, value in tensors(storage, "hurt").items():
        np.testing.assert_allclose(value, tensors(storage, "calm")[name], atol=1e-4)
    noticed, grown, lost = story.pauses
    assert max(story.pauses) < gang.restarts_within()
    tell("node taken away with notice", "losses to 1e-5", 0, noticed)
    tell("node added: one more worker", "losses to 1e-5", 0, grown)
    tell("node killed", "losses to 1e-5", story.twice, lost)
