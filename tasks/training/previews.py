"""Grids of samples that are drawn while a network trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.runtime import atomic
from tasks.training.held_out import averaged

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tasks.training.run import Run

STEPS, COLUMNS, ROWS = 20, 10, 4
LARGE = 3 * 64 * 64
"""Numbers of a sample from which on one row of them must do."""
MOST_PIXELS, SCALE = 128, 4
"""Of the side of an image in a grid, and how many times it is enlarged at most."""


def sample_grid(run: Run) -> Path:
    """Draw a few images from the first of the averages; kept beside the checkpoints as a PNG."""
    import numpy as np
    import torch

    from models import pictures

    count = COLUMNS * (ROWS if math.prod(run.batches.shape) <= LARGE else 1)
    condition = run.batches.conditions(count)
    # In parts of a training batch: of what fits for training, so many fit for drawing.
    parts = [range(start, min(start + run.batches.size, count)) for start in range(0, count, run.batches.size)]
    with torch.inference_mode(), averaged(run.network, run.averages[run.params.ema[0]]):
        drawn = [_drawn(run, part, None if condition is None else condition[part[0] : part[-1] + 1]) for part in parts]
    shown = pictures.shrunk(np.concatenate(drawn), MOST_PIXELS)
    path = grid_path(run.folder, run.step)
    grid = pictures.grid(shown, COLUMNS, max(1, min(SCALE, MOST_PIXELS // shown.shape[-1])))
    atomic.write_bytes(path, pictures.png_bytes(grid))
    return path


def _drawn(run: Run, seeds: range, condition: torch.Tensor | None) -> np.ndarray:
    """Images of the network as it is, uint8 [n, C, H, W], each from the noise of its seed."""
    import torch

    from models import samplers
    from models.networks import autoencoder
    from models.networks.network import predictor
    from models.pixels import to_uint8

    draw, device = samplers.SeededNoise(seeds, run.batches.shape), run.accelerator.device

    clip = run.autoencoder is None
    scheduler = samplers.SchedulerConfig(run.alpha_bar, run.diffusion.prediction, clip_sample=clip)
    sampling = samplers.Sampling("dpm_solver_pp_2m", min(STEPS, run.diffusion.timesteps))
    denoise = samplers.denoiser(predictor(run.network), scheduler, sampling, condition)
    drawn = samplers.sample(denoise, lambda: torch.from_numpy(draw()).to(device), scheduler, sampling)
    if run.autoencoder is not None:
        drawn = autoencoder.decode(run.autoencoder, drawn)
    return to_uint8(drawn.float().cpu().numpy())


def grid_path(folder: Path, step: int) -> Path:
    return folder / "samples" / f"step-{step:06d}.png"
