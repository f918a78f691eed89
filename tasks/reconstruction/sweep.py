"""Held-out loss and distances of reconstructed averages, one row for each width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.optimization.ema import EMA
from tasks.evaluation.draws import draw
from tasks.evaluation.protocol import require_pipeline
from tasks.formats import latents
from tasks.formats.training_record import FILE as RECORD
from tasks.formats.training_record import TrainingRecord
from tasks.formats.verdict import require_accepted
from tasks.reconstruction import weights
from tasks.runtime.errors import StageError
from tasks.training import checkpoint, held_out
from tasks.training import key as training_key
from tasks.training import run as training_run

if TYPE_CHECKING:
    from models.pipeline import Pipeline
    from models.posthoc_ema import Combination
    from tasks.evaluation.protocol import Protocol
    from tasks.evaluation.scorer import Scorer
    from tasks.formats.averages import Averages
    from tasks.params import Params
    from tasks.training.run import Run


@dataclass(frozen=True)
class Row:
    """The measurements of one width."""

    width: float
    """Relative width of the average."""
    profile_error: float
    """Relative error of its profile; 0 for an average that was stored."""
    held_out_loss: float
    distances: Mapping[str, float]
    """Means over the seed blocks, of unguided samples, by the names of `measurements.json`."""


@dataclass(frozen=True)
class Sweep:
    """What every width is measured with."""

    run: Run
    """The training run before its first step, whose network takes the weights of each width in turn."""
    pipeline: Pipeline
    """Draws with the network of `run`."""
    scorer: Scorer
    protocol: Protocol
    blocks: int
    """Seed blocks."""

    def rows(self, folder: Path, kept: Averages, chosen: Mapping[float, Combination]) -> Iterator[Row]:
        """Yield the measurements of the chosen widths, each with its combination of the snapshots in `folder`."""
        for width, combination in chosen.items():
            self.run.network.load_state_dict(weights.combined(folder, kept, combination)[0])
            yield Row(width, combination.error, self._held_out_loss(), self._distances())

    def floors(self) -> dict[str, float]:
        """Return the distances of training images, over the same seed blocks."""
        return _means([self.scorer.distances(self.scorer.stand_ins(block)) for block in range(self.blocks)])

    def _held_out_loss(self) -> float:
        self.run.averages = {"reconstructed": EMA(self.run.network, self.run.params.pipeline_ema)}
        return held_out.held_out_losses(self.run)["reconstructed"]

    def _distances(self) -> dict[str, float]:
        self.run.network.eval()
        count = self.protocol.measurement.n_distance
        drawn = [draw(self.pipeline, self.protocol, count, self.protocol.unguided, b) for b in range(self.blocks)]
        return _means([self.scorer.distances(each.images) for each in drawn])


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(f"{np.mean([each[name] for each in scores]):.6g}") for name in scores[0]}


def assemble(data: Path, codec: Path, accepted: Path, report: Path, pipeline: Pipeline, params: Params) -> Run:
    """Build the training run that made `pipeline` before its first step, for its objective and held-out batches.

    Raises:
        StageError: if data or parameters are no longer those of the training that `report` describes.
    """
    index, record = latents.read_index(data), TrainingRecord.read(report / RECORD)
    facts = training_key.run_facts(
        index, codec, require_accepted(accepted), params.model, params.diffusion, params.train
    )
    free = {f"train.{name}" for name in training_key.FREE}
    before, now = (
        {name: value for name, value in values.items() if name not in free} | {"data": digest}
        for values, digest in ((record.params, record.dataset.digest), (facts.params, index.digest))
    )
    if changed := checkpoint.differences(before, now):
        raise StageError(f"params.yaml or the data changed since the training ({changed}); run 'dvc repro train'")
    # Precision and compilation serve the speed of training; here losses are compared.
    plain = params.train.model_copy(update={"precision": "no", "compile": False})
    return training_run.assemble(data, index, facts, pipeline.network.config, params.diffusion, plain, codec=codec)


def sweep(run: Run, pipeline: Pipeline, scorer: Scorer, protocol: Protocol, blocks: int) -> Sweep:
    """Return the sweep over `blocks` of the protocol's seed blocks.

    Raises:
        StageError: if the protocol has fewer, or the pipeline does not fit it.
    """
    require_pipeline(pipeline, protocol.measurement)
    if not 1 <= blocks <= protocol.measurement.seed_blocks:
        raise StageError(
            f"--blocks {blocks} must lie between 1 and evaluate.seed_blocks {protocol.measurement.seed_blocks}"
        )
    return Sweep(run, replace(pipeline, network=run.network), scorer, protocol, blocks)


def to_json(row: Row) -> dict[str, object]:
    """Return the row with its distances beside the other columns."""
    columns = asdict(row)
    return {**columns.pop("distances"), **columns}
