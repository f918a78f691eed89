"""A trained model on disk (diffusers layout) and in memory (ready to sample).

`unet/`, `scheduler/`, and for latents and captions `vae/`, `text_encoder/` and `tokenizer/` (with the suffix `_2` for a
second encoder) are in diffusers' format, so diffusers loads the weights without this project. `afterimage.json`
(`PipelineInfo`) holds what that format has no place for, and the SHA-256 of every other file. `lora/` holds a LoRA
adapter alone, as a small file for users who have the base weights; `unet/` contains the merged weights. `guide/` holds
earlier weights of the same network, in the format of `unet/`, for autoguidance; `controlnet/` a ControlNet, ours or a
published one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from models import parallel
from models.device import memory_of, placed
from models.hashing import file_sha256, files_sha256
from models.images.pixels import from_uint8
from models.json_files import Description, read_json, write_json
from models.networks import autoencoder as autoencoders
from models.networks import controlnet, guidance, published
from models.networks.compilation import in_whole_batches
from models.networks.config import DIFFUSERS_VERSION
from models.networks.control_maps import ControlSpec, as_input, given
from models.networks.controlnet import with_control
from models.networks.model_index import model_index
from models.networks.network import config_of, folder_name, load_network
from models.networks.precision import predictor
from models.networks.text_encoder import load_text_encoder, with_sizes
from models.networks.text_unet import TextUNetConfig
from models.networks.unet import UNetConfig
from models.noise import paths, samplers, schedules
from models.noise.paths import RectifiedFlow
from models.noise.samplers import DEFAULT_SAMPLING, Sampling, SchedulerConfig

if TYPE_CHECKING:
    from diffusers import ControlNetModel

    from models.networks.compilation import Compiler
    from models.networks.network import Network, NetworkConfig
    from models.networks.text_encoder import AnyEncoder
    from models.noise.editing import Start

INFO = "afterimage.json"
CODEC_FOLDERS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
"""Folders that a pipeline copies from the codec."""
ADAPTER = "lora/pytorch_lora_weights.safetensors"
"""The file name that diffusers' `load_lora_weights(folder)` expects."""
COMPANIONS = ("guide", "teacher")
"""Folders of further weights of the same network, which some samplings compare with or take part in."""


@dataclass(frozen=True)
class PipelineInfo(Description):
    """`afterimage.json`: what the model draws and how it is conditioned."""

    FORMAT = 2
    REMEDY = "train the model again"

    conditioning: str
    """"none", "label" or "text"."""
    channels: int
    """Channels of an image: 1 is grey, 3 is RGB."""
    size: int
    """Height and width of an image, pixels."""
    schedule: str
    """One of `schedules.SCHEDULES`, "rectified_flow", or "trained" for betas that match none of them."""
    timesteps: int
    """T, see `paths.Path`."""
    prediction: str
    """One of `paths.PREDICTION_TYPES`."""
    train_key: str
    """Identity of the training run; for a published model, the SHA-256 of its weights."""
    classes: list[str]
    """Names of the labels; for captions without classes, examples of captions; empty for an unconditional model."""
    null_label: int | None = None
    """Class index of the null condition; None unless the model is class-conditional."""
    prompts: list[str] | None = None
    """The caption of each of `classes`, for a text-conditional model."""
    latent: Sequence[int] | None = None
    """(channels, side) of the latents; None for a model of pixels."""
    control: Mapping[str, Any] | None = None
    """The fields of `ControlSpec`; None without a ControlNet that was trained here."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Relative path -> SHA-256 of every other file of the folder; set by `save_pipeline`."""

    @property
    def control_spec(self) -> ControlSpec | None:
        """How the control maps of a ControlNet trained here are made."""
        return ControlSpec(**self.control) if self.control else None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of the network's input, an image or a latent: (channels, height, width)."""
        channels, size = self.latent or (self.channels, self.size)
        return channels, size, size

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's conditioning on original size, crop and target size: an image of full size, not cropped."""
        return self.size, self.size, 0, 0, self.size, self.size


@dataclass(frozen=True)
class Pipeline:
    """A network in evaluation mode with its noise schedule; `autoencoder` for latents, `text` for captions."""

    network: Network
    """Predicts what `scheduler.prediction_type` names."""
    scheduler: SchedulerConfig
    """The path, and how to sample on it."""
    info: PipelineInfo
    """What the model draws."""
    device: str = "cpu"
    """Name of the torch device that holds all networks; "cuda" also draws with the machine's other GPUs."""
    autoencoder: autoencoders.Autoencoder | None = None
    text: AnyEncoder | None = None
    companions: Mapping[str, Network] = field(default_factory=dict)
    """Other weights of the same network by the names in `COMPANIONS`, in evaluation mode."""
    negative_prompt: str = ""
    """The prompt whose embedding is the null condition of a text-conditional model."""
    control: ControlNetModel | None = None
    """The ControlNet; without a control map it takes no part, and the images are those of `network` alone."""
    precision: str = "no"
    """What `network`, companions and ControlNet compute in, see `models.networks.precision.in_precision`; with "bf16"
    the autoencoder decodes in bfloat16."""
    compiler: Compiler | None = None
    """Compiles `network`, companions and ControlNet, see `models.networks.compilation.compiled_pipeline`."""

    @property
    def path(self) -> paths.Path:
        """The path from images to noise that the network was trained on."""
        return self.scheduler.path

    def condition(
        self, labels: Sequence[int] | None, prompts: Sequence[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Convert labels, or for a text-conditional model prompts, to (condition, null condition).

        Returns int64 [N] each for labels; float32 [N, L, D] each for text, with two encoders packed (see
        `models/networks/text_encoder.py`); two Nones for an unconditional model.

        Raises:
            ValueError: if labels or prompts do not match the model.
        """
        if self.info.conditioning == "none":
            if labels is not None or prompts is not None:
                raise ValueError("this model is unconditional; ask for images without labels")
            return None, None
        if prompts is not None and self.text is None:
            raise ValueError("this model is class-conditional and takes no text; give labels")
        if (labels is None) == (prompts is None):
            raise ValueError("this model is conditional; give a label, or for text a prompt, for each image")
        if self.text is None:
            indices = self._class_indices(labels or ()).to(self.device)
            return indices, torch.full_like(indices, len(self.info.classes))
        if prompts is None:
            captions = [*(self.info.prompts or ()), ""]
            prompts = [captions[label] for label in self._class_indices(labels or ()).tolist()]
        return self._embedded(self.text, prompts)

    def _class_indices(self, labels: Sequence[int]) -> torch.Tensor:
        """Return labels as int64 [N] on the CPU; the index after the last class is the null condition."""
        indices = torch.as_tensor(list(labels), dtype=torch.int64)
        last = len(self.info.classes)
        if indices.min() < 0 or indices.max() > last:
            raise ValueError(f"labels must lie between 0 and {last - 1}")
        return indices

    def _embedded(self, text: AnyEncoder, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = text.encode([*prompts, self.negative_prompt]).to(self.device)
        if text.pooled is not None:
            embedded = with_sizes(embedded, text.pooled, torch.tensor(self.info.sizes))
        return embedded[:-1], embedded[-1:].expand_as(embedded[:-1])

    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """Convert uint8 images [N, C, H, W] to the network's input, float32 [N, *input_shape]."""
        if self.autoencoder is None:
            return torch.from_numpy(from_uint8(pixels)).to(self.device)
        return autoencoders.encode(self.autoencoder, pixels)[0]

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Convert values of the network's input space [N, *input_shape] to images [N, C, H, W], about [-1, 1].

        With `precision` "bf16" the autoencoder computes in bfloat16, and on a GPU its batches depend on the memory.
        """
        if self.autoencoder is None:
            return x
        memory = memory_of(self.device) if self.device.startswith("cuda") else None
        return autoencoders.decode(self.autoencoder, x, self.precision, memory)

    def on(self, device: str) -> Pipeline:
        """Return the pipeline with copies of its networks on another device, to draw with; see `device.placed`."""
        if device == self.device:
            return self
        moved = placed if self.compiler is None else self.compiler.on
        return replace(
            self,
            network=moved(self.network, device),
            device=device,
            autoencoder=placed(self.autoencoder, device),
            text=None if self.text is None else self.text.on(device),
            companions={name: moved(network, device) for name, network in self.companions.items()},
            control=None if self.control is None else moved(self.control, device),
        )

    @property
    def context_channels(self) -> int:
        """Channels of the network's input besides x: mask and masked image of an inpainting U-Net; 0 for the others."""
        config = self.network.config
        return config.context_channels if isinstance(config, TextUNetConfig) else 0

    def denoiser(
        self,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        context: torch.Tensor | None = None,
        control: np.ndarray | None = None,
        control_scale: float = 1.0,
        rows: int | None = None,
    ) -> samplers.Denoise:
        """Return `denoise(x, level) -> x0` for one batch of labels or prompts, see `samplers.denoiser`.

        `context` is what the input of an inpainting U-Net contains besides x, float32 [N, context_channels, H, W], and
        `control` are control maps, uint8 [N, 1 or 3, h, w]. With `rows` the networks see batches of that many rows, or
        twice that many, see `compilation.in_whole_batches`.

        Raises:
            ValueError: for guidance or a control that the model does not have, or if labels, prompts or context do not
                match the model.
        """
        if (context is None) != (self.context_channels == 0):
            raise ValueError("an inpainting U-Net, and no other network, needs an image and a mask")
        condition, null = self.condition(labels, prompts)
        weaker = self.companions.get("guide")
        guide = None
        if weaker is not None:
            guide = predictor(in_whole_batches(weaker, rows), context, None, self.precision)
        network = self.network if control is None else with_control(self.network, self.control, control_scale)
        maps = None if control is None else as_input(torch.tensor(control, device=self.device), *[self.info.size] * 2)
        predict = predictor(in_whole_batches(network, rows), context, maps, self.precision)
        both = None
        if guidance.joins(self.device):
            both = guidance.Joined(network, context, maps, self.precision, self.network, rows)
        return samplers.denoiser(predict, self.scheduler, sampling, condition, null, guide, both)

    def sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        prompts: Sequence[str] | None = None,
        batch_size: int = 256,
        callback: samplers.Callback | None = None,
        start: Start | None = None,
        context: torch.Tensor | None = None,
        control: np.ndarray | None = None,
        control_scale: float = 1.0,
    ) -> np.ndarray:
        """Draw len(seeds) images, float32 [N, C, H, W], about [-1, 1].

        Image i depends on seeds[i] and on labels[i], or for a text-conditional model prompts[i]. A pipeline on "cuda"
        divides several batches among all GPUs, see `device.devices_of`. After each step of each batch
        `callback(i, t, x, x0)` receives torch tensors of `info.input_shape`. Several threads may call it: on a CPU from
        32 images on, each with the steps of its own part of a batch, and with several GPUs. `start` and `context` are
        of all images; `models/editing.py` makes them from an image and a mask.

        `control` are maps for the ControlNet, uint8 [N or 1, 1 or 3, h, w]: one for each image, or one for all. Maps of
        another resolution are resized with a warning. `control_scale` is the weight of the ControlNet, which takes no
        part without `control`.

        Compiled networks see batches of `batch_size` rows (`compilation.in_whole_batches`), and on a CPU threads do not
        share a batch.

        Raises:
            ValueError: for guidance or a control that the model does not have, labels or prompts that do not match the
                model, or a number of steps that it does not support.
        """
        rows = None if self.compiler is None else batch_size
        maps = None if control is None else given(control, len(seeds), self.info.size, self.info.control_spec)

        def draw(model: Pipeline, part: slice) -> np.ndarray:
            denoise = model.denoiser(
                None if labels is None else labels[part],
                None if prompts is None else prompts[part],
                sampling,
                None if context is None else context[part].to(model.device),
                None if maps is None else maps[part],
                control_scale,
                rows,
            )
            if model.compiler is not None:
                model.compiler.allow(model.network, self.device)
            begun = None if start is None else _on_device(start.rows(part), model.device)
            return model._sample_batch(seeds[part], denoise, sampling, callback, begun)

        share = parallel.over_devices if self.compiler is None else parallel.over_whole_batches
        return np.concatenate(share(draw, self.on, len(seeds), batch_size, self.device))

    def _sample_batch(
        self,
        seeds: Sequence[int],
        denoise: samplers.Denoise,
        sampling: Sampling,
        callback: samplers.Callback | None,
        start: Start | None,
    ) -> np.ndarray:
        draw = samplers.SeededNoise(seeds, self.info.input_shape)
        ahead = self.device != "cpu" and (start is not None or sampling.adds_noise)
        with torch.inference_mode(), parallel.NoiseAhead(draw, self.device, ahead) as noise:
            images = self.decode(samplers.sample(denoise, noise, self.scheduler, sampling, callback, start))
        return images.float().cpu().numpy()


def _on_device(start: Start, device: str) -> Start:
    mask = None if start.mask is None else start.mask.to(device)
    return replace(start, x0=start.x0.to(device), mask=mask)


def save_pipeline(
    folder: Path,
    network: Network,
    weights: dict[str, torch.Tensor],
    noise: schedules.Array | RectifiedFlow,
    info: PipelineInfo,
    codec: Path | None = None,
    adapter: Mapping[str, torch.Tensor] | None = None,
    companions: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """Write the layout into an existing empty `folder`; the caller makes it appear atomically.

    Args:
        folder: where to write.
        network: the network, of which only the configuration is used.
        weights: its state dict under diffusers' names, with the weights of a ControlNet, see `controlnet.split`.
        noise: betas float64 [T], or a rectified flow.
        info: the content of `afterimage.json`.
        codec: folder with autoencoder, text encoders and tokenizers, if the model has any.
        adapter: the LoRA adapter alone, see `text_unet.adapter`; `weights` already contain it.
        companions: state dicts of further weights, by the names in `COMPANIONS`.
    """
    for name in CODEC_FOLDERS:
        if codec is not None and (codec / name).is_dir():
            shutil.copytree(codec / name, folder / name)
    (folder / "scheduler").mkdir(exist_ok=True)
    weights, control = controlnet.split(weights)
    if control and isinstance(network.config, TextUNetConfig):
        (folder / controlnet.FOLDER).mkdir()
        controlnet.save(folder / controlnet.FOLDER, network.config, control)
    for name, state in {folder_name(network.config): weights, **(companions or {})}.items():
        (folder / name).mkdir(exist_ok=True)
        write_json(folder / name / "config.json", network.config.to_diffusers())
        save_file(dict(state), folder / name / published.WEIGHTS, metadata={"format": "pt"})
    if adapter:
        (folder / ADAPTER).parent.mkdir()
        save_file(dict(adapter), folder / ADAPTER, metadata={"format": "pt"})
    of_pixels = not (folder / "vae").is_dir()
    scheduler = (
        published.flow_config(noise)
        if isinstance(noise, RectifiedFlow)
        else published.scheduler_config(noise, info.prediction, clip_sample=of_pixels)
    )
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if index := model_index(folder, network.config, info.conditioning, info.classes):
        write_json(folder / "model_index.json", {"_diffusers_version": DIFFUSERS_VERSION, **index})
    replace(info, files=files_sha256(folder)).write(folder / INFO)


def load_pipeline(folder: Path, device: str = "cpu") -> Pipeline:
    """Load what `save_pipeline` wrote, or a published unconditional `DDPMPipeline` or `DDIMPipeline` of pixels.

    Raises:
        FileNotFoundError: if the folder is neither.
        ValueError: for another format, or a model that our network and samplers do not reproduce; in one sentence.
    """
    network_folder, scheduler_folder = published.parts(folder)
    config = config_of(read_json(network_folder / "config.json"))
    of_pixels = not (folder / "vae").is_dir()
    scheduler = published.read_scheduler(read_json(scheduler_folder / "scheduler_config.json"), clip_sample=of_pixels)
    weights = published.read_weights(network_folder)
    if (folder / INFO).exists():
        info = PipelineInfo.read(folder / INFO)
    else:
        info = _published_info(network_folder, config, scheduler, of_pixels)
    network = load_network(config, weights, network_folder, device)
    companions = {
        name: _companion(config, network_folder, folder / name, device)
        for name in COMPANIONS
        if (folder / name).is_dir()
    }
    autoencoder = None if of_pixels else autoencoders.load_autoencoder(folder / "vae", device)
    text = load_text_encoder(folder, device) if (folder / "text_encoder").is_dir() else None
    control = None
    if (folder / controlnet.FOLDER).is_dir() and isinstance(config, TextUNetConfig):
        control = controlnet.load(folder / controlnet.FOLDER, config).to(device)
    return Pipeline(network, scheduler.config, info, device, autoencoder, text, companions, control=control)


def _companion(config: NetworkConfig, network: Path, folder: Path, device: str) -> Network:
    """Load further weights of the network in the folder `network`, whose configuration is `config`.

    Raises:
        ValueError: if they are of another architecture.
    """
    if read_json(folder / "config.json") != read_json(network / "config.json"):
        raise ValueError(
            f"{folder} holds another architecture than {network}, and not weights of the same training; train the "
            "model again"
        )
    return load_network(config, published.read_weights(folder), folder, device)


def _published_info(
    folder: Path, config: NetworkConfig, scheduler: published.Scheduler, of_pixels: bool
) -> PipelineInfo:
    """Describe a published unconditional network; the SHA-256 of its weights takes the place of the training key."""
    if not isinstance(config, UNetConfig) or not of_pixels:
        raise ValueError(f"{folder} is not an unconditional U-Net of pixels; to train from it, set train.init_from")
    if config.conditions:
        raise ValueError("the network is class-conditional, and diffusers' format does not say what its classes are")
    return PipelineInfo(
        conditioning="none",
        channels=config.channels,
        size=config.size,
        schedule=scheduler.schedule,
        timesteps=scheduler.config.path.timesteps,
        prediction=scheduler.config.prediction_type,
        train_key=file_sha256(folder / published.WEIGHTS),
        classes=[],
    )
