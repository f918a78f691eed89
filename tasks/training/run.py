"""A training run in memory: built from parameters, saved in a checkpoint, and restored from one.

Batches, noise, dropout and learning rate follow from the step, so a checkpoint holds no generator states.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin

from models import tuned_text
from models.device import keep_freed, warn_of_emulation
from models.json_files import JsonObject
from models.networks import compilation
from models.networks.dit import DiTConfig
from models.networks.network import Network, NetworkConfig, build
from models.networks.text_dit import TextDiTConfig
from models.networks.text_encoder import load_text_encoder
from models.networks.text_unet import TextUNetConfig
from models.networks.unet import UNetConfig
from models.noise.schedules import path_of
from models.optimization import sharding
from models.optimization.diffusion import add_noise, squared_error, target
from models.optimization.ema import EMA
from models.optimization.timesteps import Density, Timesteps
from models.parallel import Workers
from tasks.formats import latents
from tasks.formats.latents import SQUARE, InputSpec, LatentsIndex
from tasks.runtime import workspace
from tasks.runtime.errors import StageError
from tasks.training import (
    activations,
    checkpoint,
    companions,
    control,
    machine,
    optimizer,
    sharded,
    tuning,
    warm_start,
)
from tasks.training import key as training_key
from tasks.training.backward import Backward, SplitBatch, WholeBatch
from tasks.training.batches import Batch, Batches, DrawConfig, open_conditioning, seed_for
from tasks.training.bucketed import Bucketed
from tasks.training.log import HistoryRow, Tally
from tasks.training.prior_mix import PriorMix, Subject, open_mix
from tasks.training.remote import bucket_of, open_store

if TYPE_CHECKING:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.optimizer import AcceleratedOptimizer
    from torch import Tensor, nn

    from models.networks.autoencoder import Autoencoder
    from tasks.params import DiffusionParams, ModelParams, TrainParams
    from tasks.training.key import RunFacts
    from tasks.training.warm_start import InitialWeights

HELD_OUT_SAMPLES = 512
INHERITED = ("norm_eps", "flip_sin_to_cos", "freq_shift", "downsample_padding")
"""Properties of published networks that the section model has no parameter for."""
OPTIMIZER = "optimizer"

LossFunction: TypeAlias = Callable[["nn.Module", Batch], "Tensor"]
"""(network, batch) -> weighted loss of each sample, float32 [B]."""


@dataclass
class Run:
    """Everything that the training loop works on."""

    accelerator: Accelerator
    network: Network
    module: nn.Module
    """`network` as accelerate and torch.compile wrap it for training."""
    objective: LossFunction
    """That of training; `tuning.objective_at` has also that of consistency tuning."""
    backward: Backward
    workers: Workers
    """Those of the passes and of the held-out losses; part of the trajectory."""
    optimizer: AcceleratedOptimizer
    averages: dict[str, EMA]
    batches: Batches | Bucketed | PriorMix
    held_out: list[Batch]
    timesteps: Timesteps
    """Those of the training batches, with their path."""
    diffusion: DiffusionParams
    params: TrainParams
    folder: Path
    """Where the checkpoints lie."""
    checkpoints: checkpoint.Writer
    tally: Tally
    autoencoder: Autoencoder | None = None
    """Decodes drawn latents for previews; None if the network draws pixels."""
    step: int = 0
    """Steps done."""
    history: list[HistoryRow] = field(default_factory=list)
    companions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Earlier weights for the pipeline, see `tasks/training/companions.py`."""
    initial: InitialWeights | None = None
    """The weights that the training started from."""

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the network, so that every process must take part in what uses all of it."""
        return self.accelerator.is_fsdp2


def network_config(spec: InputSpec, model: ModelParams, initial: InitialWeights | None = None) -> NetworkConfig:
    """Configure the network for a data set and the section model, with `INHERITED` from the initial weights."""
    if model.architecture == "dit":
        return _transformer_config(spec, model)
    section = model.model_dump(exclude={"architecture", "dit"})
    if spec.conditioning == "text":
        assert spec.text_width is not None, "text has a width"
        section.pop("patch_size")
        return TextUNetConfig(
            size=spec.size,
            channels=spec.channels,
            cross_attention_dim=spec.text_width,
            pooled=spec.pooled,
            **section,
        )
    shared = {name: value for name, value in section.items() if name in UNetConfig.__dataclass_fields__}
    if initial and isinstance(initial.network, UNetConfig):
        shared |= {name: getattr(initial.network, name) for name in INHERITED}
    conditions = spec.classes + 1 if spec.conditioning == "label" else 0
    return UNetConfig(size=spec.size, channels=spec.channels, conditions=conditions, **shared)


def _transformer_config(spec: InputSpec, model: ModelParams) -> DiTConfig | TextDiTConfig:
    shared = {"size": spec.size, "channels": spec.channels, "dropout": model.dropout, **model.dit.model_dump()}
    if spec.conditioning != "text":
        return DiTConfig(**shared, conditions=spec.classes + 1 if spec.conditioning == "label" else 0)
    if spec.pooled is not None:
        raise StageError(
            "the codec has two text encoders, and model.architecture 'dit' takes the text of one; name a single one in "
            "codec.text.weights, or set model.architecture to 'unet'"
        )
    assert spec.text_width is not None, "text has a width"
    return TextDiTConfig(**shared, text_width=spec.text_width)


def architecture(config: NetworkConfig) -> JsonObject:
    """Return the configuration of a network as JSON values."""
    return json.loads(json.dumps(asdict(config)))


def prepare(
    data: Path,
    index: LatentsIndex,
    facts: RunFacts,
    config: NetworkConfig,
    diffusion: DiffusionParams,
    params: TrainParams,
    initial: InitialWeights | None = None,
    subject: Subject | None = None,
    codec: Path | None = None,
) -> Run:
    """Assemble a run and restore the newest checkpoint of its trajectory, if there is one."""
    run = assemble(data, index, facts, config, diffusion, params, initial, subject, codec)
    if run.accelerator.is_main_process:
        _print_summary(run, index)
    _resume(run, facts)
    return run


def assemble(
    data: Path,
    index: LatentsIndex,
    facts: RunFacts,
    config: NetworkConfig,
    diffusion: DiffusionParams,
    params: TrainParams,
    initial: InitialWeights | None = None,
    subject: Subject | None = None,
    codec: Path | None = None,
) -> Run:
    """Build network, optimizer, averages and batches of a run before its first step.

    The network starts from the `initial` weights, or from random weights. With a `subject` it is trained on that and on
    class images, and its text encoder if that is named. Captions that are stored as token ids need the text encoder in
    the folder `codec`.
    """
    options = sharded.plugin(params)
    accelerator = _accelerator(params, facts, options)
    torch.manual_seed(params.seed)
    network = build(config)
    if initial:
        warm_start.load(network, initial)
    if params.full_steps:
        network.requires_grad_(True)  # the base trains first, then the adapter; `fit` switches between them
    else:
        control.narrow_base(network, params, accelerator.device)
    if subject and subject.codec is not None:
        tuned_text.attach(network, load_text_encoder(subject.codec).towers[0].model)
    if options:
        sharded.choose_units(network, options)
        sharded.compute_in(network, accelerator.device, params)
    else:  # FSDP2 moves the weights unit by unit, and shards contiguous ones only
        memory_format = torch.channels_last if params.channels_last else torch.contiguous_format
        # torch declares no overload of `to` with a device and a memory format, which its documentation lists.
        network = network.to(accelerator.device, memory_format=memory_format)  # type: ignore[call-overload]
    module, prepared = accelerator.prepare(network, optimizer.build(network, params))
    timesteps = timesteps_of(diffusion, accelerator.device)
    batches, held_out = _batches(data, index, accelerator, timesteps, params, subject, codec)
    workers = Workers(facts.trajectory.get(training_key.WORKERS, 1))
    folder = training_key.folder_of(workspace.scratch(), facts)
    wrapped = module
    if compilation.wanted(params.compile):
        large = 0 if options else compilation.LARGE  # FSDP2 gathers weights between the blocks
        wrapped = compilation.compiled(module, network, len(latents.buckets_of(data, "train")), large=large)
    run = Run(
        accelerator=accelerator,
        network=network,
        module=wrapped,
        objective=Objective(diffusion, timesteps, channels_last=params.channels_last and accelerator.is_fsdp2),
        backward=(SplitBatch(accelerator, wrapped, workers) if workers.count > 1 else WholeBatch(accelerator, wrapped)),
        workers=workers,
        optimizer=prepared,
        averages={profile: EMA(network, profile) for profile in params.ema},
        batches=batches,
        held_out=held_out,
        timesteps=timesteps,
        diffusion=diffusion,
        params=params,
        folder=folder,
        checkpoints=checkpoint.Writer(folder),
        tally=Tally(diffusion.timesteps, accelerator.device),
        initial=initial,
    )
    if activations.recomputed(run):
        network.checkpoint_gradients()
    return run


def _accelerator(params: TrainParams, facts: RunFacts, options: FullyShardedDataParallelPlugin | None) -> Accelerator:
    # With FSDP a process never holds whole gradients: each part's are added to the shards at once.
    parts = GradientAccumulationPlugin(params.gradient_accumulation, sync_each_batch=options is not None)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # and not Apple's MPS, which has no float64
        device_placement=False,  # `assemble` moves the network; accelerate's check before that takes seconds to import
        mixed_precision=params.mixed_precision,
        gradient_accumulation_plugin=parts,
        fsdp_plugin=options,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # one copy of the gradients
    )
    if options:
        sharded.shard_on_cpu(accelerator, options)
    kinds = DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP
    if accelerator.distributed_type not in kinds:
        raise machine.unsupported(accelerator.distributed_type.value)
    if accelerator.device.type == "cpu":
        keep_freed("cpu")
        if torch.get_num_threads() != (threads := facts.trajectory[training_key.THREADS]):
            torch.set_num_threads(threads)  # accelerate may set another number for several processes
    machine.choose_kernels(params)
    return accelerator


class Objective:
    """The training objective: (network, batch) -> the weighted loss of each sample, float32 [B]."""

    def __init__(self, params: DiffusionParams, timesteps: Timesteps, channels_last: bool = False) -> None:
        self.params, self.timesteps = params, timesteps
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        """Of the network's input, which decides that of the layers where the weights do not: FSDP2 shards no others."""

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        params = self.params
        alpha, sigma = (scale.float() for scale in self.timesteps.scales(batch.t))
        x = add_noise(batch.x0, batch.eps, alpha, sigma).contiguous(memory_format=self.memory_format)
        output = network(x, batch.t, *batch.conditions)
        error = squared_error(output, target(params.prediction, batch.x0, batch.eps, alpha, sigma))
        weights = self.timesteps.weights(batch.t, params.loss_weighting, params.prediction, params.min_snr_gamma)
        return weights * error if batch.weight is None else batch.weight * weights * error


def timesteps_of(params: DiffusionParams, device: torch.device) -> Timesteps:
    """Return the timesteps of the training batches, drawn from the density that the section names."""
    path = path_of(params.schedule, params.timesteps, params.zero_terminal_snr, params.shift)
    density = Density(params.timestep_density, params.density_mean, params.density_std, params.shift)
    return Timesteps(path, device, density)


def _batches(
    data: Path,
    index: LatentsIndex,
    accelerator: Accelerator,
    timesteps: Timesteps,
    params: TrainParams,
    subject: Subject | None,
    codec: Path | None,
) -> tuple[Batches | Bucketed | PriorMix, list[Batch]]:
    """Return the training batches, and one fixed held-out draw in parts of a training batch's size.

    Held-out timesteps are uniform whatever the training density, so that losses of runs with different ones compare.
    """
    device, where, remote = accelerator.device, params.data_on_device, bucket_of(params)
    conditioning = open_conditioning(data, where, device, codec, remote)

    def configured(seed: int) -> DrawConfig:
        return DrawConfig(
            batch_size=params.batch_size // accelerator.num_processes,
            timesteps=timesteps,
            seed=seed,
            condition_dropout=params.condition_dropout,
            horizontal_flip=params.horizontal_flip,
            control_dropout=params.control_dropout,
            parts=params.gradient_accumulation,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            tuned_from=params.distil.after if params.distil else None,
            tuning=tuning.timesteps_of(timesteps, params.distil) if params.distil else None,
        )

    def training(bucket: int, seed: int) -> Batches:
        return Batches(open_store(data, "train", where, device, bucket, remote), conditioning, configured(seed), device)

    train: Batches | Bucketed | PriorMix
    filled = latents.buckets_of(data, "train")
    if subject is not None:
        train = open_mix(subject, configured(params.seed), params.prior_weight, where, device)
    elif filled == [SQUARE]:
        train = training(SQUARE, params.seed)
    else:
        several = [training(bucket, seed_for(params.seed, "bucket", bucket)) for bucket in filled]
        train = Bucketed(several, (index.channels, index.size, index.size), params.seed)
    held_out, uniform = [], Timesteps(timesteps.path, device)
    total = index.splits["test"].count
    for bucket in latents.buckets_of(data, "test"):
        store = open_store(data, "test", where, device, bucket, remote)
        share = -(-min(HELD_OUT_SAMPLES, total) * store.count // total)  # rounded up
        given = None if params.control_dropout is None else 0.0
        config = DrawConfig(batch_size=share, timesteps=uniform, seed=bucket, control_dropout=given)
        held_out += Batches(store, conditioning, config, device).draw(0).split(max(1, train.size))
    return train, held_out


def _print_summary(run: Run, index: LatentsIndex) -> None:
    parameters = sum(parameter.numel() for parameter in run.network.parameters())
    images, mix = f"{index.splits['train'].count} images", run.batches
    if isinstance(mix, PriorMix):
        images = f"{mix.subject.store.count} pictures of the subject and {mix.classes.store.count} class images"
    print(
        f"train: {parameters / 1e6:.2f} M parameters on {run.accelerator.device}, "
        f"{images} {index.channels}x{index.size}x{index.size} {run.batches.where}",
        flush=True,
    )
    warn_of_emulation("train.precision", run.params.precision, run.accelerator.device.type)


def _resume(run: Run, facts: RunFacts) -> None:
    """Restore the newest checkpoint of this trajectory; without one, print what changed since the last trajectory."""
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
    """Raise `StageError` if the processes found different checkpoints, from which their weights would diverge."""
    steps = run.accelerator.gather(torch.tensor([run.step], device=run.accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise StageError(
            f"the processes found checkpoints of different steps ({', '.join(map(str, steps))}); "
            "set AFTERIMAGE_SCRATCH to a folder that all machines share"
        )


def gather_tallies(run: Run) -> Tensor:
    """Return the tallies of all processes, [processes, ...]; every process must call this."""
    return run.accelerator.gather(run.tally.sums[None])


def snapshot(run: Run, tallies: Tensor) -> checkpoint.Checkpoint:
    """Return everything that determines the rest of the run, with the `gather_tallies` of all processes.

    Every process of a sharded run calls this; only the first one's has tensors.
    """
    scaler = run.accelerator.scaler
    last = run.history[-1] if run.history else None
    measured = last.held_out_loss.get(run.params.pipeline_ema) if last and last.step == run.step else None
    frozen, keep = _frozen(run), run.accelerator.is_main_process

    def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return checkpoint.host_copies(tensors, keep)

    return checkpoint.Checkpoint(
        step=run.step,
        network=architecture(run.network.config),
        held_out_loss=measured,
        tensors={
            "model": copies({name: value for name, value in run.network.state_dict().items() if name not in frozen}),
            OPTIMIZER: copies(optimizer.state_of(run.network, run.optimizer)),
            "tally": copies({"sums": tallies}),
            **{name: copies(average.state_dict()) for name, average in run.averages.items()},
            **companions.groups(run),
        },
        history=[row.to_json() for row in run.history],
        scaler=scaler.state_dict() if scaler else None,
        copied=checkpoint.copy_finished(run.accelerator.device),
    )


def _frozen(run: Run) -> set[str]:
    """Return the names of the parameters that are never trained: base weights, which a checkpoint need not copy."""
    trained = run.averages[run.params.pipeline_ema].names
    return {name for name, _ in run.network.named_parameters()}.difference(trained)


def restore(run: Run, found: checkpoint.Checkpoint) -> None:
    """Load a checkpoint into a run that was just built."""
    frozen = _frozen(run)
    own = run.network.state_dict()
    base = {name: value for name, value in own.items() if name in frozen}
    trained = {name: sharding.like(own[name], value) for name, value in found.tensors["model"].items()}
    run.network.load_state_dict({**base, **trained})
    for name, average in run.averages.items():
        average.load_state_dict(found.tensors[name])
    optimizer.restore(run.network, run.optimizer, found.tensors[OPTIMIZER])
    if run.accelerator.scaler and found.scaler:
        run.accelerator.scaler.load_state_dict(found.scaler)
    run.tally.sums.copy_(found.tensors["tally"]["sums"][run.accelerator.process_index])
    run.companions = companions.restored(found.tensors)
    run.step, run.history = found.step, [HistoryRow.from_json(row) for row in found.history]
