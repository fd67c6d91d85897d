"""This file is where object stores are opened, and Parquet is put into bytes, through pyarrow."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cluster.errors import UserError

READS = 10  # of an object that is replaced while it is read
S3_ATTEMPTS = 10  # of a call, with growing pauses: about half a minute
_DECISIVE = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION")


def open_remote(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI, and the path in it. Calls of S3 that fail are tried again; those of GCS anyway.

    Args:
        uri: Such as `s3://BUCKET/PREFIX`; what follows the bucket is taken as it is, a blank is a blank.

    Raises:
        UserError: The URI carries settings or credentials, is of no known kind, or its store cannot be opened.
    """
    scheme, _, place = uri.partition("://")
    bucket, _, path = place.rstrip("/").partition("/")
    if "@" in bucket or "?" in uri:  # the URI is written into manifests and shown to people
        raise UserError(
            "the URI carries settings or credentials",
            "it has a @ or a ?",
            "give s3://BUCKET/PREFIX, and AWS_ENDPOINT_URL, AWS_REGION and the credentials in the environment",
        )
    system, root = _opened(f"{scheme}://{bucket}", tuple(map(os.environ.get, _DECISIVE)), S3_ATTEMPTS)
    return system, "/".join(part for part in (root, path) if part)


@functools.lru_cache(maxsize=64)  # a campaign reads thousands of places, and to open one asks for its region
def _opened(uri: str, environment: tuple[str | None, ...], attempts: int) -> tuple[pafs.FileSystem, str]:
    found, root = pafs.FileSystem.from_uri(uri)
    if not isinstance(found, pafs.S3FileSystem):
        return found, root
    endpoint = environment[0] or environment[1] or ""
    scheme, _, host = endpoint.rstrip("/").rpartition("://")
    patient = pafs.S3FileSystem(
        region=found.region,
        endpoint_override=host or None,
        scheme=scheme or None,
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=attempts),
    )
    return patient, root


def remote_info(uri: str) -> tuple[bool, int]:
    """Whether a URI is a folder, and the bytes of a file.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    system, path = open_remote(uri)
    info = system.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(uri)
    return info.type == pafs.FileType.Directory, info.size or 0


def remote_names(uri: str) -> list[tuple[str, bool, int]]:
    """Name, whether it is a folder, and bytes of what is directly in a folder.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    system, path = open_remote(uri)
    infos = system.get_file_info(pafs.FileSelector(path))
    return [(info.base_name, info.type == pafs.FileType.Directory, info.size or 0) for info in infos]


def remote_read(uri: str) -> bytes:
    """The bytes of a file.

    Raises:
        FileNotFoundError: There is none.
    """
    return read_whole(*open_remote(uri))


def read_whole(system: pafs.FileSystem, path: str) -> bytes:
    """The bytes of an object that others may replace or remove meanwhile: those of one moment.

    Pyarrow asks for the size first and for as many bytes then. Of an object that was replaced in between it returns the
    first part of a longer one, and a shorter one with what lay in memory behind it; so the size is asked for again.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read, or was replaced at every attempt.
    """
    for _ in range(READS):
        try:
            with system.open_input_stream(path) as stream:
                data = bytes(stream.read())
        except OSError as error:
            if system.get_file_info(path).type == pafs.FileType.NotFound:  # removed in between
                raise FileNotFoundError(path) from error
            raise
        info = system.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise FileNotFoundError(path)
        if info.size == len(data):
            return data
    raise OSError(f"{path} is being replaced all the time")


def parquet_bytes(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Columns as one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def parquet_columns(data: bytes) -> dict[str, list[Any]]:
    """The columns of a Parquet file as Python values.

    Raises:
        ValueError: It is no Parquet file.
    """
    columns: dict[str, list[Any]] = pq.read_table(pa.BufferReader(data)).to_pydict()
    return columns
