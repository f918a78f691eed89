"""Stage `train`: latents -> a trained diffusion pipeline.

The training loop is `fit`. Its state is a `Run` (`tasks/training/run.py`), which `tasks/training/key.py` identifies by
everything that determines the weights. Checkpoints lie in a scratch folder named by that key, outside DVC's outputs: a
killed run continues from there and ends in the same bytes as an undisturbed one.
"""

from __future__ import annotations

import math
import os
import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.formats.codec_info import CodecInfo
from tasks.formats.prior import Prior
from tasks.formats.verdict import require_accepted
from tasks.params import DiffusionParams, ModelParams, TrainParams
from tasks.runtime import codec_quality, locks, stage, tracking, workspace
from tasks.runtime.errors import Preempted
from tasks.runtime.progress import progress
from tasks.training import launch

if TYPE_CHECKING:
    from tasks.training.log import HistoryRow
    from tasks.training.run import Run
    from tasks.training.tracked import TrainingRun


def train(
    data: Path,
    codec: Path,
    accepted: Path,
    prior: Path,
    pipeline: Path,
    averages: Path,
    report: Path,
    model: ModelParams,
    diffusion: DiffusionParams,
    params: TrainParams,
) -> None:
    """Train the diffusion model on the encoded data set; continue from the newest checkpoint of the same run.

    With a subject in `prior` it is trained on that and on class images instead (DreamBooth). Writes averaged weights in
    diffusers layout to `pipeline`, snapshots of the averages to `averages`, and the loss history, sample grids and the
    identity of the run to `report`. Ctrl-C and SIGTERM save a checkpoint first.
    """
    verdict = require_accepted(accepted)
    CodecInfo.load(codec)

    from models.networks.autoencoder import load_autoencoder
    from tasks.formats import latents
    from tasks.formats.training_record import Dataset
    from tasks.training import averages as snapshots
    from tasks.training import checkpoint, control, machine, outputs, sharded, tracked, warm_start
    from tasks.training import key as training_key
    from tasks.training import run as training_run
    from tasks.training.memory import explain_out_of_memory
    from tasks.training.prior_mix import Subject
    from tasks.training.stopping import deferred_signals

    index, subject = latents.read_index(data), Prior.load(prior)
    machine.check_fits(params)
    control.require_maps(index, params)
    initial = warm_start.initial_weights(params, model.architecture)
    network = training_run.network_config(index.input_spec, model, initial)
    if initial:
        warm_start.check(initial, network, diffusion)
    facts = training_key.run_facts(index, codec, verdict, model, diffusion, params, subject)
    scratch = training_key.folder_of(workspace.scratch(), facts)
    checkpoint.refuse_other_network(scratch, training_run.architecture(network))
    dataset = Dataset(name=verdict.source, digest=index.digest)
    with ExitStack() as stack:
        main = int(os.environ.get("RANK", "0")) == 0
        if main:  # of several processes only this one locks, logs and writes
            stack.enter_context(locks.exclusive(workspace.scratch() / "train.lock"))  # one training at a time
            tracking.prepare()
        stack.enter_context(explain_out_of_memory(params))
        mixed = Subject(prior, codec if params.text_encoder else None) if subject else None
        run = training_run.prepare(data, index, facts, network, diffusion, params, initial, mixed, codec)
        stack.callback(run.checkpoints.close)  # also after an error, before the lock is released
        if main and index.autoencoder:
            run.autoencoder = load_autoencoder(codec / "vae", str(run.accelerator.device))
        live = None
        if main:
            tracking.connect()
            live = stack.enter_context(tracked.training_run(facts.train_key, facts.params, dataset.model_dump()))
            _log_codec(live, codec)
        signals = stack.enter_context(deferred_signals())
        fit(run, live, signals, params.steps)
        history = _complete_history(run, live)
        sharded.collect(run)
        run.accelerator.end_training()
        if live is None:
            return
        outputs.write_report(report, run, history, facts, dataset, codec)
        outputs.write_pipeline(pipeline, codec, run, index, facts.train_key)
        snapshots.write(averages, run, facts.train_key)
        live.artifact(report / "history.csv", "train")
    print(f"train: {params.steps} steps, loss {history[-1].loss:.4f}, key {facts.train_key[:12]}")


def fit(run: Run, live: TrainingRun | None, signals: list[int], until: int) -> None:
    """Train up to step `until`: batch, loss, backward, step, average, log, save.

    Args:
        run: The state of the training, which is advanced in place.
        live: The run in MLflow; None in all processes but the first, which alone logs and saves. It also draws samples
            alone, unless the network is sharded.
        signals: Numbers of the signals received so far.
        until: Number of the last step.

    Raises:
        Preempted: after SIGTERM, once a checkpoint is saved.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
        StageError: if the loss diverges.
    """
    import torch

    from models.networks.text_unet import TextUNet
    from tasks.training import averages, companions, control, log, optimizer, previews, tuning
    from tasks.training.batches import seed_for
    from tasks.training.held_out import held_out_losses
    from tasks.training.meter import Meter
    from tasks.training.run import gather_tallies, snapshot
    from tasks.training.stopping import StopRequest

    params, accelerator = run.params, run.accelerator
    taking_part = live is not None or run.sharded  # in what one process does, or all that share a sharded network
    meter = Meter(run) if taking_part else None
    stop_requested = StopRequest(run, signals)
    bar = progress(desc="train", total=params.steps, initial=run.step, unit="step", disable=live is None)
    run.module.train()
    while run.step < until:
        # what is trained: with `full_steps`, first the base and then the LoRA adapter or the ControlNet
        if params.full_steps and isinstance(run.network, TextUNet):
            run.network.train_adapter(train=run.step >= params.full_steps)
        control.begin(run)
        # and by which objective: with `distil`, first as usual and then for consistency
        tuning.begin(run)
        objective, phase = tuning.objective_at(run, run.step), params.phase(run.step)

        # batch, loss, backward; in the parts over which the gradient is accumulated
        torch.manual_seed(seed_for(params.seed, "dropout", run.step, accelerator.process_index))
        for part in range(params.gradient_accumulation):
            batch = run.batches.draw(run.step, part)
            with accelerator.accumulate(run.module):
                losses = run.backward(objective, batch)
            run.tally.add_losses(batch.t, losses)

        # step
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate_at(run.step, params, group["initial_lr"])
        gradient_norm = optimizer.clip_gradients(run)
        run.tally.add_gradient_norm(gradient_norm)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        bar.update()
        if meter:
            meter.count(params.batch_size)

        # average
        if (done := run.step - phase.start) % params.ema_every == 0:
            for average in run.averages.values():
                average.update(done, params.ema_every)
        companions.keep(run)
        if taking_part:
            averages.keep(run)

        # log
        sample_due = run.step % params.sample_every == 0
        if run.step % params.log_every == 0 or sample_due:
            row = _next_row(run)
            run.tally.clear()
            log.refuse_divergence(tuning.rows_of_phase([*run.history, row], params), run.checkpoints)
            if meter:
                speed = meter.read()
                if sample_due:
                    row = replace(row, held_out_loss=held_out_losses(run))
                    grid = previews.sample_grid(run)
                    if live:
                        live.image("samples", run.step, grid)
                if live:
                    live.metrics(run.step, row.published(params.pipeline_ema) | speed)
                    bar.set_postfix(loss=f"{row.loss:.4f}", img_s=f"{speed['img_per_s']:.0f}", refresh=False)
                meter.start()
            run.history.append(row)

        # save
        leaving = stop_requested()
        if leaving or sample_due or run.step % params.checkpoint_every == 0 or run.step == until:
            if accelerator.scaler is None:  # the fp16 scaler skips steps whose gradient overflowed
                log.refuse_bad_gradient(gradient_norm.item(), run.step, run.checkpoints)
            tallies = gather_tallies(run)
            saved = snapshot(run, tallies) if taking_part else None
            if live and saved:
                run.checkpoints.save(saved)
        if leaving:
            bar.close()
            run.checkpoints.wait()
            accelerator.wait_for_everyone()
            accelerator.end_training()
            raise KeyboardInterrupt if signal.SIGINT in signals else Preempted
    bar.close()
    run.checkpoints.wait()


def _next_row(run: Run) -> HistoryRow:
    """Return the row of the history since the last one, from all processes."""
    sums = run.accelerator.reduce(run.tally.sums, "sum")
    params, last = run.params, run.step - 1
    row = run.tally.row(run.step, learning_rate_at(last, params, params.learning_rate), sums)
    if params.optimizer == "muon":
        row = replace(row, muon_learning_rate=learning_rate_at(last, params, params.muon_learning_rate))
    return row


def _complete_history(run: Run, live: TrainingRun | None) -> list[HistoryRow]:
    """Return the history of a finished run, whose last step always has a row, a held-out loss and a sample grid.

    The last checkpoint does not hold them, so a longer run that continues from it has the history of a run that never
    stopped there.
    """
    from tasks.training import previews
    from tasks.training.held_out import held_out_losses

    history = list(run.history)
    if not history or history[-1].step != run.step:
        history.append(_next_row(run))
    if (live or run.sharded) and run.step % run.params.sample_every:
        history[-1] = replace(history[-1], held_out_loss=held_out_losses(run))
        grid = previews.sample_grid(run)
        if live is None:
            return history
        live.image("samples", run.step, grid)
        live.metrics(run.step, history[-1].published(run.params.pipeline_ema))
    return history


def learning_rate_at(step: int, params: TrainParams, peak: float) -> float:
    """Return the learning rate of 0-based `step`: linear warm-up to `peak`, then constant or half a cosine to 0.

    Consistency tuning has a schedule of its own after that of the training before it.
    """
    phase, peak = params.phase(step), peak * params.learning_rate_factor(step)
    done = step - phase.start
    if done < params.warmup_steps:
        return peak * (done + 1) / params.warmup_steps
    if params.lr_schedule == "constant":
        return peak
    fraction = (done - params.warmup_steps) / (len(phase) - params.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * fraction))


def _log_codec(live: TrainingRun, codec: Path) -> None:
    """Log the codec's measurements, because its losses bound the quality that the model can reach."""
    live.log(0, codec_quality.of_codec(codec))
    if (codec / codec_quality.RECONSTRUCTIONS).is_file():
        live.image("reconstructions", 0, codec / codec_quality.RECONSTRUCTIONS)


if __name__ == "__main__":
    launch.through_accelerate("tasks.train")
    stage.main(train)
