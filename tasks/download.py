"""The stage `download`: the source as published, verified, with a manifest of its files and origin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.params import DownloadParams
from tasks.runtime import atomic, stage, workspace
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.json_files import JsonObject


def download(raw: Path, params: DownloadParams) -> None:
    """Fetch the source as published into data/raw, verify its checksum and write a manifest beside it."""
    from tasks.sources.entry import read_manifest, write_manifest

    with atomic.writing_folder(raw) as target:
        origin, details = _fetch(target, params)
        write_manifest(target, params.source, origin, params.licence, details)
    manifest = read_manifest(raw)
    size = sum(file.size for file in manifest.files)
    print(f"download: {len(manifest.files)} files, {size} bytes from {manifest.origin}")


def _fetch(target: Path, params: DownloadParams) -> tuple[str, JsonObject]:
    """Fetch the files into `target`; return the origin, without credentials, and the details of the manifest."""
    match params.source:
        case "digits":
            from tasks.sources import digits

            digits.copy(target)
            return digits.ORIGIN, {}
        case "cifar10":
            from tasks.sources import cifar

            return cifar.copy(target, params), {}
        case "hub":
            from tasks.sources import picture_tables
            from tasks.transfer import hub

            origin = hub.copy(target, params)
            _require_count(picture_tables.count_rows(sorted(target.rglob("*.parquet"))), params)
            return origin, {"columns": params.columns.model_dump(mode="json")}
        case "laion":
            from tasks.transfer import laion

            return laion.copy(target, params)
    return _own_images(target, params), {}


def _require_count(found: int, params: DownloadParams) -> None:
    if params.images is not None and found != params.images:
        raise StageError(
            f"{params.hub.repo} holds {found} images, not {params.images}; correct download.hub or download.images"
        )


def _own_images(target: Path, params: DownloadParams) -> str:
    """Fetch a local or remote folder or archive of images; return its name or URL."""
    if params.url is None:
        from tasks.sources import folder

        path = Path(params.path)
        folder.copy(path, target)
        return path.resolve().name
    if params.url.startswith("s3://"):
        from tasks.transfer import s3

        return s3.copy(target, params)
    from tasks.sources import archives
    from tasks.web import fetch

    origin = fetch.fetch(
        [fetch.address(params.url, "download.url")],
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
