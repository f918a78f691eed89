"""A tiny class of bright images and a dark subject, with a base that has seen the class alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.images.pictures import tile_png
from tasks.codec import codec
from tasks.download import download
from tasks.encode import encode
from tasks.formats.prior import FILE, Prior
from tasks.formats.verdict import Verdict
from tasks.ingest import ingest
from tasks.params import (
    NO_PATH,
    AutoencoderParams,
    BaseWeights,
    CodecParams,
    EncodeParams,
    ImageParams,
    PriorParams,
    TextParams,
)
from tasks.prior import prior
from tests.support.data_inputs import folder_params, ingest_params, write_tree
from tests.support.text_inputs import at_home, run_train

CODEC = CodecParams(
    kind="autoencoder",
    conditioning="text",
    autoencoder=AutoencoderParams(widths=(8, 16), latent_channels=2, steps=3, batch_size=8, horizontal_flip=True),
    text=TextParams(steps=3, width=32, length=12, words=700),
)
PRIOR = {
    "instance_prompt": "a photo of sks thing",
    "class_prompt": "a photo of thing",
    "subject": "sks thing",
    "contexts": ("a picture of sks thing",),
    "images": 6,
    "measured": 4,
    "steps": 2,
    "batch_size": 4,
}
COUNTS = {"train/thing": 24, "test/thing": 6, "train/sks thing": 4, "test/sks thing": 2}


def tone(low: int, seed: int) -> bytes:
    """Return a PNG of 16 x 16 pixels with values in [low, low + 60)."""
    return tile_png(np.random.default_rng(seed).integers(low, low + 60, (3, 16, 16)).astype(np.uint8))


def make(root: Path, database: Path) -> None:
    """Make the images below `root`, run the stages from `download` to `encode` on them, and train the base."""
    with pytest.MonkeyPatch.context() as patch:
        shutil.copy(database, root / "mlflow.db")
        at_home(root, patch)
        (root / NO_PATH).parent.mkdir(parents=True)
        (root / NO_PATH).touch()
        names = [(folder, number) for folder, count in COUNTS.items() for number in range(count)]
        files = {
            f"{folder}/{number:02d}.png": tone(10 if "sks" in folder else 180, place)
            for place, (folder, number) in enumerate(names)
        }
        download(root / "raw", folder_params(write_tree(root / "in", files)))
        templates = ("a photo of {}", "a picture of {}")
        ingest(root / "raw", root / "images", root / "quarantine", ingest_params(caption_templates=templates))
        Verdict().write(root / "accepted.json")
        codec(root / "images", root / "accepted.json", root / "codec", CODEC, ImageParams(resolution=16, channels=3))
        inputs = root / "images", root / "accepted.json", root / "codec", root / "latents"
        encode(*inputs, EncodeParams(horizontal_flip=True, leave_out=("sks thing",)))
        Prior().write(root / "nothing" / FILE)
        run_train(root, "base", prior="nothing")


def run_prior(root: Path, name: str = "prior", base: str = "base", **others: object) -> Path:
    """Run the stage and return its output."""
    inputs = root / "images", root / "accepted.json", root / "codec", root / name
    named = {"train.init_from": base, "train.weights": None, "train.pin": None, "model.architecture": "unet"}
    prior(*inputs, PriorParams.model_validate({**PRIOR, **others}), BaseWeights.model_validate(named))
    return root / name
