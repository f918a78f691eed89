"""Checkpoints: everything a run needs to continue, in one atomically written folder per step.

`<scratch>/<key>/step-00000100/` holds safetensors files and, written last, `manifest.json` with the
sha256 of each. A folder whose manifest does not fit its files is passed over with a warning.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import atomic

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by group (model, ema, optimizer), `extra` JSON values such as the loss history."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    extra: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write one checkpoint and remove all but the newest `KEEP`."""
    from safetensors.torch import save_file

    with atomic.writing_folder(folder / f"step-{checkpoint.step:08d}") as temporary:
        for group, tensors in checkpoint.tensors.items():
            save_file(tensors, temporary / f"{group}.safetensors")
        atomic.write_json(temporary / "extra.json", checkpoint.extra)
        hashes = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        atomic.write_json(temporary / "manifest.json", {"step": checkpoint.step, "sha256": hashes})
    for old in _folders(folder)[:-KEEP]:
        shutil.rmtree(old)


def load_newest(folder: Path, at_most: int) -> Checkpoint | None:
    """The newest sound checkpoint of `folder` with no more than `at_most` steps, or None."""
    for candidate in reversed(_folders(folder)):
        if int(candidate.name.removeprefix("step-")) > at_most:
            continue
        try:
            return _load(candidate)
        except (OSError, ValueError, KeyError) as error:
            print(f"checkpoint {candidate.name} is damaged ({error}); trying the one before", file=sys.stderr)
    return None


def _load(folder: Path) -> Checkpoint:
    from safetensors.torch import load_file

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, expected in manifest["sha256"].items():
        if _sha256(folder / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    return Checkpoint(manifest["step"], tensors, json.loads((folder / "extra.json").read_text(encoding="utf-8")))


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
