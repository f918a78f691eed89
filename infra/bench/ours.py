"""Our side of a comparison: the loop of `tasks/train.py` itself, stopped after so many steps as a signal would stop it.

MLflow is left out, as the tracker is on the other side; so are the sample grids, which the other side would draw too.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from infra.bench.inputs import Inputs
from tasks.params import Params
from tasks.stage import Preempted

if TYPE_CHECKING:
    import torch


class Ours:
    """One run of the project's training."""

    def __init__(self, params: Params, inputs: Inputs) -> None:
        from tasks import images, latents, train

        index = latents.read_index(inputs.latents)
        verdict = images.require_accepted(inputs.accepted)
        sections = (params.model, params.diffusion, params.train)
        facts = train._facts(index, inputs.codec, verdict, *sections)
        self.run = train._prepare(inputs.latents, index, facts, *sections)
        self.config = self.run.unet.config

    def advance(self, steps: int) -> None:
        """Make `steps` optimizer steps."""
        from tasks import train

        with suppress(Preempted):
            train._fit(self.run, None, _Stop(self.run, self.run.step + steps))  # type: ignore[arg-type]

    def averaged(self) -> dict[str, torch.Tensor]:
        return self.run.ema.state_dict()


class _Stop:
    """What the loop takes for the list of signals that have arrived: empty until the step is reached."""

    def __init__(self, run: Any, step: int) -> None:
        self.run, self.step = run, step

    def __bool__(self) -> bool:
        return self.run.step >= self.step

    def __getitem__(self, _: int) -> int:
        return signal.SIGTERM
