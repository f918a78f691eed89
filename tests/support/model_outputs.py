"""Inputs for the tests of `export`, `package` and `register`.

A tiny pipeline with random weights, and the reports of an invented training run and evaluation.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np

from models.images import pictures
from models.networks.unet import UNet, UNetConfig
from models.noise import schedules
from models.noise.samplers import Sampling
from models.pipeline import PipelineInfo, save_pipeline
from tasks.evaluation import protocol
from tasks.evaluation.protocol import Measurement, Protocol, Reference
from tasks.export import export
from tasks.formats.verdict import Verdict
from tasks.package import package
from tasks.params import ExportParams
from tasks.pictures.index import ImageIndex
from tasks.runtime import atomic, measures
from tasks.runtime.measures import Measure, Measurements

CLASSES = ["hot dog", "dog", "cat"]
SIZE, TIMESTEPS = 8, 20
STEPS = range(10, 101, 10)
PARAMS = ExportParams(latency_batches=(1,))
PROTOCOL = Protocol(
    measurement=Measurement(
        n_distance=64,
        n_accuracy=32,
        seed=1,
        seed_blocks=3,
        reference=Reference(30, "d" * 64),
        judge={"classifier": "c" * 64},
        extractor="classifier",
        feature_dim=32,
        image={"size": SIZE, "channels": 1},
        labels=CLASSES,
        prompts=None,
    ),
    headline="frechet_distance",
    space="pixels",
    conditioning="label",
    clip_is_condition=False,
    unguided=Sampling("ddim", 5),
    guided=Sampling("ddim", 5, guidance_scale=1.5),
    batch_size=64,
)


def write_pipeline(folder: Path, conditioning: str = "label") -> None:
    """Write a pipeline with small random weights, so that every layer affects the output.

    A conditional one has a guide and two levels, an unconditional one has one level.
    """
    import torch

    torch.manual_seed(0)
    conditions = len(CLASSES) + 1 if conditioning == "label" else 0
    unet = UNet(
        UNetConfig(
            size=SIZE,
            channels=1,
            block_out_channels=(8, 16) if conditions else (8,),
            attention=(False, True) if conditions else (True,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            conditions=conditions,
        )
    )
    weights = {name: value + 0.05 * torch.randn_like(value) for name, value in unet.state_dict().items()}
    info = PipelineInfo(
        conditioning=conditioning,
        classes=CLASSES,
        channels=1,
        size=SIZE,
        timesteps=TIMESTEPS,
        schedule="cosine",
        prediction="v_prediction",
        null_label=len(CLASSES) if conditioning == "label" else None,
        train_key="a" * 64,
    )
    folder.mkdir(parents=True)
    guide = {name: 0.9 * value for name, value in weights.items()}
    companions = {"guide": guide} if conditions else {}
    save_pipeline(folder, unet, weights, schedules.betas("cosine", TIMESTEPS), info, companions=companions)


def write_accepted(path: Path) -> None:
    Verdict(source="pets", sha256="d" * 64).write(path)


def run_export(root: Path, params: ExportParams = PARAMS) -> None:
    """Run the stage on `root/outputs/pipeline`."""
    export(
        root / "outputs" / "pipeline",
        root / "data" / "accepted.json",
        root / "outputs" / "onnx",
        root / "reports" / "export.json",
        root / "reports" / "timing" / "latency.json",
        params,
    )


def exported(root: Path, conditioning: str = "label") -> Path:
    """Make a work tree in which `export` has run, and return it."""
    write_pipeline(root / "outputs" / "pipeline", conditioning)
    write_accepted(root / "data" / "accepted.json")
    run_export(root)
    return root


def write_reports(root: Path, distance: float = 20.0, learning_rate: float = 2e-3, **changes: object) -> None:
    """Write the reports of a training run and its evaluation; another learning rate makes another run."""
    train = root / "reports" / "train"
    shutil.rmtree(train, ignore_errors=True)
    (train / "samples").mkdir(parents=True)
    atomic.write_json(
        train / "run.json",
        {
            "train_key": f"{learning_rate:.6f}".encode().hex().ljust(64, "0"),
            "params": {"train.learning_rate": learning_rate, "train.steps": 100, "train.log_every": 10},
            "data": {"digest": "e" * 64},
            "dataset": {"name": "pets", "digest": "e" * 64, "source": "data/latents"},
        },
    )
    with (train / "history.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss", "held_out_loss"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {"step": s, "loss": learning_rate / s, "held_out_loss": 0.5 if s == 100 else ""} for s in STEPS
        )
    grid = pictures.grid(np.full((4, 1, SIZE, SIZE), 99, np.uint8), 2)
    pictures.save_png(grid, train / "samples" / "step-000100.png")
    (train / "codec").mkdir()
    atomic.write_json(train / "codec" / "quality.json", {"autoencoder_psnr": 23.5})
    pictures.save_png(grid, train / "codec" / "reconstructions.png")
    evaluation = root / "reports" / "evaluation"
    evaluation.mkdir(parents=True, exist_ok=True)
    pictures.save_png(grid, evaluation / "grid_guided.png")
    measured = measurements(distance, **changes)
    measured.write(evaluation / measures.FILE)
    PROTOCOL.write(evaluation / protocol.FILE)
    editing = root / "reports" / "editing"
    editing.mkdir(parents=True, exist_ok=True)
    pictures.save_png(grid, editing / "fills.png")
    atomic.write_json(root / "reports" / "edits.json", {"images": 4, "inpainting": {"half": {"known_error": 0}}})
    atomic.write_text(root / "reports" / "index.html", "<title>the report</title>")
    (root / "reports" / "figures").mkdir(exist_ok=True)
    pictures.save_png(grid, root / "reports" / "figures" / "samples.png")
    atomic.write_json(root / "reports" / "timing" / "evaluate.json", {"seconds_per_image": {}})
    _write_index(root / "data" / "images")


def _write_index(images: Path) -> None:
    images.mkdir(parents=True, exist_ok=True)
    ImageIndex(
        shards=[],
        files={},
        rows=90,
        splits={"test": 30, "train": 60},
        caption_count=0,
        sha256="d" * 64,
        classes=CLASSES,
        licence="CC0",
        source="pets",
    ).write(images / "index.json")


def measurements(distance: float = 20.0, label_accuracy: float | None = 0.99, **changes: object) -> Measurements:
    """Plausible results of `evaluate`: distances unguided, label accuracy at guidance 1.5."""
    found = {
        "frechet_distance": Measure(
            value=distance, spread=1.0, drawn="unguided", guidance_scale=1.0, n=64, floor=10.0, floor_spread=0.5
        )
    }
    if label_accuracy is not None:
        found["label_accuracy"] = Measure(
            value=label_accuracy, spread=0.01, drawn="guided", guidance_scale=1.5, n=32, real=1.0
        )
    values = {
        "fingerprint": "f" * 64,
        "sampler": "ddim",
        "steps": 5,
        "guided_scale": 1.5,
        "seed_blocks": 3,
        "extractor": "classifier",
        "n_samples": 64,
        "n_reference": 30,
        "n_floor": 60,
        "n_searched": 60,
        "measures": found,
        "not_applicable": {"clip_score": "the images have no captions"},
    }
    return Measurements.model_validate(values | changes)


def run_package(root: Path) -> None:
    """Run `package` on the outputs of `exported` and `write_reports`."""
    package(
        root / "outputs" / "pipeline",
        root / "outputs" / "onnx",
        root / "data" / "accepted.json",
        root / "data" / "images",
        root / "reports" / "train",
        root / "reports" / "evaluation",
        root / "reports" / "export.json",
        root / "outputs" / "model",
    )


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
