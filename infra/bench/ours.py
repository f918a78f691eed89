"""Our side of a comparison: the training loop of `tasks/train.py`, a number of steps at a time.

It runs without MLflow and without sample grids, as the reference runs without a tracker and without samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.bench.clock import now
from tasks import train
from tasks.formats import latents
from tasks.formats.verdict import require_accepted
from tasks.training import key as training_key
from tasks.training import run as training_run

if TYPE_CHECKING:
    import torch

    from infra.bench.inputs import Inputs
    from tasks.params import Params


class Ours:
    """One run of the project's training."""

    def __init__(self, params: Params, inputs: Inputs) -> None:
        index = latents.read_index(inputs.latents)
        verdict = require_accepted(inputs.accepted)
        sections = (params.model, params.diffusion, params.train)
        facts = training_key.run_facts(index, inputs.codec, verdict, *sections)
        network = training_run.network_config(index.input_spec, params.model)
        self.run = training_run.prepare(
            inputs.latents, index, facts, network, params.diffusion, params.train, codec=inputs.codec
        )
        self.config = self.run.network.config

    def advance(self, steps: int) -> tuple[float, float]:
        """Make `steps` optimizer steps; returns `now()` after the last."""
        train.fit(self.run, None, [], until=self.run.step + steps)
        return now()

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name."""
        return self.run.averages[self.run.params.pipeline_ema].state_dict()
