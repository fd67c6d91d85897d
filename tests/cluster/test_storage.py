"""This file is where the storage root is tested: whole or not at all, checked when read, nothing outside it."""

import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import SystemFailure, UserError
from cluster.objects import StorageError
from cluster.storage import Storage, sha256


def everything(storage: Storage) -> list[str]:
    """Every name under the root, temporary ones too."""
    root = Path(storage.uri)
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local folder with two files to publish."""
    (tmp_path / "made" / "inner").mkdir(parents=True)
    (tmp_path / "made" / "a.bin").write_bytes(b"alpha")
    (tmp_path / "made" / "inner" / "b.bin").write_bytes(b"beta")
    return tmp_path / "made"


# -- the root ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["a file", "/proc"])
def test_a_root_that_cannot_be_made_is_refused_with_the_remedy(tmp_path: Path, below: str) -> None:
    (tmp_path / "a file").write_text("in the way")
    root = tmp_path / below / "root"  # also as root, who is stopped by no permission
    with pytest.raises(UserError) as caught:
        Storage(str(root))
    assert caught.value.what == f"the storage root {root} cannot be used"
    assert str(root) in caught.value.seen
    assert caught.value.do == "name another with --storage"


def test_a_root_that_cannot_be_written_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError) as caught:
        Storage("/proc/self").check_writable()
    assert caught.value.what.startswith("the storage root /proc/")
    assert caught.value.what.endswith(" is not writable")
    assert caught.value.seen != ""
    assert caught.value.do == "make it writable or name another with --storage"


def test_the_check_of_a_writable_root_leaves_nothing(storage: Storage) -> None:
    storage.check_writable()
    assert everything(storage) == []


def test_a_uri_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        Storage("ftp://host/root")
    assert caught.value.what == "the storage root ftp://host/root cannot be used"


def test_a_file_uri_is_a_local_root(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/mein Hund – 犬")
    storage.write("Ähre.txt", b"1")
    assert (tmp_path / "mein Hund – 犬" / "Ähre.txt").read_bytes() == b"1"


@pytest.mark.parametrize("path", ["../out", "a/../../out", "/etc/passwd", "a\0b"])
def test_no_path_leaves_the_root(storage: Storage, path: str) -> None:
    for act in (storage.read, storage.exists, storage.names, storage.remove, lambda p: storage.write(p, b"")):
        with pytest.raises(UserError) as caught:
            act(path)
        assert "leaves the storage root" in caught.value.what


# -- single objects ----------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_and_replaced_whole(storage: Storage) -> None:
    storage.write("a/b.json", b"1")
    storage.write_json("a/b.json", {"noun": "Hündin"})
    assert storage.read_json("a/b.json") == {"noun": "Hündin"}
    assert everything(storage) == ["a", "a/b.json"]


def test_a_write_that_fails_leaves_the_old_bytes_and_nothing_else(storage: Storage) -> None:
    storage.write("taken/inner.txt", b"old")
    with pytest.raises(OSError):
        storage.write("taken", b"new")  # a folder is in the way: the last act, the rename, fails
    assert storage.read("taken/inner.txt") == b"old"
    assert everything(storage) == ["taken", "taken/inner.txt"]


def test_appending_grows_a_file(storage: Storage) -> None:
    storage.append("runs/events.jsonl", b"1\n")
    storage.append("runs/events.jsonl", b"2\n")
    assert storage.read("runs/events.jsonl") == b"1\n2\n"


def test_a_full_disk_leaves_a_log_as_it_was_and_says_what_is_needed(
    storage: Storage,
) -> None:
    storage.append("runs/events.jsonl", b"1\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # as a disk that has room for 100 bytes more
    try:
        for act in (storage.append, storage.write):
            with pytest.raises(StorageError) as caught:
                act("runs/events.jsonl", bytes(1_000_000))
            assert caught.value.full and "1.0 MB are needed" in caught.value.seen
            assert "make room" in caught.value.failure().do
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert storage.read("runs/events.jsonl") == b"1\n"
    assert everything(storage) == ["runs", "runs/events.jsonl"]


def test_an_error_of_storage_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(StorageError("a cannot be written", "no room", True)))
    assert (str(error), error.full) == ("a cannot be written: no room", True)


def test_removing_takes_files_and_folders_and_forgives_what_is_not_there(storage: Storage) -> None:
    storage.write("a/b/c.txt", b"")
    storage.write("a/d.txt", b"")
    storage.remove("a/d.txt")
    storage.remove("a/b")
    storage.remove("never")
    assert storage.names("a") == []
    assert storage.names("never") == []


# -- tables ------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_went_in(storage: Storage) -> None:
    columns = {"name": ["a", "b"], "png": [b"\x00\xff", b""], "width": [3, 4]}
    digest = storage.write_rows("t/rows.parquet", columns)
    assert storage.read_rows("t/rows.parquet", digest) == columns


def test_damaged_rows_are_never_returned(storage: Storage) -> None:
    digest = storage.write_rows("rows.parquet", {"n": [1, 2, 3]})
    data = bytearray(storage.read("rows.parquet"))
    data[len(data) // 2] ^= 1
    storage.write("rows.parquet", bytes(data))
    with pytest.raises(SystemFailure) as caught:
        storage.read_rows("rows.parquet", digest)
    assert caught.value.what == f"{storage.full('rows.parquet')} is damaged"
    assert "delete its folder" in caught.value.do


# -- folders -----------------------------------------------------------------------------------------------


def test_a_published_folder_lists_every_file_with_size_and_hash(storage: Storage, folder: Path) -> None:
    manifest = storage.publish(folder, "artifacts/rex/v1", {"kind": "test"})
    assert manifest == storage.manifest("artifacts/rex/v1")
    assert manifest["kind"] == "test"
    assert manifest["files"]["inner/b.bin"] == {"size": 4, "sha256": sha256(b"beta")}
    with storage.verified("artifacts/rex/v1") as found:
        assert (found / "inner" / "b.bin").read_bytes() == b"beta"


def test_publishing_again_replaces_the_folder_whole(storage: Storage, folder: Path) -> None:
    storage.publish(folder, "a/v1", {})
    (folder / "a.bin").unlink()
    storage.publish(folder, "a/v1", {})
    assert everything(storage) == ["a", "a/v1", "a/v1/inner", "a/v1/inner/b.bin", "a/v1/manifest.json"]


def test_a_publication_that_fails_leaves_nothing(storage: Storage, folder: Path) -> None:
    (folder / "dangling").symlink_to(folder / "gone")
    with pytest.raises(OSError):
        storage.publish(folder, "a/v1", {})
    assert everything(storage) == ["a"]
    assert storage.manifest("a/v1") is None


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_published_folder_with_a_damaged_file_is_refused(
    storage: Storage, folder: Path, damage: str
) -> None:
    storage.publish(folder, "a/v1", {})
    file = Path(storage.full("a/v1/a.bin"))
    if damage == "changed":
        file.write_bytes(b"alphA")
    else:
        file.unlink()
    with pytest.raises(SystemFailure) as caught, storage.verified("a/v1"):
        pass
    assert caught.value.what == f"{storage.full('a/v1')}/a.bin is damaged or missing"


def test_a_folder_without_a_manifest_counts_as_not_there(storage: Storage) -> None:
    storage.write("a/v1/a.bin", b"alpha")
    assert storage.manifest("a/v1") is None
    with pytest.raises(SystemFailure) as caught, storage.verified("a/v1"):
        pass
    assert caught.value.what == f"{storage.full('a/v1')} is missing or was not finished"


def test_a_file_missing_on_a_remote_root_is_refused_as_on_a_local_one(storage: Storage, folder: Path) -> None:
    storage.publish(folder, "a/v1", {})
    storage.is_local = (
        False  # from here on the root is read as an object store is: file by file, through pyarrow
    )
    with storage.verified("a/v1") as found:
        assert (found / "inner" / "b.bin").read_bytes() == b"beta"
        assert found != Path(storage.full("a/v1"))
    storage.remove("a/v1/a.bin")
    with pytest.raises(SystemFailure) as caught, storage.verified("a/v1"):
        pass
    assert caught.value.what == f"{storage.full('a/v1')}/a.bin is damaged or missing"


# -- locks -------------------------------------------------------------------------------------------------


def test_a_lock_is_held_against_other_processes_and_ends_with_its_holder(storage: Storage) -> None:
    holder = "import sys; from cluster.storage import Storage\n"
    holder += f"with Storage({storage.uri!r}).lock('locks/x'): print('held', flush=True); sys.stdin.read()"
    refusal = UserError("it is taken")
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, storage.lock_or_refuse("locks/x", refusal):
            pass
        assert caught.value is refusal
        with storage.lock("locks/x", on_wait=other.kill):  # told that it waits, it ends the holder
            assert other.wait() != 0
    with storage.lock("locks/x", on_wait=pytest.fail), storage.lock_or_refuse("locks/y", refusal):
        pass
