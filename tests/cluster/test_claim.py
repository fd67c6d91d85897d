"""A lock in an object store: one holder at a time, and the claim of a process that is gone ends."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cluster.claim import claimed
from cluster.errors import SystemFailure, UserError
from cluster.storage import Storage

TTL_S = 2.0
LIVING_S = 6.0  # a holder that lives must be heard of as often, however busy the machine is
HOLD = """
import sys
import cluster.claim
from cluster.storage import Storage
if "elsewhere" in sys.argv:
    here = cluster.claim.this_process()
    cluster.claim.this_process = lambda: {**here, "host": "elsewhere"}
with Storage(sys.argv[1]).lock("locks/x", ttl_s=float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""
COUNT = """
import sys, time
from cluster.storage import Storage
storage = Storage(sys.argv[1])
for _ in range(int(sys.argv[3])):
    with storage.lock("locks/x", ttl_s=float(sys.argv[2])):
        count = int(storage.read("count"))
        time.sleep(0.02)
        storage.write("count", str(count + 1).encode())
"""


@contextmanager
def holder(uri: str, *words: str, ttl_s: float = TTL_S) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock until it is told to let go."""
    command = [sys.executable, "-c", HOLD, uri, str(ttl_s), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def remote(bucket: str) -> Storage:
    return Storage(f"{bucket}/root")


@pytest.mark.slow
@pytest.mark.faults
def test_processes_that_contend_hold_it_one_at_a_time(remote: Storage) -> None:
    remote.write("count", b"0")
    command = [sys.executable, "-c", COUNT, remote.uri, "30", "4"]
    others = [subprocess.Popen(command) for _ in range(3)]
    assert [other.wait() for other in others] == [0, 0, 0]
    assert remote.read("count") == b"12"
    assert remote.names("locks/x") == []


def test_threads_that_contend_hold_it_one_at_a_time(storage: Storage) -> None:
    storage.write("count", b"0")

    def count() -> None:
        for _ in range(5):
            with claimed(storage, "locks/x", ttl_s=30):
                before = int(storage.read("count"))
                time.sleep(0.001)
                storage.write("count", str(before + 1).encode())

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(count) for _ in range(4)]:
            future.result()
    assert storage.read("count") == b"20"


@pytest.mark.faults
def test_a_holder_killed_on_another_machine_is_followed_after_its_time(remote: Storage) -> None:
    waited: list[float] = []
    with holder(remote.uri, "elsewhere") as process:
        with remote.lock("locks/y", ttl_s=TTL_S):  # another lock is free
            pass
        process.kill()
        process.wait()
        began = time.monotonic()
        with remote.lock("locks/x", lambda: waited.append(time.monotonic()), TTL_S):
            assert time.monotonic() - began >= TTL_S
        assert len(waited) == 1
    assert remote.names("locks/x") == []


@pytest.mark.faults
def test_a_holder_killed_on_this_machine_is_followed_at_once(remote: Storage) -> None:
    with holder(remote.uri) as process:
        process.kill()
        process.wait()
        with remote.lock("locks/x", on_wait=pytest.fail):
            pass


def test_a_holder_that_lives_is_waited_for_beyond_the_time_of_a_dead_one(remote: Storage) -> None:
    refusal = UserError("it is taken")
    with holder(remote.uri, "elsewhere", ttl_s=LIVING_S) as process:
        with pytest.raises(UserError) as caught, remote.lock_or_refuse("locks/x", refusal, LIVING_S):
            pass
        assert caught.value is refusal
        assert len(remote.names("locks/x")) == 1  # who is refused leaves nothing
        time.sleep(LIVING_S)
        assert process.stdin is not None

        def end() -> None:
            process.stdin.close()

        with remote.lock("locks/x", on_wait=end, ttl_s=LIVING_S):
            assert process.wait() == 0


def test_who_could_not_renew_for_too_long_is_told_so(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, data: bytes) -> None:
        raise OSError("the network is gone")

    done = False
    with pytest.raises(SystemFailure, match="was lost"), claimed(storage, "locks/x", ttl_s=0.3):
        monkeypatch.setattr(storage, "write", fail)
        time.sleep(0.4)
        done = True
    assert done


def test_what_is_no_claim_is_one_until_its_time_is_over(storage: Storage) -> None:
    for name, left in {"a": b"", "b": b"[]", "c": b"{}", "d": b'{"count": 1}'}.items():
        storage.write(f"locks/x/{name}", left)
    began = time.monotonic()
    with claimed(storage, "locks/x", ttl_s=TTL_S):
        assert time.monotonic() - began >= TTL_S
    assert storage.names("locks/x") == []


def test_a_claim_that_is_old_by_the_clock_of_the_store_is_followed_at_once(storage: Storage) -> None:
    storage.write("locks/x/old", b'{"count": 1}')
    an_hour_ago = time.time() - 3600
    os.utime(storage.full("locks/x/old"), (an_hour_ago, an_hour_ago))
    with claimed(storage, "locks/x", on_wait=pytest.fail):
        assert len(storage.names("locks/x")) == 1


def test_an_error_inside_lets_go_and_goes_on_up(storage: Storage) -> None:
    def act(kind: Callable[[], Exception]) -> None:
        with claimed(storage, "locks/x"):
            raise kind()

    for kind in (ValueError, KeyError):
        with pytest.raises(kind):
            act(kind)
    assert storage.names("locks/x") == []
