"""A private Ray, and what is refused."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import ray
from ray._private import worker

from cluster.errors import SystemFailure, UserError
from cluster.machine import sees_gpu
from cluster.mailbox import connect, create, fetch, put
from cluster.private import lodging
from cluster.session import (
    _EVERYWHERE,
    check_fits,
    cpu_count,
    gpu_count,
    hush,
    node_count,
    resolve_address,
    session,
)
from cluster.storage import Storage


@pytest.mark.slow
def test_a_private_ray_has_the_cpus_that_were_asked_for_and_carries_letters(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    threads: list[threading.Thread] = []

    def lodge() -> None:
        with lodging() as ending:
            ending.wait()

    with session(None, 5, storage):
        threads.append(threading.Thread(target=lodge, daemon=True))
        threads[0].start()
        capsys.readouterr()
        worker.print_to_stdstream({"lines": ["out of memory"], "pid": "raylet", "is_err": False}, False)
        said = capsys.readouterr()
        assert "out of memory" in said.err and not said.out
        hush()
        worker.print_to_stdstream({"lines": ["a task failed"], "pid": "raylet", "is_err": True}, False)
        assert not capsys.readouterr().err
        assert (cpu_count(), gpu_count() >= 0, node_count()) == (5, True, 1)
        seen = ray.get(ray.remote(lambda: dict(os.environ)).remote())
        assert seen["TOKENIZERS_PARALLELISM"] == "false" and seen["OMP_NUM_THREADS"] == "1"
        box = create("campaign-1")
        assert box.post({"latents": [put("latent rows")]}) == 0
        gang = connect("campaign-1")
        lease = gang.take(gang.resume())
        assert lease is not None and fetch(lease["latents"]) == ["latent rows"]
        for step in range(100):
            gang.report(0, 0, "steps", [{"step": step}])
        gang.report(0, 0, "published", {"version": "v1"})
        assert [e.payload.get("step", "end") for e in box.drain() if e.lease == 0] == [*range(100), "end"]
        box.stop()
        assert gang.take(1) is None
        box.close()
        check_fits(5, 1, 0.0, fixed=True)
        with pytest.raises(UserError, match=r"needs 6 CPUs.*has 5.*cluster\.cpus_per_worker"):
            check_fits(2, 3, 0.0, fixed=True)
        gpus = gpu_count()
        with pytest.raises(UserError, match=rf"needs {gpus + 1} GPUs.*cluster\.gpus_per_worker"):
            check_fits(gpus + 1, 1, 1.0, fixed=True)
        check_fits(gpus + 1, 1, 1.0, fixed=False)  # it may grow
    assert not ray.is_initialized() and not threads[0].is_alive()
    with lodging() as ending:
        assert not ending.is_set()  # the next Ray's


def test_a_cluster_that_is_not_there_is_a_clear_mistake(storage: Storage) -> None:
    with pytest.raises(UserError, match="cannot be joined"), session("127.0.0.1:1", 1, storage):
        pass


def test_a_cluster_that_does_not_know_our_token_is_a_clear_mistake_at_once(storage: Storage) -> None:
    join = (
        "import sys; from cluster.session import session; from cluster.storage import Storage\n"
        "with session(sys.argv[1], 1, Storage(sys.argv[2])): pass"
    )
    with session(None, 1, storage):
        said = subprocess.run(
            [sys.executable, "-c", join, ray.get_runtime_context().gcs_address, storage.uri],
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
            timeout=60,
            capture_output=True,
            text=True,
        ).stderr
    assert "does not know our token" in said


def test_the_cluster_to_join_is_the_argument_then_the_environment_and_local_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert [resolve_address(given) for given in (None, "", "local", "head:6379")] == [
        *[None] * 3,
        "head:6379",
    ]
    monkeypatch.setenv("RAY_ADDRESS", "ray://other:10001")
    assert [resolve_address(given) for given in (None, "local", "h:1")] == ["ray://other:10001", None, "h:1"]


def test_a_gpu_that_is_hidden_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not sees_gpu()


@pytest.mark.slow
def test_a_private_ray_leaves_its_folder_only_after_a_failure_and_then_says_where(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        monkeypatch.setattr(tempfile, "tempdir", parent)
        with pytest.raises(KeyboardInterrupt), session("local", 1, storage):
            raise KeyboardInterrupt
        assert list(Path(parent).glob("rb-*")) == []
        with pytest.raises(SystemFailure) as caught, session("local", 1, storage):
            raise SystemFailure("a disk is full", "", "make room")
        [kept] = Path(parent).glob("rb-*")
        assert caught.value.do == f"make room; Ray's logs are in {kept}"


@pytest.mark.slow
def test_what_a_private_ray_is_started_with_is_not_left_for_a_cluster_that_is_joined_later(
    storage: Storage,
) -> None:
    before = dict(os.environ)
    with session(None, 1, storage):
        assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
    assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in os.environ
    assert set(os.environ) - set(before) <= {*_EVERYWHERE, "RAY_AUTH_TOKEN"}
