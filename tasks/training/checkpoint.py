"""Checkpoints: everything that a run needs to continue, in one atomically written folder per step.

`<scratch>/train/<key>/step-00000100/` holds safetensors files, `extra.json`, and `manifest.json` with the SHA-256 of
each. A folder whose files do not match its manifest is skipped with a warning.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.hashing import file_sha256
from models.json_files import Description, JsonObject, read_json
from models.optimization import sharding
from tasks.runtime import atomic
from tasks.runtime.errors import StageError
from tasks.runtime.stage import is_disk_full

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 2
SUFFIX = ".safetensors"
EXTRA, MANIFEST = "extra.json", "manifest.json"


@dataclass(frozen=True)
class Manifest(Description):
    """`manifest.json`: the step and architecture of a checkpoint, and the checksums of its files."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "remove that folder"

    step: int
    network: JsonObject
    """The architecture."""
    held_out_loss: float | None
    """The loss at this step, if it was measured."""
    sha256: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Group -> name -> tensor; the groups are the model, the optimizer, the tally and each weight average.

    They are on the CPU once `copied` has happened.
    """
    history: list[dict[str, float]]
    """Rows of the history, as `HistoryRow.to_json` returns them."""
    network: JsonObject
    """The architecture."""
    scaler: JsonObject | None = None
    """State of the fp16 loss scaler."""
    held_out_loss: float | None = None
    """The loss at this step, if it was measured."""
    copied: torch.cuda.Event | None = None
    """Recorded after the copies from a GPU, which the host has not waited for; None if they are complete."""


class Writer:
    """Writes checkpoints in a thread, one at a time, while the training continues.

    An error of the thread is raised by the next call.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint, whose tensors nobody changes any more, after the one before is complete."""
        self.wait()
        self._pending = self._thread.submit(self._write, checkpoint)

    def wait(self) -> None:
        """Return when nothing is being written; raises what writing the last checkpoint raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest_before(self, step: int) -> Path | None:
        """Return the newest checkpoint from before `step`, also if it is still being written, or None."""
        self.wait()
        return next((path for path in reversed(_folders(self.folder)) if step_of(path) < step), None)

    def close(self) -> None:
        """Complete the checkpoint that is being written, after an error elsewhere, and end the thread."""
        self._thread.shutdown()

    def _write(self, checkpoint: Checkpoint) -> None:
        if checkpoint.copied is not None:
            checkpoint.copied.synchronize()
        save(self.folder, checkpoint)


def host_copies(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Copy tensors to the CPU, contiguous; from a GPU to pinned memory, without waiting for it (`copy_finished`).

    Sharded tensors are gathered one after the other, for which every process calls this; without `keep` nothing is
    copied.
    """
    copies = {}
    for name, sharded in tensors.items():
        tensor = sharding.whole(sharded)
        if not keep:
            continue
        pinned = tensor.device.type == "cuda"
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        copies[name].copy_(tensor.detach(), non_blocking=pinned)
    return copies


def copy_finished(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that happens after all copies begun so far; None on a CPU, which copies at once."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, then delete all but the newest `KEEP` and the one with the smallest held-out loss."""
    with atomic.writing_folder(folder / f"step-{checkpoint.step:08d}") as temporary:
        for group, tensors in checkpoint.tensors.items():
            try:
                save_file(tensors, temporary / f"{group}{SUFFIX}")
            except SafetensorError as error:  # not an OSError, even if the disk is full
                raise StageError(
                    f"the checkpoint of step {checkpoint.step} could not be written to {folder} ({_reason(error)}); "
                    "the one before it is kept, and the same command continues from there"
                ) from None
        atomic.write_json(temporary / EXTRA, {"history": checkpoint.history, "scaler": checkpoint.scaler})
        Manifest(
            step=checkpoint.step,
            network=checkpoint.network,
            held_out_loss=checkpoint.held_out_loss,
            sha256={file.name: file_sha256(file) for file in sorted(temporary.iterdir())},
        ).write(temporary / MANIFEST)
    best = best_of(folder)
    for old in _folders(folder)[:-KEEP]:
        if old != best:
            shutil.rmtree(old)


def _reason(error: Exception) -> str:
    return "no space left on the device: free some" if is_disk_full(error) else str(error)


def refuse_other_network(folder: Path, network: JsonObject) -> None:
    """Raise `StageError`, before any weight is read, if a checkpoint in `folder` has another architecture."""
    for candidate in _folders(folder):
        manifest = _manifest(candidate)
        if manifest and manifest.network != network:
            raise StageError(
                f"{candidate} was made by another network ({differences(manifest.network, network)}); "
                "remove that folder, or set the section model as it was"
            )


def load_newest(folder: Path, at_most: int, warn: bool = True) -> Checkpoint | None:
    """Load the newest undamaged checkpoint of at most `at_most` steps, or None.

    Damaged checkpoints are named on standard error if `warn`.
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
    """Return the checkpoint with the smallest held-out loss, or None if none was measured."""
    manifests = [(_manifest(path), path) for path in _folders(folder)]
    measured = [(found.held_out_loss, path) for found, path in manifests if found and found.held_out_loss is not None]
    return min(measured)[1] if measured else None


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def differences(before: JsonObject, after: JsonObject) -> str:
    """List the differences of two flat mappings, as `key before -> after`."""
    keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return ", ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in keys)


def _load(folder: Path) -> Checkpoint:
    manifest = Manifest.read(folder / MANIFEST)
    for name, expected in manifest.sha256.items():
        if file_sha256(folder / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    extra = read_json(folder / EXTRA)
    groups = [name for name in manifest.sha256 if name.endswith(SUFFIX)]
    return Checkpoint(
        step=manifest.step,
        tensors={name.removesuffix(SUFFIX): load_file(folder / name) for name in groups},
        history=extra["history"],
        scaler=extra["scaler"],
        network=manifest.network,
        held_out_loss=manifest.held_out_loss,
    )


def _manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a checkpoint; None if it is unreadable, which `load_newest` reports."""
    try:
        return Manifest.read(folder / MANIFEST)
    except (OSError, ValueError):
        return None


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
