"""Parameters of easy consistency tuning: the sub-section `train.distil`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from tasks.params.section import NO_PATH, PositiveInt, Section

if TYPE_CHECKING:
    from tasks.params.model import TrainParams

SMALLEST_GAP = 1e-4
"""Least relative gap between the two noise levels of a pair; float32 does not resolve much smaller ones."""


class DistilParams(Section):
    """Easy consistency tuning (Geng et al. 2024) of a trained network; `q`, `k`, `b`, `c` and `d` as in the paper."""

    after: Annotated[int, Field(ge=0)]
    """Step at which the tuning begins: 0 tunes the weights of `train.init_from` or `train.weights`; a later one first
    trains the network to be tuned, with its own warm-up and learning rate schedule."""
    d: PositiveInt = 100
    """Steps per stage; each stage divides the gap between the two noise levels of a pair by q."""
    q: Annotated[float, Field(gt=1)] = 2.0
    """Factor by which each stage divides the gap."""
    k: Annotated[float, Field(ge=0)] = 8.0
    """How much wider the gap is at low noise, see `b`."""
    b: Annotated[float, Field(gt=0)] = 1.0
    """n(t) = 1 + k sigmoid(-b t) widens the gap at low noise."""
    c: Annotated[float, Field(gt=0)] = 0.00054
    """Constant of the pseudo-Huber loss of values in [-1, 1]."""
    noise_mean: float = -1.1
    """Mean of the logarithm of the relative noise sigma / alpha, which is normally distributed."""
    noise_std: Annotated[float, Field(gt=0)] = 2.0
    """Standard deviation of that logarithm."""
    learning_rate_factor: Annotated[float, Field(gt=0)] = 1.0
    """Peak learning rate of the tuning, relative to that of the training."""

    def check(self, train: TrainParams) -> None:
        """Raise `ValueError` unless `train` has room for the tuning, and a trained network to begin from."""
        if self.after == 0 and train.init_from == NO_PATH and train.weights is None:
            raise ValueError(
                "train.distil tunes a trained network; name one in train.init_from or train.weights, or set "
                "train.distil.after to the number of steps that train one first"
            )
        self._check_phases(train.steps, train.warmup_steps)
        if train.guide_step:
            raise ValueError(
                "train.guide_step keeps a guide of autoguidance, which a model tuned by train.distil is not compared "
                "with; set it to 0, or train.distil to null"
            )
        if train.ema_snapshots:
            raise ValueError(
                f"train.ema_snapshots {train.ema_snapshots} keeps averages of a whole run, and train.distil starts "
                "them anew; set train.ema_snapshots to 0"
            )

    def _check_phases(self, steps: int, warmup_steps: int) -> None:
        """The tuning and the training before it fit into `train.steps`."""
        if self.after >= steps:
            raise ValueError(
                f"train.distil.after {self.after} leaves nothing of train.steps {steps} to the consistency tuning; "
                "lower it"
            )
        shorter = min(steps - self.after, self.after or steps)
        if warmup_steps >= shorter:
            raise ValueError(
                f"train.warmup_steps {warmup_steps} comes before the training and before the consistency tuning "
                f"(train.distil), of which the shorter one has {shorter} steps; lower it"
            )
        stages = -(-(steps - self.after) // self.d)
        if stages * math.log(self.q) > -math.log(SMALLEST_GAP):
            raise ValueError(
                f"train.distil.q {self.q:g} to the power of {stages} stages exceeds {1 / SMALLEST_GAP:g}, so that the "
                "two noise levels of a pair would be equal; raise train.distil.d"
            )
