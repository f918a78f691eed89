"""The reference with what a run of ours has: network, batch size, precision, steps, seed and flip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.bench.peer import Peer, PeerSettings
from models.networks.unet import UNetConfig
from tasks.formats.latents import InputSpec
from tasks.training.run import network_config

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.params import Params


def peer(params: Params, files: Path) -> Peer:
    """Build the run of the reference on the images in the folder `files`."""
    train = params.train
    settings = PeerSettings(
        network(params), train.batch_size, train.mixed_precision, train.steps, train.seed, train.horizontal_flip
    )
    return Peer(settings, files)


def network(params: Params) -> UNetConfig:
    """The unconditional network of these parameters."""
    config = network_config(InputSpec(params.image.channels, params.image.resolution), params.model)
    assert isinstance(config, UNetConfig)
    return config
