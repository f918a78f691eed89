"""Weights from the middle of a training that go into the pipeline beside the final ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from models.optimization import sharding

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.training.run import Run

PREFIX = "companion-"
"""First part of their groups' names in checkpoints."""


def keep(run: Run) -> None:
    """Copy the average for the pipeline if a companion is due at this step: the guide of autoguidance."""
    if run.step == run.params.guide_step:
        keep_average(run, "guide")


def keep_average(run: Run, name: str) -> None:
    """Copy the average for the pipeline as the companion `name`."""
    average = run.averages[run.params.pipeline_ema]
    run.companions[name] = {
        key: sharding.whole(value.detach())
        .cpu()
        .clone(memory_format=torch.contiguous_format)  # which files of weights need
        for key, value in average.state_dict().items()
    }


def groups(run: Run) -> dict[str, dict[str, Tensor]]:
    """Return the companions as groups of tensors for a checkpoint."""
    return {f"{PREFIX}{name}": weights for name, weights in run.companions.items()}


def restored(tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return the companions among the groups of a checkpoint."""
    return {name.removeprefix(PREFIX): group for name, group in tensors.items() if name.startswith(PREFIX)}
