"""The stage `download`: the source as published, verified, with a record of where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.params import DownloadParams
from tasks.runtime import atomic, stage, workspace
from tasks.runtime.stage import StageError
from tasks.sources import archives, cifar, digits, folder, hub, laion, picture_tables, s3
from tasks.sources.entry import read_manifest, write_manifest
from tasks.transfer import fetch


def download(raw: Path, params: DownloadParams) -> None:
    """Fetch the source as published into data/raw, verify its checksum and write a manifest beside it."""
    with atomic.writing_folder(raw) as target:
        origin, details = _bring(target, params)
        write_manifest(target, params.source, origin, params.licence, details)
    manifest = read_manifest(raw)
    size = sum(file["size"] for file in manifest["files"])
    print(f"download: {len(manifest['files'])} files, {size} bytes from {manifest['origin']}")


def _bring(target: Path, params: DownloadParams) -> tuple[str, dict[str, Any]]:
    """Put the published files into `target`; returns where they came from, without anything private, and details."""
    match params.source:
        case "digits":
            digits.copy(target)
            return digits.ORIGIN, {}
        case "cifar10":
            return cifar.copy(target, params), {}
        case "hub":
            origin = hub.copy(target, params)
            _require_count(picture_tables.count_rows(sorted(target.rglob("*.parquet"))), params)
            return origin, {"columns": params.columns.model_dump(mode="json")}
        case "laion":
            return laion.copy(target, params)
    return _own_images(target, params), {}


def _require_count(found: int, params: DownloadParams) -> None:
    if params.images is not None and found != params.images:
        raise StageError(
            f"{params.hub.repo} holds {found} images and not {params.images}, so it is another data set or a part of "
            "one; correct download.hub or download.images"
        )


def _own_images(target: Path, params: DownloadParams) -> str:
    if params.url is None:
        path = Path(params.path)
        folder.copy(path, target)
        return path.resolve().name
    if params.url.startswith("s3://"):
        return s3.copy(target, params)
    origin = fetch.fetch(
        [params.url],
        target / "images",
        sha256=params.sha256 or "",
        partial=workspace.scratch() / "downloads",
        max_bytes=params.max_bytes,
        timeout_seconds=params.timeout_seconds,
        allow_private_addresses=params.allow_private_addresses,
    )
    (target / "images").rename(target / f"images.{archives.kind(target / 'images')}")
    return origin


if __name__ == "__main__":
    stage.main(download)
