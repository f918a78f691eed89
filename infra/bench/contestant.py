"""A training run in a process of its own, which works only on command.

Each side has its own interpreter, caches and accelerate state, as if a user had started it. While one side works, the
others wait at a pipe and use no CPU time.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from infra.bench import clock, paired, peer
from infra.bench.ours import Ours
from models.networks.dit import DiTConfig
from models.networks.network import build, under_all_names
from models.networks.unet import UNetConfig
from models.noise.schedules import saved_noise
from models.pipeline import PipelineInfo, save_pipeline
from tasks.params import Params, parse
from tasks.runtime.atomic import writing_folder
from tasks.runtime.stage import limit_openmp_spin

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

    from infra.bench.clock import Block, Run
    from infra.bench.inputs import Inputs

Side: TypeAlias = Literal["ours", "peer"]

PRELOADED = ["accelerate", "diffusers.models.unets.unet_2d", "diffusers.training_utils", "infra.bench.contestant"]


class Contestant:
    """Starts the process, which builds the run. `close` it, or use it as a context."""

    def __init__(self, side: Side, params: Params, inputs: Inputs, scratch: Path) -> None:
        # The fork server has no threads and no GPU context, so forking it is safe, and its imports are shared.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, other = context.Pipe()
        arguments = (other, side, params.model_dump(mode="json", by_alias=True), inputs, scratch)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        limit_openmp_spin()
        self._process.start()
        other.close()
        self.parameters: int = self._answer()

    def advance(self, steps: int) -> Block:
        """Make that many optimizer steps."""
        return self._ask("advance", steps)

    def turn(self, steps: int) -> Block:
        """Make that many optimizer steps, alternating with other processes on one GPU.

        Cached GPU memory is released at the end and allocated again by an untimed step at the beginning.
        """
        return self._ask("turn", steps)

    def save(self, folder: Path) -> None:
        """Write the averaged weights as a pipeline folder."""
        self._ask("save", folder)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.terminate()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, command: str, argument: object) -> Any:  # the answer to the command: a Block or None
        self._pipe.send((command, argument))
        return self._answer()

    def _answer(self) -> Any:  # whatever the process has sent
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a measured process ended unexpectedly; its error is printed above") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(
    pipe: Connection[object, Any], side: Side, document: dict[str, object], inputs: Inputs, scratch: Path
) -> None:
    """The process: build the run, then execute the commands of the pipe until it is closed."""
    params = parse(document)
    os.environ["AFTERIMAGE_SCRATCH"] = str(scratch)
    try:
        run: Run = Ours(params, inputs) if side == "ours" else paired.peer(params, inputs.files)
        pipe.send(sum(weight.numel() for weight in run.averaged().values()))
        while True:
            command, argument = pipe.recv()
            if command == "advance":
                pipe.send(clock.advance(run, argument, params.train.batch_size))
            elif command == "turn":
                pipe.send(_turn(run, argument, params))
            else:
                _save(run, argument, params, side)
                pipe.send(None)
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send(RuntimeError(f"{side}: {type(error).__name__}: {error}"))
        raise


def _turn(run: Run, steps: int, params: Params) -> Block:
    if torch.cuda.is_available():
        run.advance(1)
    block = clock.advance(run, steps, params.train.batch_size)
    torch.cuda.empty_cache()
    return block


def _save(run: Run, folder: Path, params: Params, side: Side) -> None:
    own, config = params.diffusion, run.config
    assert isinstance(config, UNetConfig | DiTConfig)
    named = (own.schedule, own.timesteps, own.zero_terminal_snr)
    schedule = named if side == "ours" else (peer.SCHEDULE, peer.TIMESTEPS, False)
    conditional = config.conditions > 0
    info = PipelineInfo(
        conditioning="label" if conditional else "none",
        channels=config.channels,
        size=config.size,
        schedule=schedule[0],
        timesteps=schedule[1],
        prediction=own.prediction if side == "ours" else peer.PREDICTION,
        train_key="",
        classes=[str(number) for number in range(config.conditions - 1)],
        null_label=config.conditions - 1 if conditional else None,
    )
    noise = saved_noise(*schedule, own.shift)
    weights = {name: value.detach().cpu().contiguous() for name, value in run.averaged().items()}
    network = build(config)
    with writing_folder(folder) as temporary:
        save_pipeline(temporary, network, under_all_names(network, weights), noise, info)
