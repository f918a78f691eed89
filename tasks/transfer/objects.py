"""Objects of S3 and of what is compatible with it, brought into a folder of this machine.

An object comes in ranges, several at a time, each tied to the version that was listed (`If-Match`). What has arrived
stays in that folder, so a broken connection costs nothing and the same command continues. Then it is checked: against
the sha256 in the object's own metadata (key `sha256`) where there is one, else against its ETag, which is the md5 of an
object that was uploaded in one piece, and the md5 of the parts' md5s of one uploaded in parts, if the server says how
large they are. Where it does not, or encrypts with KMS, the size is all that can be compared.

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
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.runtime.stage import StageError
from tasks.sources.entry import CHUNK, require_space, sha256_of

if TYPE_CHECKING:
    from tasks.params import S3Params

RANGE_BYTES = 16 << 20
READ_BYTES = 16 << 10
"""Bytes read at once; a broken connection loses at most so many."""
ATTEMPTS = 4
"""Attempts in a row that may bring nothing, for each range."""
PAUSE_SECONDS = 0.5
CONNECT_SECONDS, READ_SECONDS = 10, 30


@dataclass(frozen=True)
class Stored:
    """An object as it was listed."""

    key: str
    size: int
    etag: str


@dataclass(frozen=True)
class Download:
    """What the parts of one download share."""

    client: Any
    bucket: str
    folder: Path
    """Where objects lie that have arrived, whole or not."""
    deadline: float
    """Of `time.monotonic()`, in seconds."""
    bar: tqdm
    failed: threading.Event


def client(access: S3Params) -> Any:
    """A client of boto3. Raises `StageError` where endpoint or profile cannot be used."""
    # Elsewhere than on Amazon's machines, asking their metadata service for credentials only costs time.
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    import boto3
    import botocore
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": 4},
        max_pool_connections=access.connections,
        # What is compatible with S3 often refuses the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        signature_version=botocore.UNSIGNED if access.anonymous else None,
    )
    try:
        return boto3.Session().client("s3", endpoint_url=access.endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        raise StageError(f"S3 cannot be used as it is set up ({error}); correct the endpoint, or the profile") from None


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what boto3 raises into one sentence that says what to do; keys and tokens are not in it."""
    from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, NoCredentialsError

    try:
        yield
    except (NoCredentialsError, CredentialRetrievalError):
        raise StageError(
            f"there are no credentials for {url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or "
            "for pictures in a public bucket download.s3.anonymous to true"
        ) from None
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status in (401, 403):
            raise StageError(f"{url}: the credentials may not read it ({code}); use others, or let them") from None
        if status == 404:
            raise StageError(f"{url} does not exist ({code}); correct the address, or the endpoint") from None
        if status == 412:
            raise StageError(f"{url} was changed while it was downloaded; run the same command again") from None
        raise StageError(f"{url}: the server answered {status} ({code}); try again later") from None
    except BotoCoreError as error:
        raise StageError(f"{url} cannot be fetched ({error}); check the network and the endpoint") from None


def head(client: Any, bucket: str, key: str) -> Stored:
    said = client.head_object(Bucket=bucket, Key=key)
    return Stored(key, said["ContentLength"], said["ETag"])


def listed(client: Any, bucket: str, prefix: str) -> list[Stored]:
    """Everything below a prefix, sorted by key; the markers of empty folders are left out."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    found = [Stored(its["Key"], its["Size"], its["ETag"]) for page in pages for its in page.get("Contents", ())]
    objects = [its for its in found if not its.key.endswith("/")]
    if not objects:
        raise StageError(f"there is nothing below s3://{bucket}/{prefix}; correct the address")
    return sorted(objects, key=lambda its: its.key)


def pin(objects: list[Stored]) -> str:
    """sha256 over keys, sizes and ETags: it changes when an object comes, goes or is written anew."""
    lines = (f"{its.key}\0{its.size}\0{its.etag}\n" for its in objects)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def file_name(stored: Stored) -> str:
    """A file name for an object whose key may be anything."""
    return hashlib.sha256(stored.key.encode("utf-8", "surrogatepass")).hexdigest()


def bring(
    client: Any, bucket: str, objects: list[Stored], folder: Path, connections: int, timeout_seconds: float
) -> None:
    """Download and check every object into `folder`, `connections` ranges at a time, each under its `file_name`."""
    folder.mkdir(parents=True, exist_ok=True)
    arrived = sum(file.stat().st_size for file in folder.iterdir())
    total = sum(its.size for its in objects)
    require_space(folder, total - arrived)
    deadline = time.monotonic() + timeout_seconds
    with (
        tqdm(desc="download", total=total, initial=arrived, unit="B", unit_scale=True, dynamic_ncols=True) as bar,
        ThreadPoolExecutor(connections) as pool,
    ):
        shared = Download(client, bucket, folder, deadline, bar, threading.Event())
        missing = [its for its in objects if not (folder / file_name(its)).exists()]
        ranges = [(its, start) for its in missing for start in range(0, max(its.size, 1), RANGE_BYTES)]
        try:
            for stored, start in pool.map(lambda task: _range(shared, *task), ranges):
                if stored.size > RANGE_BYTES and start + RANGE_BYTES >= stored.size:
                    _join(shared, stored)
        finally:
            shared.failed.set()


def _range(shared: Download, stored: Stored, start: int) -> tuple[Stored, int]:
    """Bring one range of an object to its end; goes on where a connection broke. An object of one range is checked."""
    from botocore.exceptions import BotoCoreError

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
    """One request for the bytes from `start` to `end` of the version that was listed."""
    answer = shared.client.get_object(
        Bucket=shared.bucket, Key=stored.key, Range=f"bytes={start}-{end - 1}", IfMatch=stored.etag
    )
    if answer["ContentLength"] != end - start:
        raise StageError(f"the server of s3://{shared.bucket} answers no ranges; use one that does")
    with path.open("ab") as file:
        for chunk in answer["Body"].iter_chunks(READ_BYTES):
            file.write(chunk)
            shared.bar.update(len(chunk))
            if time.monotonic() > shared.deadline:
                raise StageError(
                    "not done within the time allowed (download.timeout_seconds); run the same command again"
                )
            if shared.failed.is_set():
                return


def _join(shared: Download, stored: Stored) -> None:
    """Put the ranges of an object together, check them, and give the file its name."""
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
    """Why a file is not the object, or None where it is, or where nothing published can tell."""
    said = shared.client.head_object(Bucket=shared.bucket, Key=stored.key, IfMatch=stored.etag)
    published = said["Metadata"].get("sha256", "")
    if re.fullmatch(r"[0-9a-fA-F]{64}", published):
        return None if sha256_of(file) == published.lower() else "its sha256 is not that of its metadata"
    etag = stored.etag.strip('"')
    if said.get("ServerSideEncryption", "AES256") != "AES256":
        return None  # its ETag is no md5
    if re.fullmatch(r"[0-9a-f]{32}", etag):
        return None if _md5(file) == etag else "its md5 is not its ETag"
    size = _part_size(shared, stored)
    if size is not None:
        return None if _md5_of_parts(file, size) == etag else "the md5 of its parts is not its ETag"
    return None


def _part_size(shared: Download, stored: Stored) -> int | None:
    """Size of the parts in which an object was uploaded, in bytes; None where the server does not say."""
    first = shared.client.head_object(Bucket=shared.bucket, Key=stored.key, IfMatch=stored.etag, PartNumber=1)
    return int(first["ContentLength"]) if "PartsCount" in first else None


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5_of_parts(file: Path, size: int) -> str:
    """The ETag of an object that was uploaded in parts of `size` bytes."""
    digests = []
    with file.open("rb") as opened:
        while part := opened.read(size):
            digests.append(hashlib.md5(part, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
