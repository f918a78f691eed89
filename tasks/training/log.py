"""The history of a training run: one row of losses every few steps, and the checks that stop a diverging run.

The history is the same in every run of the same training, killed or not. It therefore holds no speed or memory use,
which `tasks/training/meter.py` measures.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.training.checkpoint import Writer

TIMESTEP_RANGES = 4
"""Equal ranges of timesteps whose losses are averaged separately; the first is nearly clean, the last nearly noise."""
EXPLOSION_FACTOR, EXPLOSION_ROWS, BASELINE_ROWS = 5.0, 3, 20
"""The loss has exploded if 3 rows in a row are above 5 times the median of the 20 rows before them."""
MUON_RATE = "muon_learning_rate"
HELD_OUT, LOSS_OF_RANGE = "held_out_loss/", "loss_t"
"""Prefixes of the columns of a held-out loss and of a range's loss."""


@dataclass(frozen=True)
class HistoryRow:
    """Means over the steps since the row before."""

    step: int
    """Steps done."""
    learning_rate: float
    """Of AdamW at the last step."""
    loss: float
    loss_by_timestep: dict[str, float]
    """Column name -> loss of a range of timesteps; ranges without samples are absent."""
    gradient_norm: float | None
    """Before clipping; None if no norm was finite."""
    held_out_loss: dict[str, float] = field(default_factory=dict)
    """Weight average -> loss on held-out samples; empty if it was not measured at this step."""
    muon_learning_rate: float | None = None
    """Of the last step; None if `train.optimizer` is not Muon."""

    def to_json(self) -> dict[str, float]:
        """Return the row as columns, without those that have no value."""
        row = {"step": self.step, "learning_rate": self.learning_rate, "loss": self.loss, **self.loss_by_timestep}
        if self.gradient_norm is not None:
            row["grad_norm"] = self.gradient_norm
        if self.muon_learning_rate is not None:
            row[MUON_RATE] = self.muon_learning_rate
        return row | {f"{HELD_OUT}{name}": loss for name, loss in self.held_out_loss.items()}

    @classmethod
    def from_json(cls, row: Mapping[str, float]) -> Self:
        """Build the row from the columns that `to_json` returns."""
        return cls(
            step=int(row["step"]),
            learning_rate=row["learning_rate"],
            loss=row["loss"],
            loss_by_timestep={name: loss for name, loss in row.items() if name.startswith(LOSS_OF_RANGE)},
            gradient_norm=row.get("grad_norm"),
            muon_learning_rate=row.get(MUON_RATE),
            held_out_loss={
                name.removeprefix(HELD_OUT): loss for name, loss in row.items() if name.startswith(HELD_OUT)
            },
        )

    def published(self, chosen: str) -> dict[str, float]:
        """Return the columns for readers: `held_out_loss` is that of the average `chosen` for the pipeline."""
        return {"held_out_loss" if name == f"{HELD_OUT}{chosen}" else name: v for name, v in self.to_json().items()}


class Tally:
    """Sums since the last row of the history, kept on the device, so that no step waits for a value.

    `sums` is float64 [TIMESTEP_RANGES + 1, 2]: total and count of the losses of each range of timesteps, then of the
    gradient norms.
    """

    def __init__(self, timesteps: int, device: torch.device) -> None:
        self.timesteps = timesteps
        self.sums = torch.zeros(TIMESTEP_RANGES + 1, 2, dtype=torch.float64, device=device)

    def add_losses(self, t: Tensor, losses: Tensor) -> None:
        """Add the losses [B] of samples at timesteps [B] between 0 and T."""
        pairs = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)], dim=1)
        ranges = (t * TIMESTEP_RANGES).div(self.timesteps, rounding_mode="floor").long()
        self.sums.index_add_(0, ranges.clamp(max=TIMESTEP_RANGES - 1), pairs)

    def add_gradient_norm(self, norm: Tensor) -> None:
        """Add a norm before clipping; one that overflowed in fp16 is left out, because its step was skipped."""
        finite = norm.isfinite()
        self.sums[TIMESTEP_RANGES, 0] += norm.where(finite, 0.0)
        self.sums[TIMESTEP_RANGES, 1] += finite

    def row(self, step: int, learning_rate: float, sums: Tensor) -> HistoryRow:
        """Return the row of the history from `sums` that were added up over all processes."""
        totals, counts = (column.tolist() for column in sums.T)
        names = timestep_range_names(self.timesteps)
        norms = counts[TIMESTEP_RANGES]
        return HistoryRow(
            step=step,
            learning_rate=learning_rate,
            loss=sum(totals[:TIMESTEP_RANGES]) / sum(counts[:TIMESTEP_RANGES]),
            loss_by_timestep={name: totals[i] / counts[i] for i, name in enumerate(names) if counts[i]},
            gradient_norm=totals[TIMESTEP_RANGES] / norms if norms else None,
        )

    def clear(self) -> None:
        """Start the sums of the next row."""
        self.sums.zero_()


def timestep_range_names(timesteps: int) -> list[str]:
    """Return the columns of the losses of each range of timesteps, `loss_t<first>_<last>`."""
    edges = [-(-timesteps * number // TIMESTEP_RANGES) for number in range(TIMESTEP_RANGES + 1)]
    return [f"{LOSS_OF_RANGE}{first}_{after - 1}" for first, after in itertools.pairwise(edges)]


def columns(timesteps: int, averages: Sequence[str], chosen: str, muon: bool = False) -> list[str]:
    """Return the columns of `history.csv`, in order; with `muon`, also Muon's learning rate."""
    others = [f"{HELD_OUT}{name}" for name in averages if name != chosen]
    rates = ["learning_rate", MUON_RATE] if muon else ["learning_rate"]
    return ["step", "loss", "held_out_loss", *rates, "grad_norm", *timestep_range_names(timesteps), *others]


def refuse_divergence(history: Sequence[HistoryRow], checkpoints: Writer) -> None:
    """Raise `StageError` if the newest loss is not finite, or the newest losses are far above those before them."""
    loss, step = history[-1].loss, history[-1].step
    if not math.isfinite(loss):
        raise diverged(f"the loss is {loss} at step {step}", step, checkpoints)
    newest, baseline = history[-EXPLOSION_ROWS:], history[-EXPLOSION_ROWS - BASELINE_ROWS : -EXPLOSION_ROWS]
    if not baseline:
        return
    usual = statistics.median(row.loss for row in baseline)
    if all(row.loss > EXPLOSION_FACTOR * usual for row in newest):
        what = f"the loss has exploded: {loss:.4g} at step {step}, {loss / usual:.0f} times what it was"
        raise diverged(what, baseline[-1].step + 1, checkpoints)


def refuse_bad_gradient(norm: float, step: int, checkpoints: Writer) -> None:
    """Raise `StageError` if the gradient norm is not finite, before the weights of that step are saved."""
    if not math.isfinite(norm):
        raise diverged(f"the gradient's norm is {norm} at step {step}", step, checkpoints)


def diverged(what: str, step: int, checkpoints: Writer) -> StageError:
    """Build the error of a run that diverged at `step` or later; it names the last checkpoint before."""
    good = checkpoints.newest_before(step)
    kept = f"the last good checkpoint is {good}" if good else "no checkpoint is older than that"
    return StageError(
        f"{what}; lower train.learning_rate (with Muon also train.muon_learning_rate) or train.clip_norm, lengthen "
        f"train.warmup_steps, or set train.precision to 'no' ({kept})"
    )
