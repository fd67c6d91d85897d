"""Gangs that are killed, starved and fed badly go on to the weights of one that was left alone, or say why not."""

import os
import random
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

import cluster.remote
from cluster.errors import SystemFailure, UserError, failure_of
from cluster.mailbox import MEMORY, Event
from cluster.objects import StorageError
from cluster.session import session
from cluster.storage import Storage
from training import checkpoint
from training.dataplan import DataPlan, Role
from training.gang import GangShape
from training.lease import Lease

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1800)]
Weights = dict[str, str]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tmp_path_factory.mktemp("root")))


@pytest.fixture(scope="module")
def gang(storage: Storage, s3: "FlakyS3", make_gang: Any) -> Iterator[Any]:
    """Two workers for all tests of this file."""
    with session(None, 4, storage):
        gang = make_gang(GangShape(workers=2))
        yield gang
        gang.close()


@pytest.fixture(scope="module")
def calm(gang: Any, make_lease: Callable[..., Lease], storage: Storage, weights: Any) -> Weights:
    """The weights of a run that nothing happens to."""
    gang.train(make_lease("calm", storage.uri))
    return dict(weights(storage, "calm"))


# -- workers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victims", ["one worker", "all workers"])
def test_workers_that_are_killed_go_on_from_the_checkpoint_to_the_same_weights(
    gang: Any,
    calm: Weights,
    make_lease: Callable[..., Lease],
    storage: Storage,
    weights: Any,
    workers: Any,
    tell: Any,
    victims: str,
) -> None:
    hit: list[int] = []

    def act(event: Event, story: Any) -> None:
        if not hit and event.kind == "step" and event.payload["step"] > 10:
            hit.extend(workers())
            assert len(hit) == 2
            for pid in hit[:1] if victims == "one worker" else hit:
                os.kill(pid, signal.SIGKILL)

    name = victims.replace(" ", "-")
    story = gang.train(make_lease(name, storage.uri), act)
    assert story.of("started", "from_step")[0] == 0
    assert story.of("started", "from_step")[1] >= 10
    assert weights(storage, name) == calm
    assert story.pauses[0] < gang.restarts_within()
    tell(f"kill -9 of {victims}", "equal", story.twice, *story.pauses)


def test_a_loss_that_is_no_number_ends_the_run_with_its_step_and_images_and_keeps_the_checkpoint(
    gang: Any, calm: Weights, make_lease: Callable[..., Lease], storage: Storage, tell: Any
) -> None:
    plan = DataPlan(0, 3, 40, 2, 1000, 1.0)
    first: dict[int, int] = {}
    for step in range(20):
        for row in plan.rows(step, 0, 1):
            if row.role is Role.CLASS:
                first.setdefault(row.table_row, step + 1)
    spoilt, step = next((row, step) for row, step in first.items() if 12 <= step <= 18)
    story = gang.train(make_lease("nan", storage.uri, class_rows=40, spoilt=spoilt))
    [failed] = story.of("failed")
    error = failure_of(failed)
    assert isinstance(error, UserError)
    assert f"step {step}" in error.what and f"class image {spoilt}" in error.seen and error.do
    assert checkpoint.steps_saved(storage, "runs/nan/v1") == [10]
    assert len(story.of("started")) == 1  # the gang lives on
    tell("a loss that is no number", "none: failed, with step and images")


def test_a_worker_that_runs_out_of_memory_fails_the_run_as_such_and_the_gang_lives_on(
    gang: Any, calm: Weights, make_lease: Callable[..., Lease], storage: Storage, weights: Any, tell: Any
) -> None:
    def act(event: Event, story: Any) -> None:
        if event.kind == "started" and len(story.of("started")) == 1:
            pid = event.payload["pid"]
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            most = pages * os.sysconf("SC_PAGE_SIZE") + 256_000_000
            resource.prlimit(pid, resource.RLIMIT_AS, (most, most))

    story = gang.train(make_lease("greedy", storage.uri, train={"pairs_per_step": 4096}), act)
    [failed] = story.of("failed")
    assert failed["kind"] == MEMORY
    error = failure_of(failed)
    assert "allocate memory" in error.seen and "train.pairs_per_step" in error.do
    gang.train(make_lease("modest", storage.uri))
    assert weights(storage, "modest") == calm
    tell("a worker without memory", "none: failed, as such")


# -- disks -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = ["-o", "size=64m"]
    mounted = subprocess.run(["mount", "-t", "tmpfs", *size, "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount the small file system that this test fills")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave 2 MB: room for notes, and for no weights."""
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 2_000_000))


def half_written(disk: Path) -> list[Path]:
    return list(disk.rglob(".tmp-*"))


def test_a_disk_that_fills_up_costs_a_checkpoint_and_not_the_run(
    gang: Any,
    calm: Weights,
    make_lease: Callable[..., Lease],
    small_disk: Path,
    weights: Any,
    workers: Any,
    tell: Any,
) -> None:
    def act(event: Event, story: Any) -> None:
        if event.kind == "checkpoint" and event.payload["step"] == 10:
            fill(small_disk)
        elif event.kind == "note" and "No space left" in event.payload["text"]:
            assert half_written(small_disk) == []
            (small_disk / "ballast").unlink(missing_ok=True)

    story = gang.train(make_lease("full", str(small_disk)), act)
    assert len(story.of("published")) == len(story.of("started")) == 1
    assert 20 not in story.of("checkpoint", "step")
    assert "step_000020" in str(story.of("note"))
    assert weights(Storage(str(small_disk)), "full") == calm
    tell("disk full at a checkpoint", "equal", story.twice)


def test_an_artifact_that_cannot_be_published_fails_with_the_space_it_needs_and_goes_on_later(
    gang: Any, calm: Weights, make_lease: Callable[..., Lease], small_disk: Path, weights: Any, tell: Any
) -> None:
    def act(event: Event, story: Any) -> None:
        if event.kind == "checkpoint" and event.payload["step"] == 30:
            fill(small_disk)

    lease = make_lease("full", str(small_disk))
    [failed] = gang.train(lease, act).of("failed")
    error = failure_of(failed)
    assert isinstance(error, SystemFailure)
    assert str(small_disk / "artifacts/full/v1") in error.what
    assert "MB are needed and" in error.seen and "same command" in error.do
    assert half_written(small_disk) == []
    assert Storage(str(small_disk)).manifest("artifacts/full/v1") is None

    (small_disk / "ballast").unlink()
    again = gang.train(lease)
    assert again.of("started", "from_step") == [30]
    assert weights(Storage(str(small_disk)), "full") == calm
    tell("disk full at publishing, then room", "equal", 10)


# -- remote storage ----------------------------------------------------------------------------------------


class FlakyS3:
    """A real S3 server on the loopback that answers `share` of the calls with 503."""

    def __init__(self) -> None:
        self.share, self.calls, self.refused = 0.0, 0, 0
        self._dice = random.Random(0)
        self._backend = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(self, environ: Any, start: Any) -> Any:
        self.calls += 1
        if self._dice.random() < self.share:
            self.refused += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        return self._backend(environ, start)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def s3() -> Iterator[FlakyS3]:
    """An object store with a bucket `booth`, in the environment of this process and of the Ray that it starts."""
    server = FlakyS3()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="booth")
        client.close()
        yield server
    server.close()


def test_storage_that_fails_three_calls_in_ten_is_tried_again_until_it_answers(
    gang: Any, calm: Weights, make_lease: Callable[..., Lease], s3: FlakyS3, weights: Any, tell: Any
) -> None:
    s3.share = 0.3
    story = gang.train(make_lease("remote", "s3://booth/root"))
    assert story.of("started", "from_step") == [0]
    assert story.of("checkpoint", "step") == [10, 20, 30]
    assert s3.refused > 5
    s3.share = 0.0
    assert weights(Storage("s3://booth/root"), "remote") == calm
    tell(f"storage failing 3 calls in 10 ({s3.refused} did)", "equal", story.twice)


def test_storage_that_never_answers_is_given_up_with_what_was_tried(
    s3: FlakyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.remote, "S3_ATTEMPTS", 2)
    storage = Storage("s3://booth/root")
    s3.share = 1.0
    for act in (
        lambda: storage.read("a"),
        lambda: storage.write("a", b"1"),
        lambda: storage.names("a"),
        lambda: storage.remove("a"),
    ):
        with pytest.raises(StorageError, match="503") as caught:
            act()
        error = caught.value.failure()
        assert "s3://booth/root/a cannot be" in error.what and "same command" in error.do
    s3.share = 0.0


@pytest.mark.parametrize("uri", ["s3://key:secret@booth/root", "s3://booth/root?region=eu-west-1"])
def test_settings_and_secrets_in_a_storage_uri_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        Storage(uri)
