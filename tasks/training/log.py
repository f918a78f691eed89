"""What training tells of itself: the history that it leaves behind, and the speed that only MLflow is told.

A row of the history is the same in every run of the same training, killed or not. Speed and memory are not, and
never enter it.
"""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.runtime.stage import StageError
from tasks.training import checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from tasks.training.run import Run

Row = dict[str, float]

BUCKETS = 4
"""Equal ranges of timesteps whose losses are told apart: the first is nearly clean, the last nearly noise."""
EXPLODED, EXPLODED_ROWS, BEFORE_ROWS = 5.0, 3, 20
"""A loss that is above 5 times its median of the 20 rows before, in 3 rows one after the other, has exploded."""


class Tally:
    """Sums since the last row of the history, kept on the device: nobody waits for a value before a row is due.

    `sums` float64 [BUCKETS + 1, 2]: total and count of the losses of each range of timesteps, then of the norms
    of the gradients.
    """

    def __init__(self, timesteps: int, device: torch.device) -> None:
        import torch

        self.timesteps = timesteps
        self.sums = torch.zeros(BUCKETS + 1, 2, dtype=torch.float64, device=device)

    def add_losses(self, t: Tensor, losses: Tensor) -> None:
        """Losses [B] of samples at timesteps int64 [B]."""
        import torch

        pairs = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)], dim=1)
        self.sums.index_add_(0, t * BUCKETS // self.timesteps, pairs)

    def add_gradient_norm(self, norm: Tensor) -> None:
        """The norm before clipping; one that overflowed in fp16, whose step was skipped, is left out."""
        finite = norm.isfinite()
        self.sums[BUCKETS, 0] += norm.where(finite, 0.0)
        self.sums[BUCKETS, 1] += finite

    def row(self, summed: Tensor) -> Row:
        """`loss`, `loss_t<first>_<last>` of each range and `grad_norm`, from `sums` added up over all processes."""
        losses, counts = (column.tolist() for column in summed.T)
        row = {"loss": sum(losses[:BUCKETS]) / sum(counts[:BUCKETS])}
        for bucket, name in enumerate(bucket_names(self.timesteps)):
            if counts[bucket]:
                row[name] = losses[bucket] / counts[bucket]
        if counts[BUCKETS]:
            row["grad_norm"] = losses[BUCKETS] / counts[BUCKETS]
        return row

    def clear(self) -> None:
        self.sums.zero_()


def bucket_names(timesteps: int) -> list[str]:
    """Columns of the history for the losses of each range of timesteps."""
    edges = [-(-timesteps * bucket // BUCKETS) for bucket in range(BUCKETS + 1)]
    return [f"loss_t{first}_{after - 1}" for first, after in itertools.pairwise(edges)]


def refuse_divergence(history: Sequence[Row], folder: Path) -> None:
    """Raise `StageError` where the newest loss is no number, or the newest ones are far above those before them."""
    loss, step = history[-1]["loss"], int(history[-1]["step"])
    if not math.isfinite(loss):
        raise diverged(f"the loss is {loss} at step {step}", step, folder)
    suspects, before = history[-EXPLODED_ROWS:], history[-EXPLODED_ROWS - BEFORE_ROWS : -EXPLODED_ROWS]
    if not before:
        return
    usual = statistics.median(row["loss"] for row in before)
    if all(row["loss"] > EXPLODED * usual for row in suspects):
        what = f"the loss has exploded: {loss:.4g} at step {step}, {loss / usual:.0f} times what it was"
        raise diverged(what, int(before[-1]["step"]) + 1, folder)


def refuse_bad_gradient(norm: float, step: int, folder: Path) -> None:
    """Raise `StageError` rather than keep the weights of a step whose gradient was no number."""
    if not math.isfinite(norm):
        raise diverged(f"the gradient's norm is {norm} at step {step}", step, folder)


def diverged(what: str, step: int, folder: Path) -> StageError:
    """The error of a run that went wrong at `step` or later."""
    good = checkpoint.newest_before(folder, step)
    kept = f"the last good checkpoint is {good}" if good else "no checkpoint is older than that"
    return StageError(
        f"{what}; lower train.learning_rate or train.clip_norm, lengthen train.warmup_steps, or set train.precision "
        f"to 'no' ({kept})"
    )


class Meter:
    """Images per second, utilisation and memory, for the progress bar and MLflow."""

    def __init__(self, run: Run) -> None:
        import torch

        from models import flops

        kinds = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.device = run.accelerator.device
        ceiling = flops.matmul_ceiling(self.device, kinds[run.params.precision])
        self.ceiling = ceiling * run.accelerator.num_processes
        first = run.held_out[0].split(1)[0]
        self.flops = 3 * flops.forward_flops(run.network, first.x0, first.t, first.condition)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # those large matrices are no part of training
        self.start()

    def start(self) -> None:
        self._since, self._images = time.perf_counter(), 0

    def count(self, images: int) -> None:
        self._images += images

    def read(self) -> Row:
        """Since `start`: images per second, and what their matrix products are of a large product's speed."""
        rate = self._images / (time.perf_counter() - self._since)
        return {
            "img_per_s": rate,
            "model_flops_utilisation": rate * self.flops / self.ceiling,
            "peak_memory_mb": self._peak() / 1e6,
        }

    def _peak(self) -> float:
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest * (1 if sys.platform == "darwin" else 1024)


def columns(timesteps: int, averages: Sequence[str], chosen: str) -> list[str]:
    """Columns of `history.csv`, in order."""
    others = [f"held_out_loss/{name}" for name in averages if name != chosen]
    return ["step", "loss", "held_out_loss", "learning_rate", "grad_norm", *bucket_names(timesteps), *others]


def as_written(row: Row, chosen: str) -> Row:
    """A row as others read it: the held-out loss of the average that goes into the pipeline has the plain name."""
    return {"held_out_loss" if name == f"held_out_loss/{chosen}" else name: value for name, value in row.items()}
