"""Snapshots of the power-law averages during a training.

They lie beside the checkpoints as float32 while a run trains. The output `averages` of a finished run holds them as
differences from the first power-law average after the last step, the reference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from models.hashing import files_sha256
from models.optimization import sharding
from models.optimization.ema import EMA, gamma_of
from tasks.formats.averages import FILE, REFERENCE, Averages, Snapshot
from tasks.params.model import snapshot_spacing
from tasks.runtime import atomic

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.training.run import Run

FOLDER = "averages"
DIFFERENCE = torch.float16
"""Type of the differences from the reference in the output. Weights themselves would lose too much in float16: rounding
moves them by as much as the narrow averages differ from each other (docs/training.md)."""


def kept_steps(steps: int, most: int) -> list[int]:
    """Return the steps of which a run of `steps` steps keeps snapshots, besides the last: at most `most`."""
    if not most:
        return []
    spacing = snapshot_spacing(steps, most)
    return [*range(spacing, steps + 1, spacing)]


def keep(run: Run) -> None:
    """Write the averages after this step beside the checkpoints, if it is one to keep.

    The first process calls it, and every process of a sharded run, of which the first one writes.
    """
    if run.step in kept_steps(run.params.steps, run.params.ema_snapshots):
        for profile, average in _power_laws(run).items():
            tensors = _tensors(average)
            if not run.accelerator.is_main_process:
                continue
            with atomic.writing(run.folder / FOLDER / _name(run.step, profile)) as temporary:
                save_file(tensors, temporary)


def write(averages: Path, run: Run, train_key: str) -> None:
    """Write the output of a finished run: the kept snapshots and the averages after the last step, as differences."""
    most = run.params.ema_snapshots
    steps = sorted({*kept_steps(run.step, most), run.step}) if most else []
    found, missing = [], 0
    with atomic.writing_folder(averages) as folder:
        reference = _tensors(next(iter(_power_laws(run).values()))) if most else {}
        for step in steps:
            for profile, average in _power_laws(run).items():
                snapshot = Snapshot(file=_name(step, profile), step=step, profile=profile)
                source = run.folder / FOLDER / snapshot.file
                if step < run.step and not source.is_file():
                    missing += 1
                    continue
                tensors = _tensors(average) if step == run.step else load_file(source)
                differences = {name: (value - reference[name]).to(DIFFERENCE) for name, value in tensors.items()}
                save_file(differences, folder / snapshot.file)
                found.append(snapshot)
        save_file(reference, folder / REFERENCE)
        Averages(train_key=train_key, steps=run.step, snapshots=found, files=files_sha256(folder)).write(folder / FILE)
    if missing:  # deleted by hand, or this run continued from a longer one, which keeps fewer
        print(f"train: {missing} snapshots of the averages are missing in {run.folder / FOLDER}", file=sys.stderr)


def _power_laws(run: Run) -> dict[str, EMA]:
    return {profile: average for profile, average in run.averages.items() if gamma_of(profile) is not None}


def _name(step: int, profile: str) -> str:
    return f"step-{step:08d}.{profile}.safetensors"


def _tensors(average: EMA) -> dict[str, Tensor]:
    """Return the average as float32 on the CPU, by parameter name."""
    return {name: sharding.whole(value).cpu().contiguous() for name, value in average.state_dict().items()}
