"""How training and evaluation read a simulated data set.

python -m infra.bench.scale.reading batches FOLDER    batches that training draws from shards on the disk
python -m infra.bench.scale.reading pixels FOLDER     pixels, labels and captions that evaluation reads of a split
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tasks.pictures.samples import Split

BATCHES, BATCH_SIZE = 100, 64
COMPARED = 20_000
"""Training images that evaluation compares samples with."""


def draw(latents: Path, codec: Path) -> None:
    """Draw batches as training does with `train.data_on_device: stream`."""
    import torch

    from models.noise.schedules import path_of
    from models.optimization.timesteps import Timesteps
    from tasks.training.batches import Batches, DrawConfig, open_conditioning
    from tasks.training.stores import open_store

    device = torch.device("cpu")
    config = DrawConfig(BATCH_SIZE, Timesteps(path_of("cosine", 1000), device), seed=0)
    conditioning = open_conditioning(latents, "stream", device, codec)
    batches = Batches(open_store(latents, "train", "stream", device), conditioning, config, device)
    for step in range(BATCHES):
        batches.draw(step)


def load(images: Path) -> None:
    """Read the training split as the evaluation does, which decodes a part of it."""
    from tasks.params import ImageParams
    from tasks.pictures.images import load_pixels

    def compared(split: Split) -> np.ndarray:
        return np.random.default_rng(0).permutation(len(split.keys))[:COMPARED]

    samples = load_pixels(images, "train", ImageParams(resolution=8, channels=1), compared)
    samples.with_condition("text")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m infra.bench.scale.reading")
    parser.add_argument("what", choices=["batches", "pixels"])
    parser.add_argument("folder", type=Path, help="with the outputs of the other stages")
    given = parser.parse_args()
    if given.what == "batches":
        draw(given.folder / "latents", given.folder / "codec")
    else:
        load(given.folder / "images")
