"""A trained model on disk (diffusers layout) and in memory (ready to sample).

`unet/` and `scheduler/` are what diffusers writes, so the weights load there without this project;
`afterimage.json` holds what diffusers has no place for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import samplers, schedules

if TYPE_CHECKING:
    import torch

    from models.unet import UNet

FORMAT = 1


@dataclass(frozen=True)
class Pipeline:
    """A U-Net in evaluation mode with the schedule it was trained on. `info` is `afterimage.json`."""

    unet: UNet
    betas: schedules.Array
    info: dict[str, Any]
    device: str = "cpu"
    variance: str = "fixed_small"
    """Of the noise that `ddpm` adds; see `samplers.VARIANCES`."""

    @property
    def alpha_bar(self) -> schedules.Array:
        return schedules.alpha_bar(self.betas)

    @property
    def prediction(self) -> str:
        return self.info["prediction"]

    @property
    def conditioning(self) -> str:
        return self.info["conditioning"]

    @property
    def classes(self) -> list[str]:
        return self.info["classes"]

    @property
    def channels(self) -> int:
        return self.info["channels"]

    @property
    def size(self) -> int:
        return self.info["size"]

    @property
    def timesteps(self) -> int:
        return len(self.betas)

    @property
    def null_label(self) -> int | None:
        return self.info["null_label"]

    def condition(self, labels: Sequence[int] | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Labels -> (condition, null condition) int64 [N], or two Nones. Raises `ValueError` where
        labels and model do not fit each other."""
        import torch

        if self.conditioning == "none":
            if labels is not None:
                raise ValueError("this model is unconditional; ask for images without labels")
            return None, None
        if labels is None:
            raise ValueError("this model is class-conditional; give a label for each image")
        wanted = torch.as_tensor(list(labels), dtype=torch.int64, device=self.device)
        if wanted.min() < 0 or wanted.max() > int(self.null_label or 0):
            raise ValueError(f"labels must lie between 0 and {len(self.classes) - 1}")
        return wanted, torch.full_like(wanted, int(self.null_label or 0))

    def sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        sampler: str = "ddim",
        steps: int = 50,
        guidance_scale: float = 1.0,
        batch_size: int = 256,
        callback: samplers.Callback | None = None,
        progress: Callable[[int], object] | None = None,
        eta: float = 0.0,
        guidance_interval: samplers.Interval = None,
    ) -> np.ndarray:
        """Draw len(seeds) images, float32 [N, C, H, W] in [-1, 1]; image i depends on seeds[i] and labels[i].

        `callback(i, t, x, x0)` sees torch tensors after each step; `progress(n)` is told how many images
        a finished batch held. `eta` belongs to `ddim`; `guidance_interval` (low, high) limits guidance to these
        noise levels, see `samplers.denoiser`. Raises `ValueError` for guidance on an unconditional model, labels
        that do not fit, an unknown sampler, an eta it does not have, or too many steps.
        """
        if guidance_scale != 1.0 and self.conditioning == "none":
            raise ValueError("guidance needs a conditional model; use guidance_scale 1")
        batches = []
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            denoise = self._denoiser(labels[part] if labels is not None else None, guidance_scale, guidance_interval)
            images = self._sample_batch(seeds[part], denoise, sampler, steps, callback, eta)
            batches.append(images)
            if progress:
                progress(len(images))
        return np.concatenate(batches)

    def _denoiser(self, labels: Any, scale: float, interval: samplers.Interval) -> samplers.Denoise:
        import torch

        def predict(x: torch.Tensor, t: int, condition: torch.Tensor | None) -> torch.Tensor:
            return self.unet(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device), condition)

        condition, null = self.condition(labels)
        return samplers.denoiser(predict, self.prediction, self.alpha_bar, condition, null, scale, interval)

    def _sample_batch(self, seeds: Any, denoise: Any, sampler: str, steps: int, callback: Any, eta: float) -> Any:
        import torch

        draw = samplers.SeededNoise(seeds, (self.channels, self.size, self.size))

        def noise() -> torch.Tensor:
            return torch.from_numpy(draw()).to(self.device)

        with torch.inference_mode():
            images = samplers.sample(
                sampler, denoise, noise, self.alpha_bar, steps, callback, eta=eta, variance=self.variance
            )
        return images.float().cpu().numpy()


def to_uint8(images: np.ndarray) -> np.ndarray:
    """float [N, C, H, W] in [-1, 1] -> uint8, rounded; what lies outside is clipped."""
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]; inverse of `to_uint8` up to its rounding."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def scheduler_config(betas: schedules.Array, prediction: str) -> dict[str, Any]:
    """A diffusers `DDPMScheduler` that denoises as we do; it carries the betas themselves."""
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.42.1",
        "num_train_timesteps": len(betas),
        "trained_betas": [float(beta) for beta in betas],
        "prediction_type": prediction,
        "variance_type": "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "timestep_spacing": "trailing",
    }


def save_pipeline(folder: Path, unet: UNet, weights: dict[str, torch.Tensor], betas: Any, info: dict[str, Any]) -> None:
    """Write the layout into an existing empty `folder`; the caller makes it appear atomically."""
    from safetensors.torch import save_file

    def write(path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    write(folder / "unet" / "config.json", unet.config.to_diffusers())
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    write(folder / "scheduler" / "scheduler_config.json", scheduler_config(betas, info["prediction"]))
    write(folder / "afterimage.json", {"format": FORMAT, **info})
    if info["conditioning"] == "none":
        index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
        write(folder / "model_index.json", {"_class_name": "DDPMPipeline", "_diffusers_version": "0.42.1", **index})


def load_pipeline(folder: Path, device: str = "cpu") -> Pipeline:
    """Read a folder that `save_pipeline` wrote, or one of an unconditional `DDPMPipeline` or `DDIMPipeline` that
    somebody published in diffusers format (`models.published`).

    Raises `FileNotFoundError` when it is neither, `ValueError` in one sentence for another format or for what our
    network and samplers cannot do.
    """
    from models import published
    from models.unet import UNet, UNetConfig

    unet_folder, scheduler_folder = published.parts(folder)
    config = UNetConfig.from_diffusers(_read(unet_folder / "config.json"))
    scheduler = published.read_scheduler(_read(scheduler_folder / "scheduler_config.json"))
    weights = published.read_weights(unet_folder)
    if (folder / "afterimage.json").exists():
        info = _read(folder / "afterimage.json")
        if info["format"] != FORMAT:
            raise ValueError(f"{folder} has format {info['format']}, this version reads {FORMAT}; train it again")
    else:
        info = {"format": FORMAT, **published.describe(unet_folder, config, scheduler)}
    unet = UNet(config)
    try:
        unet.load_state_dict(weights)
    except RuntimeError:  # names every tensor that does not fit
        raise ValueError(f"the weights in {unet_folder} are not those of the network in its config.json") from None
    unet.eval().requires_grad_(False).to(device)
    return Pipeline(unet, scheduler.betas, info, device, scheduler.variance)
