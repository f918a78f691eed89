"""Stage `train`: latents -> a trained diffusion pipeline.

The loop is `_fit`; what surrounds it finds the checkpoint to continue, tells MLflow, and writes the
results. Checkpoints live in a scratch folder named by what determines the weights, outside DVC's
outputs: a killed run continues from there and ends in the same bytes as one that was left alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import atomic, checkpoint, images, latents, locks, stage, tracking, workspace
from tasks.params import DiffusionParams, ModelParams, TrainParams
from tasks.stage import Preempted, StageError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from models.ema import EMA
    from models.unet import UNet, UNetConfig
    from tasks.batches import Batches

# What may change without changing a weight, so that a checkpoint made under another value still serves.
CADENCE = {"log_every", "checkpoint_every", "sample_every"}
SAMPLE_STEPS, SAMPLE_COLUMNS, SAMPLE_ROWS = 20, 10, 4
HELD_OUT_SAMPLES = 512


def train(
    data: Path,
    codec: Path,
    accepted: Path,
    pipeline: Path,
    report: Path,
    model: ModelParams,
    diffusion: DiffusionParams,
    params: TrainParams,
) -> None:
    """Train the diffusion model on the encoded data set; continue from the newest checkpoint of the same run.

    Writes the EMA weights in diffusers layout to `pipeline`, and the loss history, sample grids and the
    parameters of the run to `report`. Ctrl-C and SIGTERM save a checkpoint first.
    """
    verdict = images.require_accepted(accepted)
    index = latents.read_index(data)
    _check_fits(index, params)
    facts = _facts(index, codec, verdict, model, diffusion, params)
    dataset = {"name": verdict.get("source", "images"), "digest": index["digest"]}
    with ExitStack() as stack:
        first = int(os.environ.get("RANK", "0")) == 0
        if first:  # of several processes one holds the lock, tells MLflow and writes; the others only compute
            stack.enter_context(locks.exclusive(workspace.scratch() / "train.lock"))  # never two runs at once
            tracking.connect()
        run = _prepare(data, index, facts, model, diffusion, params)
        live = None
        if first:
            live = stack.enter_context(tracking.training_run(facts["train_key"], facts["params"], dataset))
        asked = stack.enter_context(_deferred_signals())
        _fit(run, live, asked)
        if live is None:
            return
        _write_report(report, run, facts, dataset)
        _write_pipeline(pipeline, run, index, facts)
        live.artifact(report / "history.csv", "train")
    print(f"train: {run.params.steps} steps, loss {run.history[-1]['loss']:.4f}, key {facts['train_key'][:12]}")


@dataclass
class Run:
    """Everything the loop works on. `losses` are those since the last row of `history`."""

    accelerator: Accelerator
    unet: UNet
    module: torch.nn.Module
    optimizer: Any
    ema: EMA
    batches: Batches
    held_out: Batches
    alpha_bar: torch.Tensor
    loss_weights: torch.Tensor
    diffusion: DiffusionParams
    params: TrainParams
    folder: Path
    classes: int
    step: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)


def _fit(run: Run, live: tracking.TrainingRun | None, asked: list[int]) -> None:
    """The training loop: batch, loss, backward, step, average, log, save. Only the process with `live` writes."""
    import torch
    from tqdm import tqdm

    from models import diffusion, ema
    from tasks.batches import seed_for

    params, accelerator = run.params, run.accelerator
    bar = tqdm(
        total=params.steps,
        initial=run.step,
        desc="train",
        unit="step",
        mininterval=1,
        dynamic_ncols=True,
        disable=live is None,
    )
    clock, seen = time.perf_counter(), 0
    run.module.train()
    while run.step < params.steps:
        # batch and loss, in as many parts as the gradient is accumulated over
        torch.manual_seed(seed_for(params.seed, "dropout", run.step, accelerator.process_index))
        for part in range(params.gradient_accumulation):
            batch = run.batches.draw(run.step, part)
            a = run.alpha_bar[batch.t]
            with accelerator.accumulate(run.module), accelerator.autocast():
                output = run.module(diffusion.add_noise(batch.x0, batch.eps, a), batch.t, batch.condition)
                target = diffusion.target(run.diffusion.prediction, batch.x0, batch.eps, a)
                loss = (run.loss_weights[batch.t] * diffusion.squared_error(output, target)).mean()
                accelerator.backward(loss)
            run.losses.append(loss.detach())

        # step
        learning_rate = learning_rate_at(run.step, params)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate
        gradient_norm = accelerator.clip_grad_norm_(run.module.parameters(), params.clip_norm)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1

        # average
        run.ema.update(run.unet, ema.decay_at(run.step, params.ema_decay))
        seen += params.batch_size
        bar.update()

        # log
        if run.step % params.log_every == 0 or run.step == params.steps:
            mean = accelerator.reduce(torch.stack(run.losses).mean(), "mean").item()
            run.losses.clear()
            _refuse_divergence(mean, run)
            row = {"step": run.step, "loss": mean, "learning_rate": learning_rate, "grad_norm": float(gradient_norm)}
            if live and (run.step % params.sample_every == 0 or run.step == params.steps):
                row["held_out_loss"] = _held_out_loss(run)
                live.image("samples", run.step, _sample_grid(run))
            run.history.append(row)
            rate = seen / (time.perf_counter() - clock)
            if live:
                values = {key: value for key, value in row.items() if key != "step"}
                live.metrics(run.step, {**values, "img_per_s": rate})
            bar.set_postfix(loss=f"{mean:.4f}", img_s=f"{rate:.0f}", refresh=False)
            clock, seen = time.perf_counter(), 0

        # save
        leaving = _anybody_asked(accelerator, asked)
        if live and (leaving or run.step % params.checkpoint_every == 0 or run.step == params.steps):
            checkpoint.save(run.folder, _snapshot(run))
        if leaving:
            bar.close()
            raise KeyboardInterrupt if asked and asked[0] == signal.SIGINT else Preempted
    bar.close()


def _anybody_asked(accelerator: Accelerator, asked: list[int]) -> bool:
    """Whether a signal arrived, in any process: all must leave after the same step."""
    import torch

    if accelerator.num_processes == 1:
        return bool(asked)
    return accelerator.reduce(torch.tensor(len(asked), device=accelerator.device)).item() > 0


def learning_rate_at(step: int, params: TrainParams) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then constant or a half cosine down to 0."""
    if step < params.warmup_steps:
        return params.learning_rate * (step + 1) / params.warmup_steps
    if params.lr_schedule == "constant":
        return params.learning_rate
    progress = (step - params.warmup_steps) / (params.steps - params.warmup_steps)
    return params.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _refuse_divergence(loss: float, run: Run) -> None:
    if not math.isfinite(loss):
        raise StageError(
            f"the loss is {loss} at step {run.step}; lower train.learning_rate or train.clip_norm, or set "
            f"train.precision to 'no' (checkpoints before this step are in {run.folder})"
        )


def _held_out_loss(run: Run) -> float:
    """Loss of the averaged weights on held-out samples, with the same noise and timesteps every time."""
    import torch

    from models import diffusion

    with torch.inference_mode(), _averaged(run):
        batch = run.held_out.draw(0)
        a = run.alpha_bar[batch.t]
        output = run.unet(diffusion.add_noise(batch.x0, batch.eps, a), batch.t, batch.condition)
        target = diffusion.target(run.diffusion.prediction, batch.x0, batch.eps, a)
        return (run.loss_weights[batch.t] * diffusion.squared_error(output, target)).mean().item()


def _sample_grid(run: Run) -> Path:
    """Draw a few images from the averaged weights and keep them beside the checkpoints."""
    import torch

    from models import pictures, samplers
    from models.pipeline import to_uint8

    count = SAMPLE_ROWS * SAMPLE_COLUMNS
    shape = (run.unet.config.channels, run.unet.config.size, run.unet.config.size)
    draw = samplers.SeededNoise(range(count), shape)
    device = run.alpha_bar.device
    condition = run.batches.condition
    if condition is not None and condition.ndim == 1:
        condition = torch.arange(count, device=device) % run.classes
    elif condition is not None:
        condition = condition[torch.arange(count, device=device) % len(condition), 0]

    def predict(x: torch.Tensor, t: int, condition: torch.Tensor | None) -> torch.Tensor:
        return run.unet(x, torch.full((len(x),), t, device=device), condition)

    alpha_bar = run.alpha_bar.double().cpu().numpy()
    denoise = samplers.denoiser(predict, run.diffusion.prediction, alpha_bar, condition)
    steps = min(SAMPLE_STEPS, run.diffusion.timesteps)
    with torch.inference_mode(), _averaged(run):
        drawn = samplers.sample(
            "dpm_solver_pp_2m", denoise, lambda: torch.from_numpy(draw()).to(device), alpha_bar, steps
        )
    path = run.folder / "samples" / f"step-{run.step:06d}.png"
    grid = pictures.grid(to_uint8(drawn.float().cpu().numpy()), SAMPLE_COLUMNS)
    atomic.write_bytes(path, pictures.png_bytes(grid))
    return path


@contextmanager
def _averaged(run: Run) -> Iterator[None]:
    """Exchange the weights for their average for the length of the block."""
    import torch

    parameters = list(run.unet.parameters())
    trained = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, run.ema.weights)
    run.module.eval()
    try:
        yield
    finally:
        run.module.train()
        with torch.no_grad():
            torch._foreach_copy_(parameters, trained)


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list; the loop looks at it after a whole step."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_fits(index: dict[str, Any], params: TrainParams) -> None:
    count = index["splits"]["train"]["count"]
    if params.batch_size > count:
        raise StageError(
            f"train.batch_size {params.batch_size} exceeds the {count} training images; lower it to {count} or less"
        )


def _facts(
    index: dict[str, Any],
    codec: Path,
    verdict: Any,
    model: ModelParams,
    diffusion: DiffusionParams,
    params: TrainParams,
) -> dict[str, Any]:
    """Keys and parameters of the run. `trajectory_key` leaves out what cannot change a weight up to a step."""
    import torch

    sections = {"model": model, "diffusion": diffusion, "train": params}
    flat = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.model_dump().items()}
    determining = {key: value for key, value in flat.items() if key.removeprefix("train.") not in CADENCE}
    data = {"digest": index["digest"], "codec": hashlib.sha256((codec / "codec.json").read_bytes()).hexdigest()}
    sources = [*sorted(Path("models").glob("*.py")), Path("tasks/train.py"), Path("tasks/batches.py")]
    code = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources if path.name in TRAINING_CODE}
    whole = {"params": determining, "data": data, "code": code, "torch": torch.__version__}
    whole["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    trajectory = {**whole, "params": {k: v for k, v in determining.items() if not _is_free(k, params)}}
    return {
        "train_key": _digest(whole),
        "trajectory_key": _digest(trajectory),
        "params": {
            key: json.dumps(value) if isinstance(value, (list, tuple)) else value for key, value in flat.items()
        },
        "data": {**data, "images": verdict.get("sha256", "")},
    }


TRAINING_CODE = {"unet.py", "diffusion.py", "ema.py", "schedules.py", "train.py", "batches.py"}


def _is_free(key: str, params: TrainParams) -> bool:
    """With a learning rate that is constant after warm-up, more steps only continue a shorter run."""
    return key == "train.steps" and params.lr_schedule == "constant"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _prepare(
    data: Path,
    index: dict[str, Any],
    facts: dict[str, Any],
    model: ModelParams,
    diffusion: DiffusionParams,
    params: TrainParams,
) -> Run:
    """Build network, optimizer, average and batches, and load the newest checkpoint into them."""
    import torch
    from accelerate import Accelerator

    from models import schedules
    from models.diffusion import loss_weights
    from models.ema import EMA
    from models.unet import UNet
    from tasks.batches import Batches

    accelerator = Accelerator(
        mixed_precision=params.precision, gradient_accumulation_steps=params.gradient_accumulation
    )
    torch.manual_seed(params.seed)
    unet = UNet(_network(index, model)).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )
    average = EMA(unet)

    def batches(split: str, **options: Any) -> Batches:
        return Batches(
            latents.load_latents(data, split), timesteps=diffusion.timesteps, device=accelerator.device, **options
        )

    levels = torch.from_numpy(
        schedules.alpha_bar(schedules.betas(diffusion.schedule, diffusion.timesteps, diffusion.zero_terminal_snr))
    )
    held_out = min(HELD_OUT_SAMPLES, index["splits"]["test"]["count"])
    module, prepared = accelerator.prepare(unet, optimizer)
    run = Run(
        accelerator=accelerator,
        unet=unet,
        module=module,
        optimizer=prepared,
        ema=average,
        batches=batches(
            "train",
            batch_size=params.batch_size // accelerator.num_processes,
            condition_dropout=params.condition_dropout,
            horizontal_flip=params.horizontal_flip,
            seed=params.seed,
            parts=params.gradient_accumulation,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        ),
        held_out=batches("test", batch_size=held_out, condition_dropout=0.0, horizontal_flip=False, seed=0),
        alpha_bar=levels.float().to(accelerator.device),
        loss_weights=loss_weights(diffusion.loss_weighting, diffusion.prediction, levels, diffusion.min_snr_gamma).to(
            accelerator.device
        ),
        diffusion=diffusion,
        params=params,
        folder=workspace.scratch() / "train" / facts["trajectory_key"][:16],
        classes=len(index["classes"]),
    )
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    print(
        f"train: {parameters / 1e6:.2f} M parameters on {accelerator.device}, "
        f"{index['splits']['train']['count']} images {index['channels']}x{index['size']}x{index['size']}",
        flush=True,
    )
    found = checkpoint.load_newest(run.folder, at_most=params.steps)
    if found:
        print(f"train: continues at step {found.step} of {params.steps}", flush=True)
        _restore(run, found)
    return run


def _network(index: dict[str, Any], model: ModelParams) -> UNetConfig:
    from models.unet import UNetConfig

    return UNetConfig(
        size=index["size"],
        channels=index["channels"],
        conditions=len(index["classes"]) + 1 if index["conditioning"] == "label" else 0,
        embedded=index["conditioning"] == "text",
        **model.model_dump(),
    )


def _snapshot(run: Run) -> checkpoint.Checkpoint:
    """All that determines the rest of the run. Batches, noise and learning rate follow from the step."""
    names = [name for name, _ in run.unet.named_parameters()]
    state = run.optimizer.state_dict()["state"]
    return checkpoint.Checkpoint(
        step=run.step,
        tensors={
            "model": {name: value.detach().cpu().clone() for name, value in run.unet.state_dict().items()},
            "ema": {name: value.cpu().clone() for name, value in run.ema.state_dict().items()},
            "optimizer": {
                f"{names[i]}/{key}": value.cpu().clone() for i, slots in state.items() for key, value in slots.items()
            },
        },
        extra={"history": run.history, "losses": [loss.item() for loss in run.losses]},
    )


def _restore(run: Run, found: checkpoint.Checkpoint) -> None:
    import torch

    run.unet.load_state_dict(found.tensors["model"])
    run.ema.load_state_dict(found.tensors["ema"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    names = [name for name, _ in run.unet.named_parameters()]
    for name, value in found.tensors["optimizer"].items():
        parameter, key = name.rsplit("/", 1)
        state.setdefault(names.index(parameter), {})[key] = value
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
    run.step, run.history = found.step, found.extra["history"]
    run.losses = [torch.tensor(loss, device=run.alpha_bar.device) for loss in found.extra["losses"]]


def _write_report(report: Path, run: Run, facts: dict[str, Any], dataset: dict[str, str]) -> None:
    columns = ["step", "loss", "held_out_loss", "learning_rate", "grad_norm"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(run.history)
    with atomic.writing_folder(report) as folder:
        atomic.write_text(folder / "history.csv", text.getvalue())
        atomic.write_json(folder / "run.json", {**facts, "dataset": dataset})
        (folder / "samples").mkdir()
        for row in run.history:
            if "held_out_loss" in row:
                name = f"step-{int(row['step']):06d}.png"
                atomic.write_bytes(folder / "samples" / name, (run.folder / "samples" / name).read_bytes())


def _write_pipeline(pipeline: Path, run: Run, index: dict[str, Any], facts: dict[str, Any]) -> None:
    from models.pipeline import save_pipeline
    from models.schedules import betas
    from models.unet import UNet

    conditional = index["conditioning"] != "none"
    info = {
        "conditioning": "label" if conditional else "none",
        "condition_source": index["conditioning"],
        "classes": index["classes"],
        "channels": index["channels"],
        "size": index["size"],
        "timesteps": run.diffusion.timesteps,
        "schedule": run.diffusion.schedule,
        "prediction": run.diffusion.prediction,
        "null_label": len(index["classes"]) if conditional else None,
        "train_key": facts["train_key"],
    }
    weights = {name: value.cpu().contiguous() for name, value in run.ema.state_dict().items()}
    unet = run.unet
    if index["conditioning"] == "text":  # what was learned for captions serves by class: its prompts make the table
        weights["class_embedding.weight"] = run.batches.prompts
        unet = UNet(replace(unet.config, conditions=len(index["classes"]) + 1, embedded=False))
    with atomic.writing_folder(pipeline) as folder:
        chosen = betas(run.diffusion.schedule, run.diffusion.timesteps, run.diffusion.zero_terminal_snr)
        save_pipeline(folder, unet, weights, chosen, info)


def _launch() -> None:
    """Start this command again through `accelerate launch` where `AFTERIMAGE_ACCELERATE` names its configuration."""
    configuration = os.environ.pop("AFTERIMAGE_ACCELERATE", None)  # not for the processes that it starts
    if configuration:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", configuration]
        os.execv(sys.executable, [*launcher, "-m", "tasks.train", *sys.argv[1:]])  # noqa: S606 - our own command again


if __name__ == "__main__":
    _launch()
    stage.main(train)
