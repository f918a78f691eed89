"""The choice between the networks, U-Net or transformer, by class or text; all have the same interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from models.networks.controlnet import ControlledUNet
from models.networks.dit import DiT, DiTConfig
from models.networks.text_dit import TextDiT, TextDiTConfig
from models.networks.text_unet import TextUNet, TextUNetConfig
from models.networks.transformer import Transformer, TransformerConfig
from models.networks.unet import UNet, UNetConfig

if TYPE_CHECKING:
    from pathlib import Path

    from models.json_files import JsonObject

NetworkConfig: TypeAlias = UNetConfig | TextUNetConfig | DiTConfig | TextDiTConfig
Network: TypeAlias = UNet | TextUNet | DiT | TextDiT
Predict: TypeAlias = Callable[[Tensor, float, Tensor | None], Tensor]

READERS: dict[str, Callable[[JsonObject], NetworkConfig]] = {
    "UNet2DConditionModel": TextUNetConfig.from_diffusers,
    "DiTTransformer2DModel": DiTConfig.from_diffusers,
    "DiT": DiTConfig.from_diffusers,
    "PixArtTransformer2DModel": TextDiTConfig.from_diffusers,
    "TextDiT": TextDiTConfig.from_diffusers,
}
"""`_class_name` of a `config.json` -> configuration; every other name is read as a `UNet2DModel`."""
OLD_TRANSFORMER = "Transformer2DModel"
"""`_class_name` of both transformers in the weights that their authors published."""


def build(config: NetworkConfig) -> Network:
    """Build an untrained network."""
    match config:
        case TextUNetConfig():
            return ControlledUNet(config) if config.control_widths else TextUNet(config)
        case DiTConfig():
            return DiT(config)
        case TextDiTConfig():
            return TextDiT(config)
    return UNet(config)


def config_of(config: JsonObject) -> NetworkConfig:
    """Convert the content of a diffusers `config.json` to the configuration of the network that it describes.

    Raises:
        ValueError: for an unsupported architecture, in one sentence.
    """
    name = config.get("_class_name")
    if name == OLD_TRANSFORMER:
        name = "PixArtTransformer2DModel" if config.get("norm_type") == "ada_norm_single" else "DiTTransformer2DModel"
    return READERS.get(str(name), UNetConfig.from_diffusers)(config)


def folder_name(config: NetworkConfig) -> str:
    """Return the folder of the network in a pipeline of diffusers' layout."""
    return "transformer" if isinstance(config, TransformerConfig) else "unet"


def load_weights(network: Network, weights: Mapping[str, Tensor]) -> None:
    """Load weights under diffusers' names into the network; its LoRA adapter keeps its weights.

    Raises:
        RuntimeError: if a name or a shape differs.
        ValueError: if a transformer's blocks do not share their embedding.
    """
    if isinstance(network, TextUNet | Transformer):
        network.load_published(weights)
    else:
        network.load_state_dict(weights)


def load_network(config: NetworkConfig, weights: Mapping[str, Tensor], folder: Path, device: str) -> Network:
    """Build a network with the `weights` of `folder`, for evaluation.

    Raises:
        ValueError: if they are of another network.
    """
    network = build(config)
    try:
        load_weights(network, weights)
    except RuntimeError:  # its message lists every tensor that does not fit
        raise ValueError(f"the weights in {folder} are not those of the network in its config.json") from None
    return network.eval().requires_grad_(False).to(device)


def under_all_names(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by parameter name under every name that a state dict has.

    A layer that several modules share occurs once among the parameters; its other names get copies.
    """
    first: dict[nn.Parameter, str] = {parameter: name for name, parameter in network.named_parameters()}
    every = network.named_parameters(remove_duplicate=False)
    owners = {name: first[parameter] for name, parameter in every}
    return {name: weights[owner] if name == owner else weights[owner].clone() for name, owner in owners.items()}


def predictor(network: Callable[..., Tensor], context: Tensor | None = None, control: Tensor | None = None) -> Predict:
    """Return the `predict(x, t, condition)` that `samplers.denoiser` takes: one timestep for the whole batch.

    An int becomes int64 [B], as on a diffusion path, and a float float32 [B], as on a rectified flow. `context` [B, M,
    H, W] is appended to the channels of every x, as the input of an inpainting U-Net requires. `control` are the maps
    [B, 3, H, W] that a ControlNet reads, with and without the condition.
    """
    maps = () if control is None else (control,)

    def predict(x: Tensor, t: float, condition: Tensor | None) -> Tensor:
        x = x if context is None else torch.cat([x, context], dim=1)
        dtype = torch.int64 if isinstance(t, int) else torch.float32
        return network(x, torch.full((len(x),), t, dtype=dtype, device=x.device), condition, *maps)

    return predict
