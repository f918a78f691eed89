"""What a finished training writes: the pipeline in diffusers layout, and the report."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from models.networks.controlnet import ControlledUNet
from models.networks.network import under_all_names
from models.networks.text_encoder import load_text_encoder, save_text_encoder
from models.networks.text_unet import adapter, merged
from models.noise.schedules import saved_noise
from models.pipeline import PipelineInfo, save_pipeline
from models.tuned_text import split
from tasks.formats import training_record
from tasks.formats.training_record import Dataset, TrainingRecord
from tasks.runtime import atomic, codec_quality
from tasks.training import control, log, previews

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.formats.latents import LatentsIndex
    from tasks.training.key import RunFacts
    from tasks.training.log import HistoryRow
    from tasks.training.run import Run


def write_report(
    report: Path, run: Run, history: Sequence[HistoryRow], facts: RunFacts, dataset: Dataset, codec: Path
) -> None:
    """Write the loss history, the identity of the run, the sample grids and the codec's measurements."""
    chosen = run.params.pipeline_ema
    text = io.StringIO()
    columns = log.columns(run.diffusion.timesteps, run.params.ema, chosen, muon=run.params.optimizer == "muon")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.published(chosen) for row in history)
    record = TrainingRecord(**asdict(facts), dataset=dataset, averages=history[-1].held_out_loss)
    with atomic.writing_folder(report) as folder:
        atomic.write_text(folder / "history.csv", text.getvalue())
        record.write(folder / training_record.FILE)
        (folder / "codec").mkdir()
        for name in codec_quality.FILES:
            if (codec / name).is_file():
                atomic.write_bytes(folder / "codec" / name, (codec / name).read_bytes())
        (folder / "samples").mkdir()
        for row in history:
            if chosen in row.held_out_loss:
                grid = previews.grid_path(run.folder, row.step)
                atomic.write_bytes(folder / "samples" / grid.name, grid.read_bytes())


def write_pipeline(pipeline: Path, codec: Path, run: Run, index: LatentsIndex, train_key: str) -> None:
    """Write the averaged weights, the scheduler and the codec's networks in diffusers layout."""
    info = PipelineInfo(
        conditioning=index.conditioning,
        channels=index.image.channels,
        size=index.image.size,
        schedule=run.diffusion.schedule,
        timesteps=run.diffusion.timesteps,
        prediction=run.diffusion.prediction,
        train_key=train_key,
        classes=index.classes or index.prompts or [],
        null_label=len(index.classes) if index.conditioning == "label" else None,
        prompts=index.prompts,
        latent=[index.channels, index.size] if index.autoencoder else None,
        control=index.control.to_json() if index.control and isinstance(run.network, ControlledUNet) else None,
    )
    frozen = control.base_weights(run)
    final, text = split(_complete(run, frozen | run.averages[run.params.pipeline_ema].state_dict()))
    others = {name: merged(split(_complete(run, frozen | earlier))[0]) for name, earlier in run.companions.items()}
    diffusion = run.diffusion
    noise = saved_noise(diffusion.schedule, diffusion.timesteps, diffusion.zero_terminal_snr, diffusion.shift)
    with atomic.writing_folder(pipeline) as folder, TemporaryDirectory() as temporary:
        codec = _with_text(codec, text, Path(temporary) / "codec") if text else codec
        save_pipeline(folder, run.network, merged(final), noise, info, codec, adapter(final), others)


def _with_text(codec: Path, weights: Mapping[str, Tensor], copy: Path) -> Path:
    """Copy the codec with other weights of its text encoder; returns `copy`."""
    shutil.copytree(codec, copy, copy_function=shutil.copyfile)
    encoder = load_text_encoder(codec)
    encoder.towers[0].model.load_state_dict(weights)
    save_text_encoder(copy, encoder)
    return copy


def _complete(run: Run, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by parameter name on the CPU, under all names of diffusers."""
    return under_all_names(run.network, {name: tensor.cpu().contiguous() for name, tensor in weights.items()})
