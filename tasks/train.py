"""Stage `train`: latents -> a trained diffusion pipeline.

The loop is `fit`. What it works on is a `Run` (`tasks/training/run.py`); what names a run is its key
(`tasks/training/key.py`). Checkpoints live in a scratch folder named by what determines the weights, outside DVC's
outputs: a killed run continues from there and ends in the same bytes as one that was left alone.
"""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.formats import latents
from tasks.formats.verdict import require_accepted
from tasks.params import DiffusionParams, ModelParams, TrainParams
from tasks.runtime import atomic, integrity, locks, measures, stage, tracking, workspace
from tasks.runtime.stage import Preempted
from tasks.training import checkpoint, launch, tracked
from tasks.training import key as training_key

if TYPE_CHECKING:
    from tasks.training.log import Row
    from tasks.training.run import Run

ASK_SECONDS, ASK_STEPS = 1.0, 10
"""How often several processes tell each other whether a signal arrived, and the most steps in between."""


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

    Writes averaged weights in diffusers layout to `pipeline`, and the loss history, sample grids and the
    parameters of the run to `report`. Ctrl-C and SIGTERM save a checkpoint first.
    """
    verdict = require_accepted(accepted)
    from models.networks.autoencoder import load_autoencoder
    from tasks.training import run as training_run
    from tasks.training import warm_start

    index = latents.read_index(data)
    integrity.read_described(codec, "codec.json", "codec")
    training_run.check_fits(params)
    given = warm_start.given(params)
    network = training_run.network_config(index, model, given)
    if given:
        warm_start.check(given, network, diffusion)
    facts = training_key.facts(index, codec, verdict, model, diffusion, params)
    scratch = training_key.folder_of(workspace.scratch(), facts)
    checkpoint.refuse_other_network(scratch, training_run.architecture(network))
    dataset = {"name": verdict.get("source", "images"), "digest": index["digest"]}
    with ExitStack() as stack:
        first = int(os.environ.get("RANK", "0")) == 0
        if first:  # of several processes one holds the lock, tells MLflow and writes; the others only compute
            stack.enter_context(locks.exclusive(workspace.scratch() / "train.lock"))  # never two runs at once
            tracking.prepare()
        stack.enter_context(training_run.memory_told(params))
        run = training_run.prepare(data, index, facts, network, diffusion, params, given)
        if first and index["autoencoder"]:
            run.autoencoder = load_autoencoder(codec / "vae", str(run.accelerator.device))
        live = None
        if first:
            tracking.connect()
            live = stack.enter_context(tracked.training_run(facts["train_key"], facts["params"], dataset))
            _tell_codec(live, codec)
        asked = stack.enter_context(_deferred_signals())
        fit(run, live, asked, params.steps)
        history = _closed(run, live)
        run.accelerator.end_training()
        if live is None:
            return
        _write_report(report, run, history, facts, dataset, codec)
        _write_pipeline(pipeline, codec, run, index, facts)
        live.artifact(report / "history.csv", "train")
    print(f"train: {run.params.steps} steps, loss {history[-1]['loss']:.4f}, key {facts['train_key'][:12]}")


def fit(run: Run, live: tracked.TrainingRun | None, asked: list[int], until: int) -> None:
    """The training loop up to step `until`: batch, loss, backward, step, average, log, save.

    Only the process with `live` draws, tells and writes. A signal in `asked` saves and leaves with `Preempted`, or
    `KeyboardInterrupt`, after a whole step.
    """
    import torch
    from tqdm import tqdm

    from tasks.training import held_out, previews
    from tasks.training import log as training_log
    from tasks.training.batches import seed_for
    from tasks.training.run import gathered, snapshot

    params, accelerator = run.params, run.accelerator
    meter = training_log.Meter(run) if live else None
    somebody_asked = _Asked(run, asked)
    bar = tqdm(
        total=params.steps,
        initial=run.step,
        desc="train",
        unit="step",
        mininterval=1,
        dynamic_ncols=True,
        disable=live is None,
    )
    run.module.train()
    while run.step < until:
        if params.full_steps:
            run.network.train_adapter(train=run.step >= params.full_steps)  # type: ignore[operator]

        # batch, loss, backward; in as many parts as the gradient is accumulated over
        torch.manual_seed(seed_for(params.seed, "dropout", run.step, accelerator.process_index))
        for part in range(params.gradient_accumulation):
            batch = run.batches.draw(run.step, part)
            with accelerator.accumulate(run.module):
                with accelerator.autocast():
                    losses = run.objective(run.module, batch)
                accelerator.backward(losses.mean())
            run.tally.add_losses(batch.t, losses)

        # step
        learning_rate = learning_rate_at(run.step, params)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate
        gradient_norm = accelerator.clip_grad_norm_(run.module.parameters(), params.clip_norm)
        run.tally.add_gradient_norm(gradient_norm)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        bar.update()
        if meter:
            meter.count(params.batch_size)

        # average
        for average in run.averages.values():
            average.update(run.step)

        # log
        measure = run.step % params.sample_every == 0
        if run.step % params.log_every == 0 or measure:
            run.history.append(_row(run))
            run.tally.clear()
            training_log.refuse_divergence(run.history, run.folder)
            if live and meter:
                speed = meter.read()
                if measure:
                    run.history[-1] |= held_out.held_out_losses(run)
                    live.image("samples", run.step, previews.sample_grid(run))
                live.metrics(run.step, training_log.as_written(run.history[-1], params.pipeline_ema) | speed)
                bar.set_postfix(loss=f"{run.history[-1]['loss']:.4f}", img_s=f"{speed['img_per_s']:.0f}", refresh=False)
                meter.start()

        # save
        leaving = somebody_asked()
        if leaving or measure or run.step % params.checkpoint_every == 0 or run.step == until:
            if accelerator.scaler is None:  # which skips the steps of gradients that overflowed
                training_log.refuse_bad_gradient(gradient_norm.item(), run.step, run.folder)
            tallies = gathered(run)
            if live:
                checkpoint.save(run.folder, snapshot(run, tallies))
        if leaving:
            bar.close()
            accelerator.wait_for_everyone()
            accelerator.end_training()
            raise KeyboardInterrupt if signal.SIGINT in asked else Preempted
    bar.close()


def _row(run: Run) -> Row:
    """The row of the history that is due at this step, from all processes."""
    summed = run.accelerator.reduce(run.tally.sums, "sum")
    learning_rate = learning_rate_at(run.step - 1, run.params)
    return {"step": run.step, "learning_rate": learning_rate, **run.tally.row(summed)}


def _closed(run: Run, live: tracked.TrainingRun | None) -> list[Row]:
    """The history of a run at its end: the last step has a row, a held-out loss and a grid, whatever the cadence.

    They are not in the checkpoint, so that a longer run that continues from there has the history of one that
    never ended here.
    """
    from tasks.training import held_out, previews
    from tasks.training import log as training_log

    history = list(run.history)
    if not history or history[-1]["step"] != run.step:
        history.append(_row(run))
    if live and run.step % run.params.sample_every:
        history[-1] = history[-1] | held_out.held_out_losses(run)
        live.image("samples", run.step, previews.sample_grid(run))
        live.metrics(run.step, training_log.as_written(history[-1], run.params.pipeline_ema))
    return history


class _Asked:
    """Whether a signal arrived, in any process: all must leave after the same step.

    To ask the others costs a message, so several processes ask about once a second; slow steps must not keep a signal
    waiting. They agree on the step at which they ask next, because all see the same sums.
    """

    def __init__(self, run: Run, here: list[int]) -> None:
        self.run, self.here = run, here
        self.steps, self.began = 1, time.monotonic()
        self.next = run.step + self.steps

    def __call__(self) -> bool:
        import torch

        accelerator = self.run.accelerator
        if accelerator.num_processes == 1:
            return bool(self.here)
        if self.run.step < self.next:
            return False
        milliseconds = round((time.monotonic() - self.began) * 1000)
        told = torch.tensor([len(self.here), milliseconds], device=accelerator.device)
        signals, total = accelerator.reduce(told, "sum").tolist()
        one_step = max(1, total) / accelerator.num_processes / self.steps / 1000
        self.steps, self.began = min(max(1, int(ASK_SECONDS / one_step)), ASK_STEPS), time.monotonic()
        self.next = self.run.step + self.steps
        return signals > 0


def learning_rate_at(step: int, params: TrainParams) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then constant or a half cosine down to 0."""
    if step < params.warmup_steps:
        return params.learning_rate * (step + 1) / params.warmup_steps
    if params.lr_schedule == "constant":
        return params.learning_rate
    progress = (step - params.warmup_steps) / (params.steps - params.warmup_steps)
    return params.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


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


def _tell_codec(live: tracked.TrainingRun, codec: Path) -> None:
    """What stands between images and the model bounds what the model can reach, so its run holds those numbers, too."""
    live.log(0, measures.of_codec(codec))
    if (codec / measures.RECONSTRUCTIONS).is_file():
        live.image("reconstructions", 0, codec / measures.RECONSTRUCTIONS)


def _write_report(
    report: Path, run: Run, history: list[Row], facts: dict[str, Any], dataset: dict[str, str], codec: Path
) -> None:
    from tasks.training import log as training_log
    from tasks.training import previews

    chosen = run.params.pipeline_ema
    text = io.StringIO()
    writer = csv.DictWriter(
        text, training_log.columns(run.diffusion.timesteps, run.params.ema, chosen), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(training_log.as_written(row, chosen) for row in history)
    with atomic.writing_folder(report) as folder:
        atomic.write_text(folder / "history.csv", text.getvalue())
        atomic.write_json(folder / "run.json", {**facts, "dataset": dataset, "averages": _compared(run, history)})
        (folder / "codec").mkdir()
        for name in measures.CODEC:
            if (codec / name).is_file():
                atomic.write_bytes(folder / "codec" / name, (codec / name).read_bytes())
        (folder / "samples").mkdir()
        for row in history:
            if f"held_out_loss/{chosen}" in row:
                grid = previews.grid_path(run.folder, int(row["step"]))
                atomic.write_bytes(folder / "samples" / grid.name, grid.read_bytes())


def _compared(run: Run, history: list[Row]) -> dict[str, float]:
    """The held-out loss of each average at the end; the smallest is a candidate for `train.pipeline_ema`."""
    return {name: history[-1][f"held_out_loss/{name}"] for name in run.params.ema}


def _write_pipeline(pipeline: Path, codec: Path, run: Run, index: dict[str, Any], facts: dict[str, Any]) -> None:
    from models.networks.text_unet import adapter, merged
    from models.pipeline import PipelineInfo, save_pipeline
    from models.schedules import betas

    info = PipelineInfo(
        conditioning=index["conditioning"],
        channels=index["image"]["channels"],
        size=index["image"]["size"],
        schedule=run.diffusion.schedule,
        timesteps=run.diffusion.timesteps,
        prediction=run.diffusion.prediction,
        train_key=facts["train_key"],
        classes=index["classes"] or index["prompts"] or [],
        null_label=len(index["classes"]) if index["conditioning"] == "label" else None,
        prompts=index["prompts"],
        latent=[index["channels"], index["size"]] if index["autoencoder"] else None,
    )
    frozen = {name: parameter.detach() for name, parameter in run.network.named_parameters()}
    final = frozen | run.averages[run.params.pipeline_ema].state_dict()
    weights, additions = (
        {name: value.cpu().contiguous() for name, value in made.items()} for made in (merged(final), adapter(final))
    )
    with atomic.writing_folder(pipeline) as folder:
        levels = betas(run.diffusion.schedule, run.diffusion.timesteps, run.diffusion.zero_terminal_snr)
        save_pipeline(folder, run.network, weights, levels, info, codec, additions)


if __name__ == "__main__":
    launch.through_accelerate("tasks.train")
    stage.main(train)
