"""Pretrained feature extractors: downloaded, verified and stored as safetensors in the folder of the judge."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from models.hashing import file_sha256
from models.judges.pretrained import INCEPTION_FILE, read_inception
from tasks.params import ExtractorParams, ScoringClipParams
from tasks.pretrained import weights
from tasks.runtime import workspace
from tasks.runtime.errors import StageError
from tasks.web import fetch

MAX_BYTES = 1 << 30
TIMEOUT_SECONDS = 3600
NO_PARTS = ("model",)
"""These models have no subfolders; their files lie in the folder itself."""


def place(params: ExtractorParams | ScoringClipParams, target: Path) -> None:
    """Copy the network that `params` selects to the folder `target`, in the layout of `models.judges.pretrained`.

    Raises `StageError` if it cannot be read, or differs from its pin.
    """
    assert params.weights is not None and params.pin is not None, "checked by tasks.params"
    target.mkdir()
    if isinstance(params, ExtractorParams) and params.kind == "inception":
        _place_inception(_inception_file(params.weights, params.pin), target)
        return
    folder = weights.local_folder(params.weights, params.pin, NO_PARTS)
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in weights.KEPT:
            shutil.copyfile(file, target / file.name)


def _place_inception(file: Path, target: Path) -> None:
    try:
        save_file(read_inception(file), target / INCEPTION_FILE)
    except ValueError as error:
        raise StageError(f"{error}; see judge.extractor.weights") from None


def _inception_file(where: str, pin: str) -> Path:
    """The weights of Inception: a local file, a download from an http(s) URL, or the only file of a model folder."""
    where = fetch.address(where, "judge.extractor.weights")
    if where.startswith(("http://", "https://")):
        folder = workspace.scratch() / "weights"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{pin}.pth"
        if not (target.exists() and file_sha256(target) == pin):
            fetch.fetch(
                [where],
                target,
                sha256=pin,
                partial=folder,
                max_bytes=MAX_BYTES,
                timeout_seconds=TIMEOUT_SECONDS,
            )
        return target
    path = Path(where).expanduser()
    if path.is_file():
        found = file_sha256(path)
        if found != pin:
            raise StageError(f"the sha256 of {path} is {found} and not the pinned {pin}; correct one of them")
        return path
    files = sorted(weights.local_folder(where, pin, NO_PARTS).glob("*.safetensors"))
    if len(files) != 1:
        raise StageError(
            f"judge.extractor.weights '{where}' holds {len(files)} .safetensors files; use a folder or repository with "
            "exactly one"
        )
    return files[0]
