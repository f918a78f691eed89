"""Download of the published CIFAR-10 archive; `tasks/sources/cifar.py` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.runtime import workspace
from tasks.transfer import fetch

if TYPE_CHECKING:
    from tasks.params import DownloadParams


@dataclass(frozen=True)
class Publication:
    """Addresses and checksum of an archive."""

    urls: tuple[str, ...]
    sha256: str


OFFICIAL = Publication(
    (
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/cifar-10-python.tar.gz",
    ),
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
FILE = "cifar-10-python.tar.gz"


def copy(raw: Path, params: DownloadParams, publication: Publication = OFFICIAL) -> str:
    """Fetch the published archive into `raw` and return its address. `params.url` is tried first, if it is set."""
    mirrors = [fetch.address(params.url, "download.url")] if params.url else []
    urls = mirrors + list(publication.urls)
    return fetch.fetch(
        urls,
        raw / FILE,
        sha256=publication.sha256,
        partial=workspace.scratch() / "downloads",
        max_bytes=params.max_bytes,
        timeout_seconds=params.timeout_seconds,
        allow_private_addresses=params.allow_private_addresses,
    )
