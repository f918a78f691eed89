"""A training run in memory: built from parameters, kept in a checkpoint, and restored from one.

Batches, noise, dropout and learning rate follow from the step, so a checkpoint holds no generator states.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.formats import latents
from tasks.formats.latents import SQUARE
from tasks.params import DiffusionParams, ModelParams, TrainParams
from tasks.runtime import workspace
from tasks.runtime.stage import StageError
from tasks.training import checkpoint, memory, warm_start
from tasks.training import key as training_key
from tasks.training.bucketed import Bucketed
from tasks.training.log import Row, Tally
from tasks.training.warm_start import Given

if TYPE_CHECKING:
    import numpy as np
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from models.ema import EMA
    from models.networks.network import Network, NetworkConfig
    from tasks.training.batches import Batch, Batches

HELD_OUT_SAMPLES = 512
INHERITED = ("norm_eps", "flip_sin_to_cos", "freq_shift", "downsample_padding")
"""What published weights may have otherwise than ours, and the section `model` has no word for."""
OPTIMIZER = "optimizer"


@dataclass
class Run:
    """Everything the loop works on.

    `network` is ours, `module` the same as accelerate (and torch.compile) wraps it for training; `objective` maps
    (network, batch) to the loss of each sample [B], `alpha_bar` float64 [T] is the schedule.
    """

    accelerator: Accelerator
    network: Network
    module: torch.nn.Module
    objective: Callable[[Any, Batch], Tensor]
    optimizer: Any
    averages: dict[str, EMA]
    batches: Batches | Bucketed
    held_out: list[Batch]
    alpha_bar: np.ndarray
    diffusion: DiffusionParams
    params: TrainParams
    folder: Path
    tally: Tally
    autoencoder: Any = None
    """What turns drawn latents into images; None where the network draws pixels."""
    step: int = 0
    history: list[Row] = field(default_factory=list)


def check_fits(params: TrainParams) -> None:
    """Raise `StageError`, before data or weights are touched, where the parameters do not fit the machine."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parts = processes * params.gradient_accumulation
    if params.batch_size % parts:
        raise StageError(
            f"train.batch_size {params.batch_size} cannot be shared among {processes} processes in "
            f"{params.gradient_accumulation} accumulated parts; make it a multiple of {parts}"
        )
    _check_devices(params, processes)
    if params.compile and not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "clang++")):
        raise StageError("train.compile needs a C++ compiler, and there is no g++; install one or set it to false")
    if params.full_steps and processes > 1:
        raise StageError("train.full_steps works in one process; train the base first, and name it in train.init_from")


def _check_devices(params: TrainParams, processes: int) -> None:
    import torch
    from accelerate.utils import parse_flag_from_env

    here, cuda = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if params.precision == "fp16" and not cuda:
        raise StageError("train.precision 'fp16' needs a GPU; use 'bf16' or 'no'")
    if processes > 1 and here > cuda and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise StageError(
            f"{here} processes were started on a machine with {cuda} GPUs; lower num_processes in the configuration of "
            "accelerate, or set ACCELERATE_USE_CPU=true to train on the CPU"
        )


@contextmanager
def memory_told(params: TrainParams) -> Iterator[None]:
    """Say in one sentence what helps where the device's memory runs out; raises `StageError` then."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StageError(
            f"the device's memory ran out with train.batch_size {params.batch_size} in {params.gradient_accumulation} "
            "part(s); raise train.gradient_accumulation, set train.gradient_checkpointing to true or "
            "train.data_on_device to 'stream', or lower train.batch_size"
        ) from error


def prepare(
    data: Path,
    index: dict[str, Any],
    facts: dict[str, Any],
    config: NetworkConfig,
    diffusion: DiffusionParams,
    params: TrainParams,
    first: Given | None = None,
) -> Run:
    """Build network, optimizer, averages and batches, and load the newest checkpoint of this trajectory into them, or
    where there is none the weights that come `first`."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    from models import schedules
    from models.ema import EMA
    from models.networks.network import build

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # and not Apple's MPS, which has no float64
        mixed_precision=params.precision,
        gradient_accumulation_steps=params.gradient_accumulation,
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise StageError(
            f"accelerate is configured for {accelerator.distributed_type.value}, and here each process holds the whole "
            "network; take a configuration like those in infra/accelerate"
        )
    if accelerator.device.type == "cpu":
        memory.keep_freed()
        if torch.get_num_threads() != (threads := facts["trajectory"][training_key.THREADS]):
            torch.set_num_threads(threads)  # accelerate may choose another number for several processes
    torch.backends.cudnn.benchmark = True  # shapes stay the same: what convolves them fastest is sought once
    torch.manual_seed(params.seed)
    network = build(config)
    if first:
        warm_start.load(network, first)
    if params.full_steps:
        network.requires_grad_(True)  # each has its time; the loop says whose it is
    network = network.to(accelerator.device, memory_format=_memory_format(params))  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )
    module, prepared = accelerator.prepare(network, optimizer)
    if params.gradient_checkpointing:
        network.checkpoint_gradients()
    levels = schedules.alpha_bar(schedules.betas(diffusion.schedule, diffusion.timesteps, diffusion.zero_terminal_snr))
    batches, held_out = _batches(data, accelerator, diffusion, params)
    run = Run(
        accelerator=accelerator,
        network=network,
        module=torch.compile(module) if params.compile else module,  # type: ignore[arg-type]
        objective=Objective(diffusion, levels, accelerator.device),
        optimizer=prepared,
        averages={profile: EMA(network, profile) for profile in params.ema},
        batches=batches,
        held_out=held_out,
        alpha_bar=levels,
        diffusion=diffusion,
        params=params,
        folder=training_key.folder_of(workspace.scratch(), facts),
        tally=Tally(diffusion.timesteps, accelerator.device),
    )
    if accelerator.is_main_process:
        _say(run, index)
    _continue(run, facts)
    return run


class Objective:
    """What the network is trained for: (network, batch) -> the weighted loss of each sample, float32 [B]."""

    def __init__(self, params: DiffusionParams, alpha_bar: Any, device: torch.device) -> None:
        import torch

        from models.diffusion import loss_weights

        levels = torch.from_numpy(alpha_bar)
        weights = loss_weights(params.loss_weighting, params.prediction, levels, params.min_snr_gamma)
        self.prediction = params.prediction
        self.alpha_bar, self.weights = levels.float().to(device), weights.to(device)

    def __call__(self, network: Any, batch: Batch) -> Tensor:
        from models import diffusion

        a = self.alpha_bar[batch.t]
        output = network(diffusion.add_noise(batch.x0, batch.eps, a), batch.t, batch.condition)
        target = diffusion.target(self.prediction, batch.x0, batch.eps, a)
        return self.weights[batch.t] * diffusion.squared_error(output, target)


def network_config(index: dict[str, Any], model: ModelParams, first: Given | None = None) -> NetworkConfig:
    """The network for a data set and the section `model`, with `INHERITED` from that of the `first` weights."""
    from models.networks.text_unet import TextUNetConfig
    from models.networks.unet import UNetConfig

    form = {"size": index["size"], "channels": index["channels"]}
    if index["conditioning"] == "text":
        text = {"cross_attention_dim": index["text"]["width"], "pooled": index["text"].get("pooled")}
        return TextUNetConfig(**form, **text, **model.model_dump())
    shared = {name: value for name, value in model.model_dump().items() if name in UNetConfig.__dataclass_fields__}
    if first and isinstance(first.network, UNetConfig):
        shared |= {name: getattr(first.network, name) for name in INHERITED}
    return UNetConfig(**form, conditions=len(index["classes"]) + 1 if index["conditioning"] == "label" else 0, **shared)


def architecture(config: NetworkConfig) -> dict[str, Any]:
    """What shapes the network, as JSON."""
    return json.loads(json.dumps(asdict(config)))


def _memory_format(params: TrainParams) -> Any:
    import torch

    return torch.channels_last if params.channels_last else torch.contiguous_format


def _batches(
    data: Path, accelerator: Accelerator, diffusion: DiffusionParams, params: TrainParams
) -> tuple[Batches | Bucketed, list[Batch]]:
    """The batches of training, and the one held-out draw that every measurement uses, in parts of a batch's size."""
    from tasks.training.batches import Batches, conditioning_of, open_store, seed_for

    conditioning = conditioning_of(data, params.data_on_device, accelerator.device)

    def batches(split: str, bucket: int, **options: Any) -> Batches:
        store = open_store(data, split, params.data_on_device, accelerator.device, bucket)
        options |= conditioning
        return Batches(store, timesteps=diffusion.timesteps, device=accelerator.device, **options)

    def training(bucket: int, seed: int) -> Batches:
        return batches(
            "train",
            bucket,
            batch_size=params.batch_size // accelerator.num_processes,
            condition_dropout=params.condition_dropout,
            horizontal_flip=params.horizontal_flip,
            seed=seed,
            parts=params.gradient_accumulation,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )

    train: Batches | Bucketed
    filled, index = latents.buckets_of(data, "train"), latents.read_index(data)
    if filled == [SQUARE]:
        train = training(SQUARE, params.seed)
    else:
        several = [training(bucket, seed_for(params.seed, "bucket", bucket)) for bucket in filled]
        train = Bucketed(several, (index["channels"], index["size"], index["size"]), params.seed)
    held_out = []
    total = index["splits"]["test"]["count"]
    for bucket in latents.buckets_of(data, "test"):
        its = sum(len(next(iter(shard.values()))) for shard in latents.open_shards(data, "test", bucket))
        share = -(-min(HELD_OUT_SAMPLES, total) * its // total)  # rounded up
        held = batches("test", bucket, batch_size=share, condition_dropout=0.0, horizontal_flip=False, seed=bucket)
        held_out += held.draw(0).split(max(1, train.size))
    return train, held_out


def _say(run: Run, index: dict[str, Any]) -> None:
    parameters = sum(parameter.numel() for parameter in run.network.parameters())
    print(
        f"train: {parameters / 1e6:.2f} M parameters on {run.accelerator.device}, "
        f"{index['splits']['train']['count']} images {index['channels']}x{index['size']}x{index['size']} "
        f"{run.batches.where}",
        flush=True,
    )


def _continue(run: Run, facts: dict[str, Any]) -> None:
    """Load the newest checkpoint of this trajectory; where there is none, say what a start from scratch is due to."""
    main = run.accelerator.is_main_process
    found = checkpoint.load_newest(run.folder, run.params.steps, warn=main)
    if found:
        restore(run, found)
    _require_same_step(run)
    if not main:
        return
    if found:
        print(f"train: continues at step {found.step} of {run.params.steps}", flush=True)
    elif changed := training_key.changed_since(run.folder, facts):
        print(f"train: starts anew: {changed}", flush=True)
    training_key.write_trajectory(run.folder, facts)


def _require_same_step(run: Run) -> None:
    """Processes that found different checkpoints would train different weights."""
    import torch

    steps = run.accelerator.gather(torch.tensor([run.step], device=run.accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise StageError(
            f"the processes found checkpoints of different steps ({', '.join(map(str, steps))}); "
            "set AFTERIMAGE_SCRATCH to a folder that all machines share"
        )


def gathered(run: Run) -> Tensor:
    """The tallies of all processes, [processes, ...]; each of them calls this."""
    return run.accelerator.gather(run.tally.sums[None])


def snapshot(run: Run, tallies: Tensor) -> checkpoint.Checkpoint:
    """All that determines the rest of the run, with what `gathered` says of the other processes."""
    names = [name for name, _ in run.network.named_parameters()]
    state = run.optimizer.state_dict()["state"]
    scaler = run.accelerator.scaler
    last = run.history[-1] if run.history else {"step": 0}
    measured = last.get(f"held_out_loss/{run.params.pipeline_ema}") if last["step"] == run.step else None
    return checkpoint.Checkpoint(
        step=run.step,
        network=architecture(run.network.config),
        held_out_loss=measured,
        tensors={
            "model": _copies({name: v for name, v in run.network.state_dict().items() if name not in _frozen(run)}),
            OPTIMIZER: _copies({f"{names[i]}/{key}": v for i, slots in state.items() for key, v in slots.items()}),
            "tally": _copies({"sums": tallies}),
            **{name: _copies(average.state_dict()) for name, average in run.averages.items()},
        },
        extra={"history": run.history, "scaler": scaler.state_dict() if scaler else None},
    )


def _frozen(run: Run) -> set[str]:
    """Names of the parameters that are never trained: first weights, of which a checkpoint needs no copy."""
    trained = run.averages[run.params.pipeline_ema].names
    return {name for name, _ in run.network.named_parameters()}.difference(trained)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def restore(run: Run, found: checkpoint.Checkpoint) -> None:
    """Put a checkpoint into a run that was just built."""
    import torch

    frozen = {name: value for name, value in run.network.state_dict().items() if name in _frozen(run)}
    run.network.load_state_dict({**frozen, **found.tensors["model"]})
    for name, average in run.averages.items():
        average.load_state_dict(found.tensors[name])
    state: dict[int, dict[str, Tensor]] = {}
    parameters = dict(run.network.named_parameters())
    names = list(parameters)
    for name, value in found.tensors[OPTIMIZER].items():
        owner, key = name.rsplit("/", 1)
        like = parameters[owner]
        if value.shape == like.shape:  # in the parameter's own memory format, as the fused step expects
            value = torch.empty_like(like, dtype=value.dtype).copy_(value).detach()
        state.setdefault(names.index(owner), {})[key] = value
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
    if run.accelerator.scaler and found.extra["scaler"]:
        run.accelerator.scaler.load_state_dict(found.extra["scaler"])
    run.tally.sums.copy_(found.tensors["tally"]["sums"][run.accelerator.process_index])
    run.step, run.history = found.step, found.extra["history"]
