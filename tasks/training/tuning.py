"""The phase of consistency tuning in a training: where it begins, and its objective, timesteps and learning rates.

Before `train.distil.after` a run trains as without it, up to a learning rate of 0 under a cosine; that phase is empty
if it tunes given weights. Everything follows from the step, so that an interrupted run continues exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.optimization import consistency
from models.optimization.timesteps import Timesteps
from tasks.training import companions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.params import DistilParams, TrainParams
    from tasks.training.batches import Batch
    from tasks.training.log import HistoryRow
    from tasks.training.run import LossFunction, Run

TEACHER = "teacher"
"""The companion with the weights that the tuning began from."""


def hyperparameters(params: DistilParams) -> consistency.Tuning:
    """Return the hyperparameters of the section `train.distil`."""
    return consistency.Tuning(params.q, params.k, params.b, params.c, params.d, params.noise_mean, params.noise_std)


def begin(run: Run) -> None:
    """At the first step of the tuning, go on from the averaged weights, which are kept as the teacher.

    The optimizer starts anew, because its moments are those of another loss, and so does every average.
    """
    distil = run.params.distil
    if distil is None or run.step != distil.after:
        return
    companions.keep_average(run, TEACHER)
    teacher = run.averages[run.params.pipeline_ema]
    teacher.copy_to_module()
    for average in run.averages.values():
        average.load_state_dict(teacher.state_dict())
    run.optimizer.state.clear()


def objective_at(run: Run, step: int) -> LossFunction:
    """Return the objective of 0-based `step`."""
    distil = run.params.distil
    if distil is None or step < distil.after:
        return run.objective
    tuning, done = hyperparameters(distil), step - distil.after

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        return consistency.losses(
            network,
            run.timesteps,
            run.diffusion.prediction,
            batch.x0,
            batch.eps,
            batch.t,
            batch.condition,
            done,
            tuning,
        )

    return objective


def timesteps_of(timesteps: Timesteps, params: DistilParams) -> Timesteps:
    """Return the timesteps of the tuning, on the path of `timesteps`."""
    return Timesteps(timesteps.path, timesteps.device, hyperparameters(params).density)


def rows_of_phase(rows: Sequence[HistoryRow], params: TrainParams) -> list[HistoryRow]:
    """Return the rows of the history that belong to the phase of the last one, whose losses compare."""
    begin = params.phase(rows[-1].step - 1).start
    return [row for row in rows if row.step > begin]
