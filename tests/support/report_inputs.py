"""Inputs for the tests of `visualize`: real digits, a tiny network with random weights, tables as of `evaluate`."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models.images import pictures
from models.networks.unet import UNet, UNetConfig
from models.noise import schedules
from models.pipeline import PipelineInfo, save_pipeline
from tasks.formats.verdict import Verdict
from tasks.params import VisualizeParams
from tasks.pictures import images as image_files
from tasks.runtime import measures
from tasks.runtime.measures import Measure, Measurements
from tasks.validation.report import page as validation_report
from tasks.validation.report.findings import Finding, Findings, Gate
from tasks.visualize import visualize

SIZE, TIMESTEPS = 8, 20
PARAMS = VisualizeParams(sampler="ddim", steps=10, guidance_scales=(1.0, 2.0), columns=5, seed=3)
MEASURED = Measurements(
    fingerprint="0f" * 32,
    sampler="dpm_solver_pp_2m",
    steps=20,
    guided_scale=1.5,
    seed_blocks=3,
    extractor="classifier",
    n_samples=512,
    n_reference=20,
    n_floor=60,
    n_searched=60,
    measures={
        "frechet_distance": Measure(
            value=23.1, spread=0.7, drawn="unguided", guidance_scale=1.0, n=512, floor=10.2, floor_spread=0.31
        ),
        "kid": Measure(value=0.0123, spread=0.001, drawn="unguided", guidance_scale=1.0, n=512),
        "label_accuracy": Measure(value=0.994, spread=0.002, drawn="guided", guidance_scale=1.5, n=256),
    },
    not_applicable={"clip_score": "the images have no captions"},
)
FINDINGS = [
    Finding(
        Gate(
            "size",
            "ExpectColumnValuesToBeBetween",
            {"column": "shorter_side", "min_value": 8},
            "images are smaller than validate.min_side 8; remove them or lower it",
        ),
        True,
        0,
        [],
        "0 of 80 rows",
    ),
    Finding(
        Gate("drift", "ExpectColumnSumToBeBetween", {"column": "moved", "max_value": 0.1}, "the <label> balance moved"),
        False,
        0,
        [],
        "0.35",
        "warning",
    ),
]
SAMPLERS = """\
sampler,steps,eta,guidance_scale,n,seed_blocks,frechet_distance,kid,cmmd,precision,recall,inception_score,\
inception_style_score,clip_score,label_accuracy,note
dpm_solver_pp_2m,20,,1.0,512,3,23.1,0.0123,0.45,0.912,0.871,4.123,9.123,81.23,0.943,
dpm_solver_pp_2m,20,,1.5,256,3,24.5,-0.000123,0.46,0.912,0.871,4.123,9.456,81.71,0.996,
ddim,50,0.5,1.0,128,1,23.9,-0.000456,0.47,0.912,0.871,4.123,9.001,80.12,0.943,
ddpm,1000,,1.0,32,1,,,,,,,,79.51,0.938,too few images for distances (128 needed)
"""
STRENGTHS = """\
strength,n,psnr,feature_distance,frechet_to_input,frechet_to_data,asked_share,asked_share_ignored
0.2,30,25.25,0.5,0.25,1.75,0.125,0.025
0.8,30,12.5,2.5,1.5,1.25,0.875,0.05
"""
FILLS = """\
mask,fill,n,masked_share,known_error,psnr,feature_distance,frechet_to_input,frechet_to_data,own_share
half,model,30,0.5,0,14.5,1.25,0.5,1.5,0.925
half,mean fill,30,0.5,0,9.5,3.25,2.5,4.5,0.225
"""
EDITS = {"strengths": (STRENGTHS, 15), "fills": (FILLS, 10)}
"""Tables of `edit` and the number of images in the picture of each; an unconditional model has none."""


@dataclass(frozen=True)
class Inputs:
    """A folder laid out like a work tree."""

    root: Path

    def draw(self, into: str, params: VisualizeParams = PARAMS) -> tuple[Path, Path]:
        """Run the stage; returns the folder of figures and the page."""
        reports, figures, page = self.root / "reports", self.root / into / "figures", self.root / into / "index.html"
        visualize(
            self.root / "outputs" / "pipeline",
            self.root / "data" / "images",
            self.root / "data" / "accepted.json",
            reports / "validation",
            reports / "train",
            reports / "evaluation",
            reports / "editing",
            reports / "timing" / "evaluate.json",
            figures,
            self.root / into / "animations",
            page,
            self.root / into / "timed",
            params,
        )
        return figures, page


def make(root: Path, classes: list[str], channels: int = 1, held_out_loss: bool = True, guide: bool = False) -> Inputs:
    """Inputs for a model of `classes`; none of them makes it unconditional and its images unlabelled."""
    for folder in (
        "data/images",
        "outputs/pipeline",
        "reports/train/samples",
        "reports/evaluation",
        "reports/editing",
        "reports/validation",
    ):
        (root / folder).mkdir(parents=True)
    Verdict().write(root / "data" / "accepted.json")
    pixels = _write_images(root / "data" / "images", classes, channels)
    _write_pipeline(root / "outputs" / "pipeline", classes, channels, guide)
    _write_training(root / "reports" / "train", pixels, held_out_loss, "min_snr" if classes else "plain")
    validation_report.write(root / "reports" / "validation", Findings(FINDINGS, {"not an image": 2}))
    MEASURED.write(root / "reports" / "evaluation" / measures.FILE)
    (root / "reports" / "evaluation" / "samplers.csv").write_text(SAMPLERS)
    pictures.save_png(pictures.grid(pixels[:10], 5), root / "reports" / "evaluation" / "grid_slowest.png")
    pictures.save_png(pictures.grid(pixels[10:20], 5), root / "reports" / "evaluation" / "grid_unguided.png")
    for name, (table, picture) in EDITS.items():
        (root / "reports" / "editing" / f"{name}.csv").write_text(table if classes else table.splitlines()[0] + "\n")
        if classes:
            pictures.save_png(pictures.grid(pixels[:picture], 5), root / "reports" / "editing" / f"{name}.png")
    return Inputs(root)


def _write_images(folder: Path, classes: list[str], channels: int) -> np.ndarray:
    """80 of scikit-learn's digits, three in four for training; as colours, each channel another digit."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = (load_digits().images[: 80 * channels] * (255 / 16)).astype(np.uint8)
    pixels = digits.reshape(80, channels, SIZE, SIZE)
    writer = image_files.Writer(folder, shards=1)
    for number, image in enumerate(pixels):
        encoded = io.BytesIO()
        Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0)).save(encoded, "PNG")
        writer.add(
            {
                "key": f"{number:03d}.png",
                "image": encoded.getvalue(),
                "width": SIZE,
                "height": SIZE,
                "mode": "L" if channels == 1 else "RGB",
                "label": number % len(classes) if classes else None,
                "captions": [],
                "split": "test" if number % 4 == 3 else "train",
                "sha256": "",
                "phash": "",
                "safety": None,
                "licence": "BSD-3-Clause",
                "source": "digits",
            }
        )
    replace(writer.close(), classes=classes).write(folder / "index.json")
    return pixels


def _write_pipeline(folder: Path, classes: list[str], channels: int, guide: bool) -> None:
    import torch

    torch.manual_seed(0)
    conditions = len(classes) + 1 if classes else 0
    unet = UNet(UNetConfig(SIZE, channels, (8, 16), (False, True), 1, 4, 8, conditions=conditions))
    for weights in unet.parameters():  # the last layer starts at zero, and would draw nothing
        torch.nn.init.normal_(weights, std=0.2)
    info = PipelineInfo(
        conditioning="label" if classes else "none",
        classes=classes,
        channels=channels,
        size=SIZE,
        timesteps=TIMESTEPS,
        prediction="v_prediction" if classes else "epsilon",
        schedule="cosine" if classes else "linear",
        null_label=len(classes) if classes else None,
        train_key="ab" * 32,
    )
    weights = unet.state_dict()
    companions = {"guide": {name: 0.8 * value for name, value in weights.items()}} if guide else {}
    save_pipeline(folder, unet, weights, schedules.betas(info.schedule, TIMESTEPS), info, companions=companions)


def _write_training(folder: Path, pixels: np.ndarray, held_out_loss: bool, weighting: str) -> None:
    params = {"diffusion.loss_weighting": weighting, "diffusion.min_snr_gamma": 2.5}
    (folder / "run.json").write_text(json.dumps({"params": params}))
    lines = ["step,loss,held_out_loss,learning_rate,grad_norm"]
    for step in range(10, 210, 10):
        held_out = f"{1.1 / step:.6f}" if held_out_loss and step % 50 == 0 else ""
        lines.append(f"{step},{1 / step:.6f},{held_out},{1e-3 * step / 200:.6f},0.5")
    (folder / "history.csv").write_text("\n".join(lines) + "\n")
    for step in range(20, 201, 20):
        pictures.save_png(pictures.grid(pixels[:20], 10, scale=2), folder / "samples" / f"step-{step:06d}.png")
    if weighting == "min_snr":
        (folder / "codec").mkdir()
        quality = {"autoencoder_psnr": 23.456, "text_retrieval_accuracy": 0.8, "text_retrieval_chance": 0.1}
        (folder / "codec" / "quality.json").write_text(json.dumps(quality))
        pictures.save_png(pictures.grid(pixels[:8], 4), folder / "codec" / "reconstructions.png")
