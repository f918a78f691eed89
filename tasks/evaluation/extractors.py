"""Published networks that measure: brought to where the judge keeps them, as safetensors, pinned to one content."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.params import ExtractorParams, ScoringClipParams
from tasks.runtime import workspace
from tasks.runtime.stage import StageError
from tasks.sources.entry import sha256_of
from tasks.transfer import fetch, weights

MAX_BYTES = 1 << 30
TIMEOUT_SECONDS = 3600
NO_PARTS = ("model",)
"""These models lie in the folder itself, not in parts."""


def place(params: ExtractorParams | ScoringClipParams, target: Path) -> None:
    """Put the network that `params` names into the folder `target`, in the form that `models.judges.pretrained` reads.

    Raises `StageError` where it cannot be had, or is not what its pin says.
    """
    assert params.weights is not None and params.pin is not None, "params.py sees to that"
    target.mkdir()
    if isinstance(params, ExtractorParams) and params.kind == "inception":
        _place_inception(_inception_file(params.weights, params.pin), target)
        return
    folder = weights.bring(params.weights, params.pin, NO_PARTS)
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in weights.KEPT:
            shutil.copyfile(file, target / file.name)


def _place_inception(file: Path, target: Path) -> None:
    from safetensors.torch import save_file

    from models.judges.pretrained import INCEPTION_FILE, read_inception

    try:
        save_file(read_inception(file), target / INCEPTION_FILE)
    except ValueError as error:
        raise StageError(f"{error}; see judge.extractor.weights") from None


def _inception_file(where: str, pin: str) -> Path:
    """The file of the weights: a local one, one behind an http(s) address, or the one in a model folder."""
    if where.startswith(("http://", "https://")):
        folder = workspace.scratch() / "weights"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{pin}.pth"
        if not (target.exists() and sha256_of(target) == pin):
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
        found = sha256_of(path)
        if found != pin:
            raise StageError(f"the sha256 of {path} is {found} and not the pinned {pin}; correct one of them")
        return path
    files = sorted(weights.bring(where, pin, NO_PARTS).glob("*.safetensors"))
    if len(files) != 1:
        raise StageError(
            f"judge.extractor.weights '{where}' hold {len(files)} .safetensors files; name a folder or repository with "
            "Inception's alone"
        )
    return files[0]
