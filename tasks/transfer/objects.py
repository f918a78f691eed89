"""Download objects from S3 and compatible servers, resumable across processes and verified.

Objects are downloaded in parallel ranges, each tied to the listed version (`If-Match`). Finished ranges stay on disk,
so a rerun continues; boto3's own transfer manager cannot resume in a new process. Each object is then compared with
the SHA-256 in its metadata (key `sha256`), or with its ETag: the MD5 of the object, or for a multipart upload the MD5
of the MD5s of the parts, if the server reports their size. Otherwise, or with KMS encryption, only the size is checked.

Credentials come from the environment or the profile (`AWS_PROFILE`), never from `params.yaml`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import boto3
import botocore
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, NoCredentialsError

from models.hashing import file_sha256
from tasks.runtime.disk import CHUNK, require_space
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from tqdm import tqdm

    from tasks.params import S3Params

Client: TypeAlias = Any  # boto3 creates the classes of its clients at run time
RANGE_BYTES = 16 << 20
READ_BYTES = 16 << 10
"""Bytes per read; a broken connection loses at most this many."""
ATTEMPTS = 4
"""Consecutive attempts without any data before a range is given up."""
PAUSE_SECONDS = 0.5
CONNECT_SECONDS, READ_SECONDS = 10, 30


@dataclass(frozen=True)
class Stored:
    """A listed object."""

    key: str
    size: int
    etag: str


@dataclass(frozen=True)
class Download:
    """State shared by the ranges of one download."""

    client: Client
    bucket: str
    folder: Path
    """Folder of complete and partial objects."""
    deadline: float
    """In seconds of `time.monotonic()`."""
    bar: tqdm
    failed: threading.Event


def client(access: S3Params) -> Client:
    """Create a client of boto3. Raises `StageError` if the endpoint or the profile is invalid."""
    # Outside EC2, asking the metadata service for credentials only takes time.
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": 4},
        max_pool_connections=access.connections,
        # Many compatible servers refuse the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        signature_version=botocore.UNSIGNED if access.anonymous else None,
    )
    try:
        return boto3.Session().client("s3", endpoint_url=access.endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        raise StageError(f"the configuration of S3 is invalid ({error}); correct the endpoint or the profile") from None


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn errors of boto3 into a `StageError` with a remedy and without keys or tokens."""
    try:
        yield
    except (NoCredentialsError, CredentialRetrievalError):
        raise StageError(
            f"there are no credentials for {url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or "
            "for a dataset in a public bucket set download.s3.anonymous to true"
        ) from None
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status in (401, 403):
            raise StageError(f"{url}: the credentials may not read it ({code}); use others, or grant access") from None
        if status == 404:
            raise StageError(f"{url} does not exist ({code}); correct the URL or the endpoint") from None
        if status == 412:
            raise StageError(f"{url} was changed while it was downloaded; run the same command again") from None
        raise StageError(f"{url}: the server answered {status} ({code}); try again later") from None
    except BotoCoreError as error:
        raise StageError(f"{url} cannot be fetched ({error}); check the network and the endpoint") from None


def split(url: str) -> tuple[str, str]:
    """Split s3://bucket/key into the bucket and the key or prefix, which may be empty."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def head(client: Client, bucket: str, key: str) -> Stored:
    """Size and ETag of one object."""
    answer = client.head_object(Bucket=bucket, Key=key)
    return Stored(key, answer["ContentLength"], answer["ETag"])


def listed(client: Client, bucket: str, prefix: str) -> list[Stored]:
    """List the objects below a prefix, sorted by key, without the markers of empty folders."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    found = [Stored(item["Key"], item["Size"], item["ETag"]) for page in pages for item in page.get("Contents", ())]
    objects = [stored for stored in found if not stored.key.endswith("/")]
    if not objects:
        raise StageError(f"there is nothing below s3://{bucket}/{prefix}; correct the URL")
    return sorted(objects, key=lambda stored: stored.key)


def pin(objects: list[Stored]) -> str:
    """SHA-256 over keys, sizes and ETags; it changes if an object is added, removed or replaced."""
    lines = (f"{stored.key}\0{stored.size}\0{stored.etag}\n" for stored in objects)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def file_name(stored: Stored) -> str:
    """A safe file name for any key."""
    return hashlib.sha256(stored.key.encode("utf-8", "surrogatepass")).hexdigest()


def download(
    client: Client, bucket: str, objects: list[Stored], folder: Path, connections: int, timeout_seconds: float
) -> None:
    """Download and verify objects into `folder` under their `file_name`, `connections` ranges at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    arrived = sum(file.stat().st_size for file in folder.iterdir())
    total = sum(stored.size for stored in objects)
    require_space(folder, total - arrived)
    deadline = time.monotonic() + timeout_seconds
    with (
        progress(desc="download", total=total, initial=arrived, unit="B", unit_scale=True) as bar,
        ThreadPoolExecutor(connections) as pool,
    ):
        shared = Download(client, bucket, folder, deadline, bar, threading.Event())
        missing = [stored for stored in objects if not (folder / file_name(stored)).exists()]
        ranges = [(stored, start) for stored in missing for start in range(0, max(stored.size, 1), RANGE_BYTES)]
        try:
            for stored, start in pool.map(lambda task: _range(shared, *task), ranges):
                if stored.size > RANGE_BYTES and start + RANGE_BYTES >= stored.size:
                    _join(shared, stored)
        finally:
            shared.failed.set()


def _range(shared: Download, stored: Stored, start: int) -> tuple[Stored, int]:
    """Complete one range of an object; continue after broken connections. Verify objects of a single range."""
    path, end = _part(shared, stored, start), min(start + RANGE_BYTES, stored.size)
    path.touch()
    failures = 0
    while (have := path.stat().st_size) < end - start and not shared.failed.is_set():
        try:
            _append(shared, stored, path, start + have, end)
        except BotoCoreError:
            failures = 0 if path.stat().st_size > have else failures + 1
            if failures >= ATTEMPTS:
                raise
            time.sleep(PAUSE_SECONDS * failures)
    if stored.size <= RANGE_BYTES and not shared.failed.is_set():
        _join(shared, stored)
    return stored, start


def _part(shared: Download, stored: Stored, start: int) -> Path:
    return shared.folder / f"{file_name(stored)}.{start}"


def _append(shared: Download, stored: Stored, path: Path, start: int, end: int) -> None:
    """Request the bytes from `start` to `end` of the listed version."""
    answer = shared.client.get_object(
        Bucket=shared.bucket, Key=stored.key, Range=f"bytes={start}-{end - 1}", IfMatch=stored.etag
    )
    if answer["ContentLength"] != end - start:
        raise StageError(f"the server of s3://{shared.bucket} does not support range requests; use one that does")
    with path.open("ab") as file:
        for chunk in answer["Body"].iter_chunks(READ_BYTES):
            file.write(chunk)
            shared.bar.update(len(chunk))
            if time.monotonic() > shared.deadline:
                raise StageError(
                    "the time limit (download.timeout_seconds) is reached; run the same command again to continue"
                )
            if shared.failed.is_set():
                return


def _join(shared: Download, stored: Stored) -> None:
    """Join the ranges of an object, verify the file and rename it."""
    whole = _part(shared, stored, 0)
    with whole.open("ab") as file:
        for start in range(RANGE_BYTES, stored.size, RANGE_BYTES):
            with _part(shared, stored, start).open("rb") as part:
                shutil.copyfileobj(part, file, CHUNK)
            _part(shared, stored, start).unlink()
    problem = _mismatch(shared, stored, whole)
    if problem:
        whole.unlink()
        raise StageError(f"s3://{shared.bucket}/{stored.key} arrived damaged ({problem}); run the same command again")
    os.replace(whole, shared.folder / file_name(stored))


def _mismatch(shared: Download, stored: Stored, file: Path) -> str | None:
    """How a file differs from the object; None if it is equal or no checksum is published."""
    answer = shared.client.head_object(Bucket=shared.bucket, Key=stored.key, IfMatch=stored.etag)
    published = answer["Metadata"].get("sha256", "")
    if re.fullmatch(r"[0-9a-fA-F]{64}", published):
        return None if file_sha256(file) == published.lower() else "its sha256 is not that of its metadata"
    etag = stored.etag.strip('"')
    if answer.get("ServerSideEncryption", "AES256") != "AES256":
        return None  # the ETag is not an MD5
    if re.fullmatch(r"[0-9a-f]{32}", etag):
        return None if _md5(file) == etag else "its md5 is not its ETag"
    size = _part_size(shared, stored)
    if size is not None:
        return None if _md5_of_parts(file, size) == etag else "the md5 of its parts is not its ETag"
    return None


def _part_size(shared: Download, stored: Stored) -> int | None:
    """Size in bytes of the parts of a multipart upload; None if the server does not report it."""
    first = shared.client.head_object(Bucket=shared.bucket, Key=stored.key, IfMatch=stored.etag, PartNumber=1)
    return int(first["ContentLength"]) if "PartsCount" in first else None


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5_of_parts(file: Path, size: int) -> str:
    """ETag of an object that was uploaded in parts of `size` bytes."""
    digests = []
    with file.open("rb") as opened:
        while part := opened.read(size):
            digests.append(hashlib.md5(part, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
