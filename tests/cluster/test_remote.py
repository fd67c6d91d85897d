"""A storage root in an object store does what one in a folder does, against a server that checks who asks."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.objects import StorageError
from cluster.remote import open_remote, read_whole
from cluster.source import entries, find, read, read_text
from cluster.storage import Storage, sha256


@pytest.fixture
def remote(bucket: str) -> Storage:
    return Storage(f"{bucket}/booth root")


@pytest.fixture(params=["local", "remote"])
def either(request: pytest.FixtureRequest, storage: Storage) -> Storage:
    """A root of each kind."""
    return storage if request.param == "local" else Storage(f"{request.getfixturevalue('bucket')}/root")


# -- storage -----------------------------------------------------------------------------------------------


def test_objects_and_tables_last_and_are_replaced(either: Storage) -> None:
    either.check_writable()
    assert either.names("") == [] and not either.exists("a")
    either.write("a/b ü?.json", b"1")
    either.write_json("a/b ü?.json", {"noun": "Hündin"})
    assert either.read_json("a/b ü?.json") == {"noun": "Hündin"}
    either.append("a/log", b"1\n")
    either.append("a/log", b"2\n")
    assert either.read("a/log") == b"1\n2\n"
    digest = either.write_rows("a/t.parquet", {"n": [1, 2]})
    assert either.read_rows("a/t.parquet", digest) == {"n": [1, 2]}
    assert either.names("a") == ["b ü?.json", "log", "t.parquet"]
    either.remove("a/log")
    with pytest.raises(FileNotFoundError):
        either.read("a/log")
    either.remove("a")
    assert either.names("a") == []


def test_what_is_there_is_not_put_again(either: Storage) -> None:
    assert either.put_if_absent("images/abc.png", b"first")
    assert not either.put_if_absent("images/abc.png", b"second")
    assert either.read("images/abc.png") == b"first"
    assert either.names("images") == ["abc.png"]


def test_a_folder_is_published_with_its_manifest_and_checked_when_read(
    either: Storage, tmp_path: Path
) -> None:
    (tmp_path / "made" / "inner").mkdir(parents=True)
    (tmp_path / "made" / "inner" / "b.bin").write_bytes(b"beta")
    either.publish(tmp_path / "made", "artifacts/rex/v1", {"kind": "test"})
    manifest = either.manifest("artifacts/rex/v1")
    assert manifest is not None
    assert manifest["files"] == {"inner/b.bin": {"size": 4, "sha256": sha256(b"beta")}}
    with either.verified("artifacts/rex/v1") as folder:
        assert (folder / "inner" / "b.bin").read_bytes() == b"beta"


def test_whoever_may_not_write_is_refused_with_the_remedy(
    remote: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError) as caught:
        Storage(remote.uri).check_writable()
    assert caught.value.what.endswith("is not writable") and "AWS Error" in caught.value.seen
    with pytest.raises(UserError, match="check the address and the credentials"):
        read(remote.full("a"))


def test_an_object_replaced_while_it_is_read_is_that_of_one_moment(remote: Storage) -> None:
    short, long = b"s" * 50, b"l" * 500
    remote.write("o", short)
    over = threading.Event()

    def replace() -> None:
        while not over.is_set():
            for data in (long, short):
                remote.write("o", data)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        assert {remote.read("o") for _ in range(40)} <= {short, long}
    finally:
        over.set()
        writer.join()


def test_an_object_removed_while_it_is_read_is_not_there(remote: Storage) -> None:
    remote.write("o", b"o")
    real, path = open_remote(remote.full("o"))

    class System:
        """The store, in which somebody removes the object right after it was opened."""

        get_file_info = staticmethod(real.get_file_info)

        @staticmethod
        def open_input_stream(at: str) -> object:
            stream = real.open_input_stream(at)
            remote.remove("o")
            return stream

    with pytest.raises(FileNotFoundError):
        read_whole(System(), path)


# -- what users point at -----------------------------------------------------------------------------------


def test_users_places_are_read_wherever_they_are(either: Storage) -> None:
    either.write("photos/b 1.PNG", b"\xef\xbb\xbftext")
    either.write("photos/a/inner.txt", b"")
    folder = find(either.full("photos/"))
    assert folder.is_folder
    assert [(e.name, e.is_folder, e.size, e.suffix) for e in entries(folder.place)] == [
        ("a", True, 0, ""),
        ("b 1.PNG", False, 7, ".png"),
    ]
    assert read_text(either.full("photos/b 1.PNG")) == "text"
    for act in (find, entries, read):
        with pytest.raises(UserError, match="does not exist"):
            act(either.full("nothing"))
    either.write("latin.txt", b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        read_text(either.full("latin.txt"))


def test_a_bucket_that_is_not_there_is_the_users_mistake(bucket: str) -> None:
    for act in (find, entries, read):
        with pytest.raises(UserError):
            act("s3://no-such-bucket/photos")
    with pytest.raises(UserError, match="carries settings"):
        find("s3://key:secret@bucket/photos")


def test_a_store_that_fails_is_not(object_store: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**object_store, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cluster.remote.S3_ATTEMPTS", 1)
    with pytest.raises(StorageError, match="cannot be read"):
        find("s3://bucket/photos")
