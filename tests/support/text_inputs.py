"""Small captioned images, processed by the real stages from `download` to `export`."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tasks.codec import codec
from tasks.download import download
from tasks.encode import encode
from tasks.export import export
from tasks.formats.prior import FILE as PRIOR
from tasks.formats.prior import Prior
from tasks.formats.verdict import Verdict
from tasks.ingest import ingest
from tasks.params import (
    NO_PATH,
    CodecParams,
    ControlParams,
    DiffusionParams,
    EncodeParams,
    ExportParams,
    ImageParams,
    ModelParams,
    TrainParams,
)
from tasks.params.composition import compose
from tasks.train import train
from tests.support.data_inputs import folder_params, ingest_params, picture, write_tree
from tests.support.train_inputs import small_grids, uniform

if TYPE_CHECKING:
    from tasks.training.batches import Batches

LINES = [f'{seed:02d}.png,"{"bright" if seed % 2 else "dark"} picture of thing {seed % 5}"' for seed in range(48)]
MODEL = ModelParams(
    block_out_channels=(8, 16), attention=(False, True), layers_per_block=1, norm_num_groups=4, attention_head_dim=8
)
DIFFUSION = DiffusionParams(schedule="cosine", timesteps=20, prediction="v_prediction")


def train_params(**others) -> TrainParams:
    defaults = {
        "optimizer": "adamw",
        "steps": 4,
        "batch_size": 8,
        "learning_rate": 0.01,
        "lr_schedule": "constant",
        "warmup_steps": 1,
        "ema_snapshots": 0,
        "condition_dropout": 0.2,
        "horizontal_flip": True,
        "sample_every": 4,
        "log_every": 2,
    }
    return TrainParams.model_validate({**compose("digits", [])["train"], **defaults, **others})


def through(
    root: Path,
    database: Path,
    params: CodecParams,
    size: tuple[int, int] = (16, 16),
    control: ControlParams | None = None,
) -> Path:
    """Make 48 captioned images of `size` (width, height) below `root`, run the stages on them, and return `root`.

    With `control` maps are encoded, and the stages end before the training.
    """
    files = {f"{seed:02d}.png": picture(seed, size) for seed in range(48)}
    with pytest.MonkeyPatch.context() as patch:
        shutil.copy(database, root / "mlflow.db")
        at_home(root, patch)
        (root / NO_PATH).parent.mkdir(parents=True)
        (root / NO_PATH).touch()
        source = write_tree(root / "in", files | {"captions.csv": "\n".join(["image,caption", *LINES]).encode()})
        download(root / "raw", folder_params(source))
        ingest(root / "raw", root / "images", root / "quarantine", ingest_params())
        Verdict().write(root / "accepted.json")
        codec(root / "images", root / "accepted.json", root / "codec", params, ImageParams(resolution=16, channels=3))
        encode(
            root / "images",
            root / "accepted.json",
            root / "codec",
            root / "latents",
            EncodeParams(shard_size=20, horizontal_flip=True, control=control),
        )
        Prior().write(root / "prior" / PRIOR)
        if control is None:
            run_train(root, "pipeline")
            run_export(root)
    return root


def given_images(count: int, side: int) -> np.ndarray:
    """Return random images to begin with, uint8 [count, 3, side, side]."""
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def run_export(root: Path, name: str = "pipeline", bundle: str = "onnx", **params) -> None:
    """Export the pipeline `name` to the folder `bundle`, with parameters of the section export."""
    export(
        root / name,
        root / "accepted.json",
        root / bundle,
        root / "export.json",
        root / "latency.json",
        ExportParams(latency_batches=(1,), **params),
    )


def at_home(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Use MLflow, the scratch folder and relative paths below `root`."""
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    patch.setenv("AFTERIMAGE_SCRATCH", str(root / "scratch"))
    patch.chdir(root)


def run_train(root: Path, name: str, model: ModelParams = MODEL, prior: str = "prior", **others) -> None:
    with small_grids():
        train(
            root / "latents",
            root / "codec",
            root / "accepted.json",
            root / prior,
            root / name,
            root / f"averages-{name}",
            root / f"report-{name}",
            model,
            DIFFUSION,
            train_params(**others),
        )


def with_tokens(tree: Path, root: Path, precision: str = "no") -> Path:
    """Encode the images of `tree` again with captions as token ids below `root`, and return `root`."""
    for name in ("images", "codec", "accepted.json", "prior", "tasks"):
        (root / name).symlink_to(tree / name)
    shutil.copy(tree / "mlflow.db", root)
    with pytest.MonkeyPatch.context() as patch:
        at_home(root, patch)
        if precision == "no":
            patch.setenv("AFTERIMAGE_SCRATCH", str(tree / "scratch"))  # which has the latents of the images
        params = EncodeParams(shard_size=20, horizontal_flip=True, captions="tokens", precision=precision)
        encode(root / "images", root / "accepted.json", root / "codec", root / "latents", params)
    return root


def batches_of(root: Path, **config: object) -> Batches:
    """Open the training batches of 16 images."""
    from tasks.training.batches import Batches, DrawConfig, open_conditioning
    from tasks.training.stores import open_store

    device = torch.device("cpu")
    conditioning = open_conditioning(root / "latents", "device", device, root / "codec")
    store = open_store(root / "latents", "train", "device", device)
    return Batches(store, conditioning, DrawConfig(batch_size=16, timesteps=uniform(20), seed=0, **config), device)


def drawn_by_both(
    pipeline: Path, kind: str, guidance_scale: float, negative_prompt: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one prompt by DDIM from the same noise with diffusers' pipeline, whose class must be `kind`, and with ours.

    Returns:
        Both images [3, H, W], in [0, 1].
    """
    from diffusers import DDIMScheduler, DiffusionPipeline

    from models.noise.samplers import Sampling, SeededNoise
    from models.pipeline import load_pipeline

    with warnings.catch_warnings(record=True) as complaints:
        theirs = DiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
    assert not any("outdated" in str(complaint.message) for complaint in complaints)
    assert type(theirs).__name__ == kind
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, set_alpha_to_one=True)
    noise = torch.from_numpy(SeededNoise([7], (2, 8, 8))())
    prompt, sampling = "dark picture of thing 2", Sampling("ddim", 5, guidance_scale=guidance_scale)
    # None and not "": for Stable Diffusion XL only None stands for the null condition that training drops prompts to.
    options = {"height": 16, "width": 16, "output_type": "np", "eta": 0.0, "negative_prompt": negative_prompt or None}
    drawn = theirs(prompt, num_inference_steps=5, latents=noise, guidance_scale=guidance_scale, **options).images[0]
    model = replace(load_pipeline(pipeline), negative_prompt=negative_prompt)
    ours = model.sample([7], sampling=sampling, prompts=[prompt])
    return drawn.transpose(2, 0, 1), np.clip((ours[0] + 1) / 2, 0, 1)


def is_base_with_adapter(base: Path, adapted: Path, condition: torch.Tensor, **added) -> bool:
    """Whether diffusers' pipeline of `base`, with the LoRA adapter of `adapted` loaded, has the network of `adapted`.

    Args:
        base: The pipeline without the adapter.
        adapted: The pipeline with the merged weights, and the adapter in `lora/`.
        condition: Token embeddings [1, L, D].
        added: Further conditions of the network (`added_cond_kwargs`).
    """
    from diffusers import DiffusionPipeline

    pipelines = [DiffusionPipeline.from_pretrained(folder, local_files_only=True) for folder in (base, adapted)]
    inputs = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([7]), condition

    def drawn(pipeline):
        with torch.inference_mode():
            return pipeline.unet(*inputs, added_cond_kwargs=added).sample

    before, wanted = map(drawn, pipelines)
    pipelines[0].load_lora_weights(adapted / "lora")
    assert not torch.allclose(before, wanted, atol=1e-3)
    return torch.allclose(drawn(pipelines[0]), wanted, atol=1e-5)
