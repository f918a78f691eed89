"""A tiny training: its inputs as the stages before write them, and ways to run it."""

from __future__ import annotations

import copy
import csv
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml

from tasks.formats.prior import FILE as PRIOR
from tasks.formats.prior import Prior
from tasks.formats.verdict import Verdict
from tests.support.warm import WarmProcess

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"steps": 12, "warmup_steps": 2, "log_every": 3, "checkpoint_every": 6, "sample_every": 6}
WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"


def uniform(timesteps: int):
    """Return uniform timesteps of the cosine schedule."""
    import torch

    from models.noise.schedules import path_of
    from models.optimization.timesteps import Timesteps

    return Timesteps(path_of("cosine", timesteps), torch.device("cpu"))


def write_inputs(
    folder: Path,
    conditioning: str = "label",
    count: int = 96,
    shard_size: int = 1000,
    buckets: tuple = ((8, 8),),
    control: bool = False,
) -> None:
    """Write latents, codec and verdict of a tiny data set as `validate`, `codec` and `encode` do.

    Args:
        folder: where they are written.
        conditioning: "none", "label" or "text".
        count: training images per bucket.
        shard_size: images per shard.
        buckets: height and width of each bucket.
        control: whether the images are random blocks of 2 x 2 pixels, and have a colour map of them.
    """
    import torch

    from models.networks.control_maps import ControlSpec
    from tasks.formats import latents
    from tasks.formats.codec_info import CodecInfo, TextInfo
    from tasks.formats.latents import BucketShard, Split

    rng = np.random.default_rng(0)
    classes = [] if conditioning == "none" else ["light", "dark"]
    text = conditioning == "text"
    codec = CodecInfo(
        kind="identity",
        conditioning=conditioning,
        size=8,
        channels=1,
        classes=classes,
        text=TextInfo(width=32, length=5) if text else None,
        prompts=["a light", "a dark"] if text else None,
        files={},
    )

    def split(name, n):
        shards = [
            BucketShard(file=shard.file, sha256=shard.sha256, bucket=bucket)
            for bucket in range(len(buckets))
            for shard in some(name, n, bucket)
        ]
        return Split(count=n * len(buckets), keys_sha256="keys", shards=shards)

    def some(name, n, bucket):
        labels = rng.integers(0, 2, n)
        pixels = (rng.integers(0, 100, (n, 1, *buckets[bucket])) + 150 * (1 - labels)[:, None, None, None]).astype(
            np.uint8
        )
        columns = {"pixels": pixels}
        if control:
            cells = rng.integers(0, 2, (n, 1, 4, 4), np.uint8) * 255
            columns |= {"pixels": cells.repeat(2, axis=2).repeat(2, axis=3), "control": cells.repeat(3, axis=1)}
        if conditioning == "label":
            columns["labels"] = labels
        if text:
            columns["captions"] = np.where(rng.random((n, 3)) < 0.3, -1, rng.integers(0, 4, (n, 3))).astype(np.int32)
            columns["captions"][:, 0] = labels
            columns["captions"][:, 1:] = -np.sort(-columns["captions"][:, 1:])  # padded with -1
        return latents.write_shards(
            folder / "latents",
            f"{name}-{bucket}",
            n,
            lambda part: {key: column[part] for key, column in columns.items()},
            shard_size,
        )

    (folder / "latents").mkdir(parents=True)
    splits = {"train": split("train", count), "test": split("test", 32)}
    texts = prompts = None
    if text:
        embeddings = torch.from_numpy(rng.standard_normal((4, 5, 32))).to(torch.bfloat16)
        texts = latents.write_shards(
            folder / "latents", "texts", 4, lambda part: {"embeddings": embeddings[part]}, shard_size
        )
        prompts = latents.write_prompts(
            folder / "latents", torch.cat([embeddings[:2], torch.zeros_like(embeddings[:1])])
        )
    spec = ControlSpec("colour", colour_cells=4) if control else None
    latents.write_index(folder / "latents", codec, splits, buckets, texts, prompts, spec)
    codec.write(folder / "codec" / "codec.json")
    Verdict(sha256="0" * 64).write(folder / "accepted.json")
    Prior().write(folder / "prior" / PRIOR)


@functools.cache
def _committed_params() -> dict:
    from tasks import params

    return params.read(ROOT / "params.yaml")


def write_params(
    folder: Path,
    conditioning: str = "label",
    dropout: float = 0.0,
    architecture: str = "unet",
    control: bool = False,
    lora_rank: int | None = None,
    **train,
) -> None:
    """Write parameters of 60 steps, whose rows, checkpoints and grids coincide at some steps and not at others."""
    document = copy.deepcopy(_committed_params())
    document["image"] = {"resolution": 8, "channels": 1}
    document["codec"]["conditioning"] = conditioning
    if conditioning == "none":
        document["evaluate"]["guidance_scale"] = 1.0
        document["evaluate"]["guidance_sweep"] = []
        document["edit"]["guidance_scale"] = 1.0
        document["visualize"]["guidance_scales"] = [1.0]
    document["model"] |= {"block_out_channels": [8, 16], "attention": [False, True], "norm_num_groups": 4}
    document["model"] |= {"dropout": dropout, "lora_rank": lora_rank}
    if control:
        document["encode"]["control"] = {"kind": "colour", "colour_cells": 4}
        document["model"]["control_widths"] = [8]
    document["model"] |= {"architecture": architecture, "dit": {"patch_size": 2, "width": 16, "depth": 2, "heads": 2}}
    document["diffusion"] |= {"schedule": "cosine", "prediction": "v_prediction", "timestep_density": "uniform"}
    document["diffusion"] |= {"timesteps": 50, "loss_weighting": "plain"}
    document["evaluate"] |= {"sampler": "dpm_solver_pp_2m", "steps": 10}
    document["visualize"] |= {"sampler": "dpm_solver_pp_2m", "steps": 10}
    document["train"] |= {
        "optimizer": "adamw",
        "steps": 60,
        "batch_size": 16,
        "learning_rate": 0.002,
        "ema": ["decay-0.99", "std-0.10"],
        "pipeline_ema": "decay-0.99",
        "ema_snapshots": 4,
        "warmup_steps": 5,
        "log_every": 7,
        "checkpoint_every": 10,
        "sample_every": 25,
    } | train
    if all(profile.startswith("decay-") for profile in document["train"]["ema"]):
        document["train"]["ema_snapshots"] = 0
    (folder / "params.yaml").write_text(yaml.safe_dump(document))


PATHS = ("latents", "codec", "accepted.json", "prior", "pipeline", "averages", "report")


def command(folder: Path) -> list[str]:
    arguments = [str(folder / path) for path in PATHS]
    return [sys.executable, "-m", "tasks.train", *arguments, "--params", str(folder / "params.yaml")]


def start_warm(folder: Path, database: Path) -> WarmProcess:
    """Start the training as a process that has loaded the packages."""
    return WarmProcess(command(folder)[3:], environment(folder, database), folder / "log")


def environment(folder: Path, database: Path) -> dict[str, str]:
    """Return an environment with a separate scratch folder and a copy of the session's migrated MLflow database."""
    uri = folder / "mlflow.db"
    if not uri.exists():
        uri.write_bytes(database.read_bytes())
    return os.environ | {
        "AFTERIMAGE_SCRATCH": str(folder / "scratch"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{uri}",
        "OMP_NUM_THREADS": "1",
    }


def run(folder: Path, database: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder), cwd=ROOT, env=environment(folder, database), capture_output=True, text=True, timeout=300
    )


def results(folder: Path, outputs: str = ".", report: str = "report", scratch: str = "scratch") -> dict:
    """Return name -> hash of every file that a run writes: pipeline, averages, report, and the last checkpoint."""
    last = checkpoints(folder / scratch)[-1]
    parts = {name: folder / outputs / name for name in ("pipeline", "averages")}
    parts |= {"report": folder / report, last.name: last}
    return {
        f"{name}/{file.relative_to(root)}": hashlib.sha256(file.read_bytes()).hexdigest()
        for name, root in parts.items()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def history(folder: Path) -> list[dict[str, str]]:
    """Return the rows of `history.csv`."""
    with (folder / "report" / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def small_grids() -> Iterator[None]:
    """Draw four images in two steps for a grid of samples, and time small matrix products.

    Those of the real size take longer than a tiny training.
    """
    from models import flops
    from tasks.training import previews

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "CEILING_SIDE", {"cpu": 256})
        for name in ("STEPS", "COLUMNS", "ROWS"):
            patch.setattr(previews, name, 2)
        yield


def train_here(folder: Path, monkeypatch, database: Path) -> None:
    """Run the stage function in this process, which loads the packages once for all tests."""
    from tasks.train import train

    loaded = _as_a_process(folder, monkeypatch, database)
    train(*(folder / path for path in PATHS), loaded.model, loaded.diffusion, loaded.train)


def prepare_here(folder: Path, monkeypatch, database: Path):
    """Return the run that the stage would train, before its first step."""
    from tasks.formats import latents
    from tasks.formats.verdict import require_accepted
    from tasks.training import key as training_key
    from tasks.training import run as training_run

    loaded = _as_a_process(folder, monkeypatch, database)
    index, verdict = latents.read_index(folder / "latents"), require_accepted(folder / "accepted.json")
    sections = (loaded.model, loaded.diffusion, loaded.train)
    facts = training_key.run_facts(index, folder / "codec", verdict, *sections)
    network = training_run.network_config(index.input_spec, loaded.model)
    return training_run.prepare(folder / "latents", index, facts, network, loaded.diffusion, loaded.train)


def _as_a_process(folder: Path, monkeypatch, database: Path):
    """Set environment and accelerate's state as in a new process; returns the parameters."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from tasks import params

    for name, value in environment(folder, database).items():
        monkeypatch.setenv(name, value)
    for state in (AcceleratorState, GradientState, PartialState):  # singletons, which keep their precision
        state._reset_state()
    monkeypatch.chdir(ROOT)
    return params.load(folder / "params.yaml")


def copy_of(undisturbed: Path, folder: Path, *more: str) -> None:
    """Copy the inputs of another run, and its folders `more`."""
    for name in ("latents", "codec", "prior", *more):
        shutil.copytree(undisturbed / name, folder / name)
    for name in ("accepted.json", "params.yaml"):
        shutil.copy(undisturbed / name, folder / name)


def dvc_tree(undisturbed: Path, folder: Path, **stages: dict) -> None:
    """Make a folder with the stage `train` and others in dvc.yaml, and the inputs of another run."""
    from tests.support import tiny

    stages["train"] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["train"]
    (folder / "data").mkdir(parents=True)
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    for name in ("tasks", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=tiny.UNFINISHED)
    shutil.copytree(undisturbed / "latents", folder / "data" / "latents")
    for name in ("codec", "prior"):
        shutil.copytree(undisturbed / name, folder / "outputs" / name)
    shutil.copy(undisturbed / "accepted.json", folder / "data" / "accepted.json")
    shutil.copy(undisturbed / "params.yaml", folder)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=folder, check=True)


def checkpoints(scratch: Path) -> list[Path]:
    return sorted((scratch / "train").glob("*/step-*"))


def kill_when(
    process: subprocess.Popen | WarmProcess, happens: Callable[[], bool], kill: Callable[[], None] | None = None
) -> None:
    """Send SIGKILL as soon as `happens()`, unless the process ends before."""
    while process.poll() is None and not happens():
        time.sleep(0.002)
    if process.poll() is None:
        (kill or process.kill)()
    process.wait()
