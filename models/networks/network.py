"""The choice between the two networks: our U-Net, or diffusers' text-conditional one; both have the same interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from models.networks.text_unet import TextUNet, TextUNetConfig
from models.networks.unet import UNet, UNetConfig

if TYPE_CHECKING:
    from models.json_files import JsonObject

NetworkConfig: TypeAlias = UNetConfig | TextUNetConfig
Network: TypeAlias = UNet | TextUNet
Predict: TypeAlias = Callable[[Tensor, float, Tensor | None], Tensor]


def build(config: NetworkConfig) -> Network:
    """Build an untrained network."""
    return TextUNet(config) if isinstance(config, TextUNetConfig) else UNet(config)


def config_of(config: JsonObject) -> NetworkConfig:
    """Convert the content of a diffusers `config.json` to the configuration of the network that it describes.

    Raises:
        ValueError: for an unsupported architecture, in one sentence.
    """
    if config.get("_class_name") == "UNet2DConditionModel":
        return TextUNetConfig.from_diffusers(config)
    return UNetConfig.from_diffusers(config)


def load_weights(network: Network, weights: Mapping[str, Tensor]) -> None:
    """Load weights under diffusers' names into the network; its LoRA adapter keeps its weights.

    Raises:
        RuntimeError: if a name or a shape differs.
    """
    if isinstance(network, TextUNet):
        network.load_published(weights)
    else:
        network.load_state_dict(weights)


def predictor(network: nn.Module) -> Predict:
    """Return the `predict(x, t, condition)` that `samplers.denoiser` takes: one timestep for the whole batch.

    An int becomes int64 [B], as on a diffusion path, and a float float32 [B], as on a rectified flow.
    """

    def predict(x: Tensor, t: float, condition: Tensor | None) -> Tensor:
        dtype = torch.int64 if isinstance(t, int) else torch.float32
        return network(x, torch.full((len(x),), t, dtype=dtype, device=x.device), condition)

    return predict
