"""Grids of sample images that are drawn while a network trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.images import pictures
from models.images.pixels import to_uint8
from models.networks import autoencoder
from models.networks.network import predictor
from models.noise import samplers
from models.noise.paths import DiffusionPath
from models.parallel import over_batches
from tasks.runtime import atomic
from tasks.training.held_out import averaged

if TYPE_CHECKING:
    from tasks.training.run import Run

STEPS, COLUMNS, ROWS = 10, 10, 4
CONSISTENCY = "consistency", 2
"""Sampler and steps of a network that is tuned for few steps."""
LARGE_SAMPLE = 3 * 64 * 64
"""Samples with more values than this get a one-row grid."""
MAX_SIDE, MAX_SCALE = 128, 4
"""Largest side of an image in a grid, in pixels, and the largest factor by which small images are enlarged."""


def sample_grid(run: Run) -> Path:
    """Draw sample images with the first weight average; returns the PNG, which lies beside the checkpoints.

    Every process of a sharded run draws them, and the first one writes the file.
    """
    # Processes that share a sharded network must call it in the same order, which several threads would not.
    parallel = "none" if run.sharded else run.accelerator.device.type
    count = COLUMNS * (ROWS if math.prod(run.batches.shape) <= LARGE_SAMPLE else 1)
    condition, control = run.batches.conditions(count), run.batches.controls(count)

    @torch.inference_mode()
    def draw(part: slice) -> np.ndarray:
        return _draw(run, range(count)[part], *(None if each is None else each[part] for each in (condition, control)))

    with averaged(run.network, run.averages[run.params.ema[0]]):
        # In batches of the training batch's size, which fit in memory.
        drawn = over_batches(draw, count, run.batches.size, parallel)
    shown = pictures.shrunk(np.concatenate(drawn), MAX_SIDE)
    path = grid_path(run.folder, run.step)
    grid = pictures.grid(shown, COLUMNS, max(1, min(MAX_SCALE, MAX_SIDE // shown.shape[-1])))
    if run.accelerator.is_main_process:
        atomic.write_bytes(path, pictures.png_bytes(grid))
    return path


def _draw(run: Run, seeds: range, condition: torch.Tensor | None, control: torch.Tensor | None) -> np.ndarray:
    """Draw images uint8 [n, C, H, W] with the network's current weights, each from the noise of its seed."""
    noise, device = samplers.SeededNoise(seeds, run.batches.shape), run.accelerator.device
    clip = run.autoencoder is None and isinstance(run.timesteps.path, DiffusionPath)
    scheduler = samplers.SchedulerConfig(run.timesteps.path, run.diffusion.prediction, clip_sample=clip)
    distil, usual = run.params.distil, ("dpm_solver_pp_2m", min(STEPS, run.diffusion.timesteps))
    sampling = samplers.Sampling(*(CONSISTENCY if distil and run.step > distil.after else usual))
    denoise = samplers.denoiser(predictor(run.network, control=control), scheduler, sampling, condition)
    drawn = samplers.sample(denoise, lambda: torch.from_numpy(noise()).to(device), scheduler, sampling)
    if run.autoencoder is not None:
        drawn = autoencoder.decode(run.autoencoder, drawn)
    return to_uint8(drawn.float().cpu().numpy())


def grid_path(folder: Path, step: int) -> Path:
    """Return the file of a step's grid in the folder of a run's checkpoints."""
    return folder / "samples" / f"step-{step:06d}.png"
