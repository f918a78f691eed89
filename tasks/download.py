"""The stage `download`: the source as published, verified, with a record of where it came from."""

from __future__ import annotations

from pathlib import Path

from tasks import archives, atomic, cifar, digits, fetch, folder, stage, workspace
from tasks.params import DownloadParams
from tasks.source import read_manifest, write_manifest


def download(raw: Path, params: DownloadParams) -> None:
    """Fetch the source as published into data/raw, verify its checksum and write a manifest beside it."""
    with atomic.writing_folder(raw) as target:
        write_manifest(target, params.source, _bring(target, params), params.licence)
    manifest = read_manifest(raw)
    print(f"download: {manifest['file']}, {manifest['size']} bytes from {manifest['origin']}")


def _bring(target: Path, params: DownloadParams) -> str:
    """Put the one published file into `target`; returns where it came from, without anything private."""
    if params.source == "digits":
        digits.copy(target)
        return digits.ORIGIN
    if params.source == "cifar10":
        return cifar.copy(target, params)
    if params.url is None:
        path = Path(params.path)
        folder.copy(path, target)
        return path.resolve().name
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
