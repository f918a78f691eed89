"""A training run in a process of its own that works only while it is told to.

Each side has the interpreter, the caches and accelerate's global state to itself, as when a user starts it, and while
one works the others wait at a pipe and cost nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from tqdm import tqdm

from infra.bench.inputs import Inputs
from tasks.params import Params
from tasks.runtime.stage import limit_openmp_spin

Side: TypeAlias = Literal["ours", "peer"]

WARM_UP = 3
"""Steps before the clock: the first ones choose kernels and allocate memory."""
IMPORTED = ["accelerate", "diffusers.models.unets.unet_2d", "diffusers.training_utils", "infra.bench.contestant"]


@dataclass(frozen=True)
class Block:
    """Steps made in one go. `cpu_seconds` is of all its threads and of nothing else on the machine."""

    steps: int
    images: int
    seconds: float
    cpu_seconds: float

    @property
    def machine_seconds(self) -> float:
        """What it takes with the machine to itself: on a CPU the work of all threads, shared by the cores."""
        import torch

        return self.seconds if torch.cuda.is_available() else self.cpu_seconds / torch.get_num_threads()


Name = TypeVar("Name")
Advance: TypeAlias = Callable[[int], Block]
"""Makes that many optimizer steps."""


class Contestant:
    """Starts the process, which builds the run; `close` it, or use it as a context."""

    def __init__(self, side: Side, params: Params, inputs: Inputs, scratch: Path) -> None:
        # The server has no thread and no GPU, so its forks are clean, and they need not import all this again.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self._pipe, other = context.Pipe()
        arguments = (other, side, params.model_dump(mode="json", by_alias=True), inputs, scratch)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        limit_openmp_spin()
        self._process.start()
        other.close()
        self.parameters: int = self._answer()

    def advance(self, steps: int) -> Block:
        """Make that many optimizer steps."""
        self._pipe.send(("advance", steps))
        return self._answer()

    def turn(self, steps: int) -> Block:
        """The same as one of several who share a GPU: the memory that it keeps for the next step is given back at the
        end, and asked for again in a step off the clock."""
        self._pipe.send(("turn", steps))
        return self._answer()

    def save(self, folder: Path) -> None:
        """Write the averaged weights as a pipeline folder."""
        self._pipe.send(("save", folder))
        self._answer()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.terminate()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a measured process ended by itself; its own words stand above") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Any, side: Side, document: dict[str, Any], inputs: Inputs, scratch: Path) -> None:
    """The process: build the run, then do what the pipe says until it is closed."""
    from infra.bench.ours import Ours
    from infra.bench.peer import Peer
    from tasks.params import parse

    params = parse(document)
    os.environ["AFTERIMAGE_SCRATCH"] = str(scratch)
    try:
        run: Any = Ours(params, inputs) if side == "ours" else Peer(params, inputs.files)
        pipe.send(sum(weight.numel() for weight in run.averaged().values()))
        while True:
            command, argument = pipe.recv()
            if command == "advance":
                pipe.send(advance(run, argument, params))
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


def _turn(run: Any, steps: int, params: Params) -> Block:
    import torch

    if torch.cuda.is_available():
        run.advance(1)
    block = advance(run, steps, params)
    torch.cuda.empty_cache()
    return block


def advance(run: Any, steps: int, params: Params) -> Block:
    """Make `steps` optimizer steps of a run of either side, in this process."""
    began, cpu_began = now()
    ended, cpu_ended = run.advance(steps)
    return Block(steps, steps * params.train.batch_size, ended - began, cpu_ended - cpu_began)


def take_turns(advances: Mapping[Name, Advance], rounds: int, seconds: float, title: str) -> dict[Name, list[Block]]:
    """A block of each in every round, as long as `seconds` or a step; every second round in reverse."""
    steps = {}
    for name, its in advances.items():
        its(WARM_UP)
        steps[name] = max(1, round(seconds * WARM_UP / its(WARM_UP).seconds))
    blocks: dict[Name, list[Block]] = {name: [] for name in advances}
    order = list(advances)
    turns = [name for turn in range(rounds) for name in (order if turn % 2 == 0 else reversed(order))]
    for name in tqdm(turns, title, unit="block", dynamic_ncols=True):
        blocks[name].append(advances[name](steps[name]))
    return blocks


def now() -> tuple[float, float]:
    """Wall-clock and CPU seconds of this process, after everything that a GPU has been given to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _save(run: Any, folder: Path, params: Params, side: Side) -> None:
    from infra.bench import peer
    from models.networks.unet import UNet
    from models.pipeline import PipelineInfo, save_pipeline
    from models.schedules import betas
    from tasks.runtime.atomic import writing_folder

    own = params.diffusion
    named = (own.schedule, own.timesteps, own.zero_terminal_snr)
    schedule = named if side == "ours" else (peer.SCHEDULE, peer.TIMESTEPS, False)
    conditional = run.config.conditions > 0
    info = PipelineInfo(
        conditioning="label" if conditional else "none",
        channels=run.config.channels,
        size=run.config.size,
        schedule=schedule[0],
        timesteps=schedule[1],
        prediction=own.prediction if side == "ours" else peer.PREDICTION,
        train_key="",
        classes=[str(number) for number in range(run.config.conditions - 1)],
        null_label=run.config.conditions - 1 if conditional else None,
    )
    weights = {name: value.detach().cpu().contiguous() for name, value in run.averaged().items()}
    with writing_folder(folder) as temporary:
        save_pipeline(temporary, UNet(run.config), weights, betas(*schedule), info)
