"""The source `folder` at an s3:// URL: one archive, or all objects below a prefix."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from models.hashing import file_sha256
from tasks.runtime import locks, workspace
from tasks.runtime.disk import printable_name
from tasks.runtime.errors import StageError
from tasks.sources import archives, packing
from tasks.transfer import objects
from tasks.web import fetch

if TYPE_CHECKING:
    from tasks.params import DownloadParams


def copy(target: Path, params: DownloadParams) -> str:
    """Download the archive or prefix at `params.url` to `target` as images.zip or images.tar, and return the URL.

    Raises `StageError` if it cannot be read, differs from `download.sha256`, or exceeds the limits.
    """
    url = str(params.url)
    bucket, key = objects.split(url)
    client = objects.client(params.s3)
    fetch.require_allowed(client.meta.endpoint_url, params.allow_private_addresses)
    with objects.explained(url):
        found = objects.listed(client, bucket, key) if _is_prefix(key) else [objects.head(client, bucket, key)]
    pin = objects.pin(found) if _is_prefix(key) else str(params.sha256)
    _require_pinned(url, found, pin, params)
    folder = workspace.scratch() / "downloads" / f"s3-{objects.pin(found)[:32]}"
    with locks.exclusive(folder.with_suffix(".lock")):
        with objects.explained(url):
            objects.download(client, bucket, found, folder, params.s3.connections, params.timeout_seconds)
        if _is_prefix(key):
            files = [(printable_name(item.key.removeprefix(key)), folder / objects.file_name(item)) for item in found]
            packing.pack_files(sorted(files), target / "images.zip")
        else:
            file = folder / objects.file_name(found[0])
            arrived = file_sha256(file)
            if arrived != pin:
                file.unlink()
                raise StageError(
                    f"the sha256 of {url} is {arrived} and not {pin}; correct download.sha256 or download.url"
                )
            shutil.copyfile(file, target / f"images.{archives.kind(file)}")
        shutil.rmtree(folder)
    return url


def _is_prefix(key: str) -> bool:
    return key == "" or key.endswith("/")


def _require_pinned(url: str, found: list[objects.Stored], pin: str, params: DownloadParams) -> None:
    size = sum(item.size for item in found)
    if params.sha256 != pin:
        state = "which differ from download.sha256" if params.sha256 else "which may change"
        raise StageError(
            f"{url} holds {len(found)} objects of {size} bytes, {state}; pin the present content with "
            f"download.sha256={pin}"
        )
    if size > params.max_bytes:
        raise StageError(
            f"{url} holds {size} bytes, over download.max_bytes {params.max_bytes}; raise it to allow the download"
        )
