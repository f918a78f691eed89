"""Which network: ours, or diffusers' text-conditional one where captions condition it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from models.networks.text_unet import TextUNet, TextUNetConfig
from models.networks.unet import UNet, UNetConfig

if TYPE_CHECKING:
    from torch import Tensor

NetworkConfig: TypeAlias = UNetConfig | TextUNetConfig
Network: TypeAlias = UNet | TextUNet


def build(config: NetworkConfig) -> Network:
    """An untrained network."""
    return TextUNet(config) if isinstance(config, TextUNetConfig) else UNet(config)


def config_of(described: dict[str, Any]) -> NetworkConfig:
    """A `config.json` in diffusers' form -> what shapes the network."""
    if described.get("_class_name") == "UNet2DConditionModel":
        return TextUNetConfig.from_diffusers(described)
    return UNetConfig.from_diffusers(described)


def load_weights(network: Network, weights: Mapping[str, Tensor]) -> None:
    """Load weights under diffusers' names; low-rank additions stay. Raises `RuntimeError` where they do not fit."""
    if isinstance(network, TextUNet):
        network.load_published(weights)
    else:
        network.load_state_dict(weights)
