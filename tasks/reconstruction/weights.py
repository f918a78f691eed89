"""Weights of averages that no training kept, from the snapshots of those that it did."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file

from models.hashing import files_sha256
from models.networks import published
from models.networks.text_unet import adapter, merged
from models.optimization.ema import gamma_of
from models.pipeline import ADAPTER, INFO, PipelineInfo
from models.posthoc_ema import Combination, Stored, combine
from tasks.formats.averages import FILE, REFERENCE, Averages
from tasks.runtime import integrity
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_ERROR = 0.1
"""Largest relative error of a profile that passes for the average of that width."""


def open_averages(folder: Path) -> Averages:
    """Read the description of the snapshots that `train` wrote into `folder`.

    Raises:
        StageError: if files are missing or damaged, or the training kept no snapshots.
    """
    with integrity.loading(folder, FILE, "train"):
        kept = Averages.read(folder / FILE)
    if not kept.snapshots:
        raise StageError(
            "the training kept no snapshots of power-law averages; add std-0.05 and std-0.10 to train.ema, set "
            "train.ema_snapshots to 16 and run 'dvc repro train'"
        )
    return kept


def approximate(kept: Averages, std: float) -> Combination:
    """Return the combination of the snapshots that is closest to the average of relative width `std` after the run.

    Raises:
        StageError: for a width that no power law has.
    """
    exponents = [(snapshot.step, gamma_of(snapshot.profile)) for snapshot in kept.snapshots]
    try:
        return combine([Stored(step, gamma) for step, gamma in exponents if gamma is not None], std, kept.steps)
    except ValueError as error:
        raise StageError(str(error)) from None


def in_reach(kept: Averages, std: float) -> Combination:
    """Return `approximate`, if its profile is close to the wanted one.

    Raises:
        StageError: if it is not.
    """
    combination = approximate(kept, std)
    if combination.error > MAX_ERROR:
        raise StageError(
            f"the width {std:g} is out of reach of the snapshots: the error of its profile is {combination.error:.0%}, "
            f"over {MAX_ERROR:.0%}; choose one nearer to the widths in train.ema, or raise train.ema_snapshots and run "
            "'dvc repro train'"
        )
    return combination


def combined(folder: Path, kept: Averages, combination: Combination) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weighted sum of the snapshots in `folder`: state dict of the network, and LoRA adapter if it has one.

    The coefficients add up to 1, so it is the reference plus the weighted sum of the differences from it. float32,
    summed in float64, one tensor at a time, because the snapshots of a large network may not fit into memory.

    Raises:
        StageError: if the training left base weights as they were, which the snapshots then lack.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / snapshot.file, framework="pt")) for snapshot in kept.snapshots]
        reference = stack.enter_context(safe_open(folder / REFERENCE, framework="pt"))
        names = list(reference.keys())
        if any(".lora_" in name for name in names) and not any(".base_layer." in name for name in names):
            raise StageError(
                "the training changed a LoRA adapter alone (model.lora_rank), so its snapshots lack the base weights; "
                "reconstruct averages of a training of all weights"
            )
        weights = {}
        for name in names:
            total = reference.get_tensor(name).double()
            for coefficient, file in zip(combination.coefficients.tolist(), files, strict=True):
                total.add_(file.get_tensor(name).double(), alpha=coefficient)
            weights[name] = total.float()
    return merged(weights), adapter(weights)


def save_with_weights(folder: Path, template: Path, state: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> None:
    """Write a copy of the pipeline folder `template` with other weights of its network into an existing empty `folder`.

    `state` and `lora` are the `weights` and `adapter` of `save_pipeline`; `lora` is empty for a model without one.
    """
    shutil.copytree(template, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)  # not the mode: DVC's is 0444
    info = PipelineInfo.read(folder / INFO)
    (folder / INFO).unlink()
    save_file(dict(state), published.parts(folder)[0] / published.WEIGHTS, metadata={"format": "pt"})
    if lora:
        save_file(dict(lora), folder / ADAPTER, metadata={"format": "pt"})
    replace(info, files=files_sha256(folder)).write(folder / INFO)
