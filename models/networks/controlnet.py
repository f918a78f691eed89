"""ControlNet (Zhang et al. 2023): a trained copy of the U-Net's encoder that reads a control map, for a frozen U-Net.

The copy is diffusers' `ControlNetModel`, made by its `from_unet`. Its outputs pass through convolutions that start at
zero and are added to the U-Net's skip connections, so that training starts from the images of the U-Net itself.

Legend: B batch, C channels of the U-Net's input, H x W its height and width, f the factor by which an image is larger
than the input (8 for Stable Diffusion, 1 for pixels), `control` float [B, 3, f H, f W] in [0, 1].
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from models.json_files import read_json, write_json
from models.networks import published
from models.networks.config import DIFFUSERS_VERSION
from models.networks.normalization import replace_group_norms
from models.networks.text_unet import Attend, TextUNet, TextUNetConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffusers import ControlNetModel
    from torch import Tensor

    from models.json_files import JsonObject

FOLDER = "controlnet"
"""The folder of the ControlNet in a pipeline of diffusers' layout."""
CHANNELS = 3
"""Channels of a control map; diffusers' pipelines convert control images to RGB."""
PREFIX = "control."
"""First part of the names of the ControlNet's weights in a `ControlledUNet`."""
SHARED = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")
SHARED_WITH_SDXL = (*SHARED, "projection_class_embeddings_input_dim")
"""Options that a ControlNet must have in common with its U-Net."""


class ControlledUNet(TextUNet):
    """A frozen `TextUNet` with a ControlNet that is trained.

    x_t float [B, C, H, W], t [B], token embeddings float [B, L, D], control -> output float [B, C, H, W]. Weights have
    diffusers' names, those of the ControlNet after `PREFIX`.
    """

    def __init__(self, config: TextUNetConfig) -> None:
        assert config.control_widths is not None, "the configuration has a ControlNet"
        super().__init__(config)
        self.control = from_unet(self, config.control_widths)
        self.controlled = True
        """Whether the ControlNet takes part; not while the U-Net is trained first."""
        self.train_adapter(train=True)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, control: Tensor | None = None) -> Tensor:
        if control is None or not self.controlled:
            return super().forward(x, t, condition)
        return controlled(self, self.control, x, t, condition, control)

    def checkpoint_gradients(self) -> None:
        """Enable gradient checkpointing of both networks."""
        super().checkpoint_gradients()
        self.control.enable_gradient_checkpointing()

    def train_adapter(self, train: bool) -> None:
        """Train the ControlNet and freeze the U-Net, or the reverse if `train` is false."""
        self.controlled = train
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(PREFIX) == train)

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of a U-Net under diffusers' names, and copy its encoder to the ControlNet.

        Raises:
            RuntimeError: if a name or a shape differs.
        """
        missing, unexpected = self.load_state_dict(dict(weights), strict=False)
        missing = [name for name in missing if not name.startswith(PREFIX)]
        if missing or unexpected:
            raise RuntimeError(f"the weights belong to another network: {[*missing, *unexpected][:3]}")
        self.copy_encoder()

    @torch.no_grad()
    def copy_encoder(self) -> None:
        """Copy the U-Net's encoder and middle block, so that training the ControlNet starts from them."""
        own = dict(self.control.named_parameters())
        for name, parameter in self.named_parameters():
            if name in own:
                own[name].copy_(parameter)

    def freeze_in(self, dtype: torch.dtype) -> None:
        """Convert the U-Net to `dtype`, which halves the memory of a frozen one; the ControlNet keeps float32."""
        for name, part in self.named_children():
            if name != "control":
                part.to(dtype)


def from_unet(unet: TextUNet, widths: tuple[int, ...]) -> ControlNetModel:
    """Return an untrained ControlNet with the weights of the U-Net's encoder.

    `widths` are the channels of the layers that bring a control map to the size of the U-Net's input; each after the
    first halves the side.
    """
    from diffusers import ControlNetModel

    network = ControlNetModel.from_unet(unet.network, "rgb", widths, conditioning_channels=CHANNELS)
    network.set_attn_processor(Attend())
    replace_group_norms(network)
    return network


def controlled(
    unet: TextUNet, network: ControlNetModel, x: Tensor, t: Tensor, condition: Tensor, control: Tensor, scale: float = 1
) -> Tensor:
    """Return the output of the U-Net, with `scale` times the ControlNet's outputs added to its skip connections.

    The U-Net may have another dtype than the ControlNet; the output has that of `x`.
    """
    tokens, added = unet.text_inputs(x, condition)
    down, middle = network(x, t, tokens, control.to(x.dtype), scale, added_cond_kwargs=added, return_dict=False)
    dtype = unet.network.conv_in.weight.dtype
    output = unet.network(
        x.to(dtype),
        t,
        tokens.to(dtype),
        added_cond_kwargs=added,
        down_block_additional_residuals=[residual.to(dtype) for residual in down],
        mid_block_additional_residual=middle.to(dtype),
        return_dict=False,
    )[0]
    return output.to(x.dtype)


class Controlled(nn.Module):
    """A U-Net with a ControlNet as one network, for sampling: x, t, condition and control -> output as `controlled`."""

    def __init__(self, unet: TextUNet, network: ControlNetModel, scale: float = 1.0) -> None:
        super().__init__()
        self.unet, self.network, self.scale = unet, network, scale

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, control: Tensor) -> Tensor:
        return controlled(self.unet, self.network, x, t, condition, control, self.scale)


def with_control(unet: nn.Module, network: ControlNetModel | None, scale: float) -> Controlled:
    """Return a U-Net with its ControlNet, of which `scale` is the weight.

    Raises:
        ValueError: for a model without a ControlNet.
    """
    if network is None or not isinstance(unet, TextUNet):
        raise ValueError("this model has no ControlNet and takes no control; leave it out, or draw from one that has")
    return Controlled(unet, network, scale)


def split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state dicts of the U-Net and of the ControlNet, which is empty for a network without one."""
    plain = {name: value for name, value in weights.items() if not name.startswith(PREFIX)}
    return plain, {name.removeprefix(PREFIX): weights[name] for name in weights.keys() - plain.keys()}


def save(folder: Path, config: TextUNetConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a ControlNet in diffusers' format into an existing `folder`."""
    write_json(folder / "config.json", to_diffusers(config))
    save_file({name: weights[name] for name in sorted(weights)}, folder / published.WEIGHTS, metadata={"format": "pt"})


def to_diffusers(config: TextUNetConfig) -> JsonObject:
    """Return the `config.json` of the ControlNet of a U-Net."""
    unet = config.to_diffusers()
    left_out = ("sample_size", "out_channels", "up_block_types", "dropout")
    return {
        **{name: value for name, value in unet.items() if name not in left_out},
        "_class_name": "ControlNetModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "conditioning_channels": CHANNELS,
        "conditioning_embedding_out_channels": list(config.control_widths or ()),
    }


def load(folder: Path, unet: TextUNetConfig) -> ControlNetModel:
    """Load a ControlNet in diffusers' format, ours or a published one, for evaluation.

    Raises:
        ValueError: if it is made for another U-Net, or its weights do not match its configuration; in one sentence.
    """
    from diffusers import ControlNetModel

    config = read_json(folder / "config.json")
    if config.get("_class_name") != "ControlNetModel":
        raise ValueError(f"{folder} holds a {config.get('_class_name')} and no ControlNetModel; choose another folder")
    network = ControlNetModel.from_config(config)
    expected = to_diffusers(replace(unet, control_widths=(1,)))
    found = network.config
    unlike = [name for name in SHARED_WITH_SDXL if _plain(found.get(name)) != _plain(expected.get(name))]
    if unlike:
        listed = ", ".join(f"{name} {found.get(name)} and not {expected.get(name)}" for name in unlike)
        raise ValueError(f"the ControlNet in {folder} is made for another U-Net ({listed}); choose one for this model")
    try:
        network.load_state_dict(published.read_weights(folder))
    except RuntimeError:  # lists every tensor that does not fit
        raise ValueError(f"the weights in {folder} are not those of the ControlNet in its config.json") from None
    return network.eval().requires_grad_(False)


def _plain(value: object) -> object:
    """Return an option of a configuration with lists in place of tuples."""
    return list(value) if isinstance(value, tuple) else value
