"""A trained model on disk (diffusers layout) and in memory (ready to sample).

`unet/` and `scheduler/` are what diffusers writes, and so are `vae/`, `text_encoder/` and `tokenizer/` (of a second
encoder with `_2` at their end) where latents and captions are used, so the weights load there without this project;
`afterimage.json` holds what diffusers has no place for. `lora/` holds what was added to given weights, which are whole
in `unet/`: a small file for who has the given ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import samplers, schedules

if TYPE_CHECKING:
    import torch

    from models.networks.network import Network
    from models.networks.text_encoder import AnyEncoder

FORMAT = 2
PARTS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
"""What the codec made and a pipeline carries with it."""
ADAPTER = "lora/pytorch_lora_weights.safetensors"
"""Its name is the one that diffusers' `load_lora_weights(folder)` looks for."""


@dataclass(frozen=True)
class Pipeline:
    """A U-Net in evaluation mode with the schedule it was trained on. `info` is `afterimage.json`.

    `autoencoder` is there where it draws latents, `text` where captions condition it.
    """

    unet: Network
    betas: schedules.Array
    info: dict[str, Any]
    device: str = "cpu"
    sampling: dict[str, Any] = field(default_factory=dict)
    """What `samplers.sample` is told of it: `variance`, `spacing`, `steps_offset`."""
    autoencoder: Any = None
    text: AnyEncoder | None = None

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
        """What may be asked for by label: the classes; for captions without classes, some of them; else nothing."""
        return self.info["classes"]

    @property
    def prompts(self) -> list[str] | None:
        """For each of `classes` the caption that asks for it, where captions condition the model."""
        return self.info["prompts"]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of what the network sees: of an image, or of a latent."""
        channels, size = self.info["latent"] or (self.channels, self.size)
        return channels, size, size

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """What a network of two text encoders is told: a picture that is as large as what is drawn, and not cropped."""
        return self.size, self.size, 0, 0, self.size, self.size

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

    def condition(
        self, labels: Sequence[int] | None, prompts: Sequence[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Labels, or for a text-conditional model prompts -> (condition, null condition): int64 [N] each, float32
        [N, L, D] each (of two encoders packed, see `models/networks/text_encoder.py`), or two Nones. Raises
        `ValueError` where they and the model do not fit each other."""
        import torch

        if self.conditioning == "none":
            if labels is not None or prompts is not None:
                raise ValueError("this model is unconditional; ask for images without labels")
            return None, None
        if prompts is not None and self.text is None:
            raise ValueError("this model knows classes and no text; give labels")
        if (labels is None) == (prompts is None):
            raise ValueError("this model is conditional; give a label, or for text a prompt, for each image")
        if labels is not None:
            null = len(self.classes)
            wanted = torch.as_tensor(list(labels), dtype=torch.int64, device=self.device)
            if wanted.min() < 0 or wanted.max() > null:
                raise ValueError(f"labels must lie between 0 and {null - 1}")
            if self.text is None:
                return wanted, torch.full_like(wanted, null)
            prompts = [[*(self.prompts or ()), ""][label] for label in wanted.tolist()]
        assert self.text is not None and prompts is not None, "just seen to"
        embedded = self.text.encode([*prompts, ""]).to(self.device)
        if self.text.pooled is not None:
            from models.networks.text_encoder import with_sizes

            embedded = with_sizes(embedded, self.text.pooled, torch.tensor(self.sizes))
        return embedded[:-1], embedded[-1:].expand_as(embedded[:-1])

    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 images [N, C, H, W] -> what the network sees, float32 [N, *input_shape]."""
        import torch

        if self.autoencoder is None:
            return torch.from_numpy(from_uint8(pixels)).to(self.device)
        from models.networks.autoencoder import encode

        return encode(self.autoencoder, pixels)[0]

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """What the network sees, float [N, *input_shape] -> images, float [N, C, H, W], about [-1, 1]."""
        if self.autoencoder is None:
            return x
        from models.networks.autoencoder import decode

        return decode(self.autoencoder, x)

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
        prompts: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Draw len(seeds) images, float32 [N, C, H, W] in [-1, 1]; image i depends on seeds[i] and labels[i], or for
        a text-conditional model on prompts[i].

        `callback(i, t, x, x0)` sees torch tensors of `input_shape` after each step; `progress(n)` is told how many
        images a finished batch held. `eta` belongs to `ddim`; `guidance_interval` (low, high) limits guidance to these
        noise levels, see `samplers.denoiser`. Raises `ValueError` for guidance on an unconditional model, labels
        that do not fit, an unknown sampler, an eta it does not have, or too many steps.
        """
        if guidance_scale != 1.0 and self.conditioning == "none":
            raise ValueError("guidance needs a conditional model; use guidance_scale 1")
        batches = []
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            conditions = self.condition(
                labels[part] if labels is not None else None, prompts[part] if prompts is not None else None
            )
            denoise = self._denoiser(conditions, guidance_scale, guidance_interval)
            images = self._sample_batch(seeds[part], denoise, sampler, steps, callback, eta)
            batches.append(images)
            if progress:
                progress(len(images))
        return np.concatenate(batches)

    def _denoiser(self, conditions: Any, scale: float, interval: samplers.Interval) -> samplers.Denoise:
        import torch

        def predict(x: torch.Tensor, t: int, condition: torch.Tensor | None) -> torch.Tensor:
            return self.unet(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device), condition)

        condition, null = conditions
        clip = self.autoencoder is None
        return samplers.denoiser(predict, self.prediction, self.alpha_bar, condition, null, scale, interval, clip)

    def _sample_batch(self, seeds: Any, denoise: Any, sampler: str, steps: int, callback: Any, eta: float) -> Any:
        import torch

        draw = samplers.SeededNoise(seeds, self.input_shape)

        def noise() -> torch.Tensor:
            return torch.from_numpy(draw()).to(self.device)

        with torch.inference_mode():
            images = samplers.sample(sampler, denoise, noise, self.alpha_bar, steps, callback, eta, **self.sampling)
            images = self.decode(images)
        return images.float().cpu().numpy()


def to_uint8(images: np.ndarray) -> np.ndarray:
    """float [N, C, H, W] in [-1, 1] -> uint8, rounded; what lies outside is clipped."""
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]; inverse of `to_uint8` up to its rounding."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def scheduler_config(betas: schedules.Array, prediction: str, clip: bool = True) -> dict[str, Any]:
    """A diffusers `DDPMScheduler` that denoises as we do; it carries the betas themselves.

    Latents are not clipped; Stable Diffusion's pipelines expect their scheduler to begin at timestep 1 where it leaves
    out the last ones ("leading", which ours does not), and complain of another.
    """
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.42.1",
        "num_train_timesteps": len(betas),
        "trained_betas": [float(beta) for beta in betas],
        "prediction_type": prediction,
        "variance_type": "fixed_small",
        "clip_sample": clip,
        "clip_sample_range": 1.0,
        "timestep_spacing": "trailing",
        **({} if clip else {"steps_offset": 1}),
    }


def save_pipeline(
    folder: Path,
    unet: Network,
    weights: dict[str, torch.Tensor],
    betas: Any,
    info: dict[str, Any],
    codec: Path | None = None,
    additions: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the layout into an existing empty `folder`; the caller makes it appear atomically.

    `codec` is the folder that holds autoencoder, text encoder and tokenizer, where there are any; `additions` are the
    low-rank ones that `weights` contain, see `text_unet.adapter`.
    """
    from safetensors.torch import save_file

    def write(path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    for part in PARTS:
        if codec is not None and (codec / part).is_dir():
            shutil.copytree(codec / part, folder / part)
    write(folder / "unet" / "config.json", unet.config.to_diffusers())
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    if additions:
        (folder / ADAPTER).parent.mkdir()
        save_file(additions, folder / ADAPTER, metadata={"format": "pt"})
    scheduler = scheduler_config(betas, info["prediction"], clip=not (folder / "vae").is_dir())
    write(folder / "scheduler" / "scheduler_config.json", scheduler)
    write(folder / "afterimage.json", {"format": FORMAT, "latent": None, "prompts": None, **info})
    index = _model_index(folder, info["conditioning"])
    if index:
        write(folder / "model_index.json", {"_diffusers_version": "0.42.1", **index})


def _model_index(folder: Path, conditioning: str) -> dict[str, Any] | None:
    """What `DiffusionPipeline.from_pretrained` reads, for the pipelines that diffusers has: unconditional in pixels,
    and text to image in latents. The others load by component."""
    if (folder / "vae").is_dir() and conditioning == "text":
        kind = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))["_class_name"]
        described = {
            "unet": ["diffusers", "UNet2DConditionModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
            "vae": ["diffusers", kind],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
        }
        if not (folder / "text_encoder_2").is_dir():
            unchecked = {"safety_checker": [None, None], "requires_safety_checker": False}
            return {"_class_name": "StableDiffusionPipeline", **described, **unchecked}
        second = {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
        return {"_class_name": "StableDiffusionXLPipeline", **described, **second}
    if conditioning == "none" and not (folder / "vae").is_dir():
        parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
        return {"_class_name": "DDPMPipeline", **parts}
    return None


def load_pipeline(folder: Path, device: str = "cpu") -> Pipeline:
    """Read a folder that `save_pipeline` wrote, or one of an unconditional `DDPMPipeline` or `DDIMPipeline` that
    somebody published in diffusers format (`models.networks.published`).

    Raises `FileNotFoundError` when it is neither, `ValueError` in one sentence for another format or for what our
    network and samplers cannot do.
    """
    from models.networks import published
    from models.networks.network import build, config_of
    from models.networks.unet import UNetConfig

    unet_folder, scheduler_folder = published.parts(folder)
    config = config_of(_read(unet_folder / "config.json"))
    clips = not (folder / "vae").is_dir()
    scheduler = published.read_scheduler(_read(scheduler_folder / "scheduler_config.json"), clips)
    weights = published.read_weights(unet_folder)
    if (folder / "afterimage.json").exists():
        info = _read(folder / "afterimage.json")
        if info["format"] != FORMAT:
            raise ValueError(f"{folder} has format {info['format']}, this version reads {FORMAT}; train it again")
    elif isinstance(config, UNetConfig) and clips:
        described = published.describe(unet_folder, config, scheduler)
        info = {"format": FORMAT, "latent": None, "prompts": None, **described}
    else:
        raise ValueError(f"{folder} is no unconditional pipeline of pixels; start training from it by train.init_from")
    unet = build(config)
    try:
        unet.load_state_dict(weights)
    except RuntimeError:  # names every tensor that does not fit
        raise ValueError(f"the weights in {unet_folder} are not those of the network in its config.json") from None
    unet.eval().requires_grad_(False).to(device)
    return Pipeline(unet, scheduler.betas, info, device, scheduler.sampling, **_codec_parts(folder, device))


def _codec_parts(folder: Path, device: str) -> dict[str, Any]:
    """`autoencoder` and `text` of a pipeline, those that it has."""
    parts: dict[str, Any] = {}
    if (folder / "vae").is_dir():
        from models.networks.autoencoder import load_autoencoder

        parts["autoencoder"] = load_autoencoder(folder / "vae", device)
    if (folder / "text_encoder").is_dir():
        from models.networks.text_encoder import load_text_encoder

        parts["text"] = load_text_encoder(folder, device)
    return parts
