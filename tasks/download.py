"""The stage `download`: the source as published, verified, with a record of where it came from."""

from __future__ import annotations

from pathlib import Path

from tasks import atomic, digits, source, stage
from tasks.params import DownloadParams


def download(raw: Path, params: DownloadParams) -> None:
    """Fetch the source as published into data/raw, verify its checksum and write a manifest beside it."""
    with atomic.writing_folder(raw) as folder:
        digits.copy(folder)
        source.write_manifest(folder, params.source, digits.ORIGIN, params.licence)
    print(f"download: {source.read_manifest(raw)['sha256']}")


if __name__ == "__main__":
    stage.main(download)
