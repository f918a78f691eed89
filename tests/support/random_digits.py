"""A pipeline of random weights with the image size and classes of the default preset."""

from __future__ import annotations

from pathlib import Path

import torch

from models.networks.unet import UNet, UNetConfig
from models.noise.paths import RectifiedFlow
from models.pipeline import PipelineInfo, save_pipeline


def save(folder: Path) -> None:
    """Save an untrained class-conditional pipeline with the image size and classes of the default preset."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(16, 1, (8, 16), (False, True), 1, 4, 8, conditions=11))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    classes = [str(digit) for digit in range(10)]
    info = PipelineInfo(
        conditioning="label",
        channels=1,
        size=16,
        schedule="rectified_flow",
        timesteps=1000,
        prediction="flow_prediction",
        train_key="",
        classes=classes,
        null_label=10,
    )
    folder.mkdir(parents=True)
    save_pipeline(folder, unet, dict(unet.state_dict()), RectifiedFlow(1000), info)
