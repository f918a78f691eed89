"""Inputs for the tests of `judge` and `evaluate`.

Images of scikit-learn's digits in the format of `ingest`, with or without labels and captions, a small judge trained
on them, and a pipeline with random weights that draws images of the same size.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image

from models.networks.unet import UNet, UNetConfig
from models.noise import schedules
from models.pipeline import PipelineInfo, save_pipeline
from tasks.formats.verdict import Verdict
from tasks.judge import judge
from tasks.params import ImageParams, JudgeParams
from tasks.pictures.images import Writer

CLASSES = ["zero", "one", "two"]
TIMESTEPS = 30
IMAGE = ImageParams(resolution=8, channels=1)
PARAMS = JudgeParams(classifier_steps=60, clip_steps=60, batch_size=32, seed=1)
BRIEF = JudgeParams(classifier_steps=1, clip_steps=1, batch_size=32, seed=1)
"""For a judge that need not know anything."""


def template_captions(label: int) -> list[str]:
    return [f"the digit {CLASSES[label]}", f"a {CLASSES[label]}"]


def write_images(root: Path, labels: bool = True, captions=template_captions) -> Path:
    """Write digits 0 to 2 as `root/data/images`, every fourth held out, and `accepted.json` beside them."""
    from sklearn.datasets import load_digits

    digits = load_digits(n_class=len(CLASSES))
    folder = root / "data" / "images"
    folder.mkdir(parents=True)
    writer = Writer(folder, shards=1)
    for number, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        encoded = io.BytesIO()
        PIL.Image.fromarray((image * (255 / 16)).astype(np.uint8)).save(encoded, "PNG")
        writer.add(
            {
                "key": f"{number:04d}.png",
                "image": encoded.getvalue(),
                "width": 8,
                "height": 8,
                "mode": "L",
                "label": label if labels else None,
                "captions": captions(label) if captions else [],
                "split": "test" if number % 4 == 3 else "train",
                "sha256": "",
                "phash": "",
                "safety": None,
                "licence": "BSD-3-Clause",
                "source": "digits",
            }
        )
    replace(writer.close(), classes=CLASSES if labels else []).write(folder / "index.json")
    Verdict().write(root / "data" / "accepted.json")
    return folder


def run_judge(root: Path, params: JudgeParams = PARAMS) -> Path:
    """Run the stage on `root/data`. Returns the folder it wrote."""
    judge(root / "data" / "images", root / "data" / "accepted.json", root / "judge", params, IMAGE)
    return root / "judge"


def write_pipeline(root: Path, classes: list[str] | None = None, guide: bool = False) -> Path:
    """Write a tiny pipeline with random weights as `root/outputs/pipeline`, with a guide if asked for."""
    import torch

    torch.manual_seed(0)
    classes = CLASSES if classes is None else classes
    unet = UNet(UNetConfig(8, 1, (8, 16), (False, True), 1, 4, 8, conditions=len(classes) + 1 if classes else 0))
    for weights in unet.parameters():  # the last layer starts at zero, so that the output would not depend on the label
        torch.nn.init.normal_(weights, std=0.2)
    info = PipelineInfo(
        conditioning="label" if classes else "none",
        classes=classes,
        channels=1,
        size=8,
        timesteps=TIMESTEPS,
        prediction="v_prediction",
        schedule="cosine",
        null_label=len(classes) if classes else None,
        train_key="0" * 64,
    )
    folder = root / "outputs" / "pipeline"
    folder.mkdir(parents=True)
    weights = unet.state_dict()
    companions = {"guide": {name: 0.8 * value for name, value in weights.items()}} if guide else {}
    save_pipeline(folder, unet, weights, schedules.betas("cosine", TIMESTEPS), info, companions=companions)
    return folder
