"""Our side of a comparison: the loop of `tasks/train.py` itself, a number of steps at a time.

MLflow is left out, as the tracker is on the other side; so are the sample grids, which the other side would draw too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.bench.contestant import now
from infra.bench.inputs import Inputs
from tasks.params import Params

if TYPE_CHECKING:
    import torch


class Ours:
    """One run of the project's training."""

    def __init__(self, params: Params, inputs: Inputs) -> None:
        from tasks.formats import latents
        from tasks.formats.verdict import require_accepted
        from tasks.training import key as training_key
        from tasks.training import run as training_run

        index = latents.read_index(inputs.latents)
        verdict = require_accepted(inputs.accepted)
        sections = (params.model, params.diffusion, params.train)
        facts = training_key.run_facts(index, inputs.codec, verdict, *sections)
        network = training_run.network_config(index.input_spec, params.model)
        self.run = training_run.prepare(inputs.latents, index, facts, network, params.diffusion, params.train)
        self.config = self.run.network.config

    def advance(self, steps: int) -> tuple[float, float]:
        """Make `steps` optimizer steps; returns the clocks after the last."""
        from tasks import train

        train.fit(self.run, None, [], until=self.run.step + steps)
        return now()

    def averaged(self) -> dict[str, torch.Tensor]:
        return self.run.averages[self.run.params.pipeline_ema].state_dict()
