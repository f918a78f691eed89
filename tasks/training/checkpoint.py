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

from tasks.runtime import atomic
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 2
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by group (model, optimizer, each average), `extra` JSON values such as the loss history.

    `network` is the architecture, as JSON; `held_out_loss` what was measured at this very step, if it was.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    extra: dict[str, Any]
    network: dict[str, Any]
    held_out_loss: float | None = None


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write one checkpoint and remove all but the newest `KEEP` and the one with the smallest held-out loss."""
    from safetensors.torch import save_file

    with atomic.writing_folder(folder / f"step-{checkpoint.step:08d}") as temporary:
        for group, tensors in checkpoint.tensors.items():
            save_file(tensors, temporary / f"{group}.safetensors")
        atomic.write_json(temporary / "extra.json", checkpoint.extra)
        manifest = {
            "step": checkpoint.step,
            "network": checkpoint.network,
            "held_out_loss": checkpoint.held_out_loss,
            "sha256": {file.name: _sha256(file) for file in sorted(temporary.iterdir())},
        }
        atomic.write_json(temporary / "manifest.json", manifest)
    best = best_of(folder)
    for old in _folders(folder)[:-KEEP]:
        if old != best:
            shutil.rmtree(old)


def refuse_other_network(folder: Path, network: dict[str, Any]) -> None:
    """Raise `StageError`, before a weight is read, where a checkpoint in `folder` is of another architecture."""
    for candidate in _folders(folder):
        theirs = _manifest(candidate).get("network", network)
        if theirs != network:
            raise StageError(
                f"{candidate} was made by another network ({differences(theirs, network)}); "
                "remove that folder, or set the section model as it was"
            )


def load_newest(folder: Path, at_most: int, warn: bool = True) -> Checkpoint | None:
    """The newest sound checkpoint of `folder` with no more than `at_most` steps, or None.

    One that is passed over because it is damaged is named on standard error, unless another process does (`warn`).
    """
    for candidate in reversed(_folders(folder)):
        if step_of(candidate) > at_most:
            continue
        try:
            return _load(candidate)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if warn:
                print(f"checkpoint {candidate.name} is damaged ({error}); trying the one before", file=sys.stderr)
    return None


def best_of(folder: Path) -> Path | None:
    """The checkpoint of `folder` with the smallest held-out loss, or None where none was measured."""
    measured = [(loss, path) for path in _folders(folder) if (loss := _manifest(path).get("held_out_loss")) is not None]
    return min(measured)[1] if measured else None


def newest_before(folder: Path, step: int) -> Path | None:
    """The newest checkpoint of `folder` from before `step`, or None."""
    return next((path for path in reversed(_folders(folder)) if step_of(path) < step), None)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What differs between two flat mappings, as `key theirs -> ours`."""
    keys = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key} {theirs.get(key)} -> {ours.get(key)}" for key in keys)


def _load(folder: Path) -> Checkpoint:
    from safetensors.torch import load_file

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, expected in manifest["sha256"].items():
        if _sha256(folder / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return Checkpoint(
        step=manifest["step"],
        tensors={name.removesuffix(SUFFIX): load_file(folder / name) for name in manifest["sha256"] if SUFFIX in name},
        extra=json.loads((folder / "extra.json").read_text(encoding="utf-8")),
        network=manifest["network"],
        held_out_loss=manifest["held_out_loss"],
    )


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; empty where it cannot be read, which whoever loads the checkpoint says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
