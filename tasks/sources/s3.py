"""The source `folder` at an s3:// address: one archive, or everything below a prefix."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.runtime import locks, workspace
from tasks.runtime.stage import StageError
from tasks.sources import archives
from tasks.sources.entry import sha256_of
from tasks.transfer import fetch, objects

if TYPE_CHECKING:
    from tasks.params import DownloadParams


def copy(target: Path, params: DownloadParams) -> str:
    """Bring the archive or the prefix at `params.url` into `target`, as images.zip or images.tar; returns its address.

    Raises `StageError` where it is not to be had, is not what `download.sha256` says, or exceeds the limits.
    """
    url = str(params.url)
    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = objects.client(params.s3)
    fetch.require_allowed(client.meta.endpoint_url, params.allow_private_addresses)
    with objects.explained(url):
        found = objects.listed(client, bucket, key) if _is_prefix(key) else [objects.head(client, bucket, key)]
    pin = objects.pin(found) if _is_prefix(key) else str(params.sha256)
    _require_pinned(url, found, pin, params)
    folder = workspace.scratch() / "downloads" / f"s3-{objects.pin(found)[:32]}"
    with locks.exclusive(folder.with_suffix(".lock")):
        with objects.explained(url):
            objects.bring(client, bucket, found, folder, params.s3.connections, params.timeout_seconds)
        if _is_prefix(key):
            files = [(archives.text(its.key.removeprefix(key)), folder / objects.file_name(its)) for its in found]
            archives.pack_files(sorted(files), target / "images.zip")
        else:
            file = folder / objects.file_name(found[0])
            arrived = sha256_of(file)
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
    size = sum(its.size for its in found)
    if params.sha256 != pin:
        before = "and not what download.sha256 says" if params.sha256 else "which may change"
        raise StageError(
            f"{url} holds {len(found)} objects of {size} bytes, {before}; pin what it holds now with "
            f"download.sha256={pin}"
        )
    if size > params.max_bytes:
        raise StageError(
            f"{url} holds {size} bytes, over download.max_bytes {params.max_bytes}; raise it if you want it"
        )
