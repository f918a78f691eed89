"""Training the text encoder together with the network that it conditions, as DreamBooth may (Ruiz et al. 2023).

The text encoder becomes a part of the network, so optimizer, averages and checkpoints contain it. A condition of token
ids int64 [B, L] is then encoded in the forward pass; embeddings float [B, L, D] are used as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.networks.network import Network

TOWER = "text_tower"
PREFIX = f"{TOWER}."


def attach(network: Network, text: nn.Module) -> None:
    """Make `text`, a `CLIPTextModel`, a part of the network, and train all its weights."""
    network.add_module(TOWER, text.requires_grad_(True))
    network.register_forward_pre_hook(_encode)


def _encode(network: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
    x, t, condition = inputs
    if condition is not None and not condition.is_floating_point():
        condition = network.get_submodule(TOWER)(input_ids=condition).last_hidden_state
    return x, t, condition


def split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separate the weights of the network from those of the text encoder, which are empty if it was not trained."""
    network = {name: value for name, value in weights.items() if not name.startswith(PREFIX)}
    text = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    return network, text
