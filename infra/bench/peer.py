"""The reference: the training loop that diffusers documents for unconditional training, as its users run it.

Written from the guide to `train_unconditional.py` and the documentation of the classes it uses, with the defaults given
there. Two things differ, both in favour of the reference: PIL and NumPy do the work of torchvision, which has no build
for the CPU build of torch; and the values that it would log after every step are computed but not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn import functional as F

from infra.bench.clock import now

if TYPE_CHECKING:
    from models.networks.unet import UNetConfig

try:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
except ModuleNotFoundError:  # `python -m infra.bench gpu` runs where it is not installed
    from infra.bench.without_accelerate import Accelerator, AcceleratorState

# Defaults of the script.
LEARNING_RATE, BETAS, WEIGHT_DECAY, WARM_UP = 1e-4, (0.95, 0.999), 1e-6, 500
EMA_DECAY, EMA_INV_GAMMA, EMA_POWER = 0.9999, 1.0, 0.75
TIMESTEPS, SCHEDULE, PREDICTION = 1000, "linear", "epsilon"
DEFAULT_BATCH = 16


class ImageFiles:
    """A map-style dataset of image files; an item is opened, resized, cropped, flipped and normalised on access."""

    def __init__(self, folder: Path, size: int, channels: int, flip: bool) -> None:
        self.paths = sorted(folder.iterdir())
        self.size, self.mode, self.flip = size, "L" if channels == 1 else "RGB", flip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        """float32 [C, size, size] in [-1, 1]."""
        with Image.open(self.paths[row]) as file:
            image = file.convert(self.mode)
        short = min(image.size)
        if short != self.size:
            width, height = (max(self.size, round(side * self.size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        if self.flip and torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.array(image, np.uint8).reshape(self.size, self.size, -1)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)


@dataclass(frozen=True)
class PeerSettings:
    """What the reference has in common with a run of ours; everything else is a default of the reference."""

    network: UNetConfig
    batch_size: int
    precision: str
    """"no" or "bf16"."""
    steps: int = 10_000
    """End of the learning-rate schedule."""
    seed: int = 0
    flip: bool = False


class Peer:
    """One run of the reference loop, on the images in the folder `files`."""

    def __init__(self, settings: PeerSettings, files: Path) -> None:
        self.config = settings.network
        self.with_accelerate = Accelerator.__module__.startswith("accelerate")
        AcceleratorState._reset_state(reset_partial_state=True)  # the last run may have had another precision
        self.accelerator = Accelerator(mixed_precision=settings.precision)
        torch.manual_seed(settings.seed)
        model = UNet2DModel.from_config(self.config.to_diffusers())
        self.ema = EMAModel(
            model.parameters(),
            decay=EMA_DECAY,
            use_ema_warmup=True,
            inv_gamma=EMA_INV_GAMMA,
            power=EMA_POWER,
            model_cls=UNet2DModel,
            model_config=model.config,
        )
        self.noise_scheduler = DDPMScheduler(TIMESTEPS, beta_schedule=SCHEDULE, prediction_type=PREDICTION)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
        # DataLoader is declared for subclasses of Dataset, and takes whatever has a length and items.
        images: Any = ImageFiles(files, self.config.size, self.config.channels, settings.flip)
        loader = torch.utils.data.DataLoader(images, batch_size=settings.batch_size, shuffle=True)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=WARM_UP, num_training_steps=settings.steps)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, loader, schedule
        )
        self.ema.to(self.accelerator.device)
        self.batches = self._endless()
        self.step = 0
        self.shown: dict[str, float] = {}
        """The values for the progress bar and the tracker after every step."""

    def _endless(self) -> Iterator[torch.Tensor]:
        while True:
            yield from self.loader

    def advance(self, steps: int) -> tuple[float, float]:
        """Make `steps` optimizer steps; returns `now()` after the last."""
        accelerator = self.accelerator
        self.model.train()
        for _ in range(steps):
            clean = F.pixel_unshuffle(next(self.batches), self.config.patch_size)
            noise = torch.randn(clean.shape, device=clean.device)
            timesteps = torch.randint(0, TIMESTEPS, (len(clean),), device=clean.device)
            noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
            with accelerator.accumulate(self.model):
                output = self.model(noisy, timesteps).sample
                loss = F.mse_loss(output.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.ema.step(self.model.parameters())
            self.step += 1
            self.shown = {"loss": loss.detach().item(), "lr": self.schedule.get_last_lr()[0], "step": self.step}
        return now()

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name."""
        names = [name for name, _ in self.accelerator.unwrap_model(self.model).named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))
