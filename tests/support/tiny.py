"""A copy of the work tree with tiny parameters: every stage is real and takes seconds instead of minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

UNFINISHED = shutil.ignore_patterns("*.pyc.*")
"""Bytecode that another process is writing."""
OVERRIDES = [
    "image.resolution=8",
    "model.block_out_channels=[8,16]",
    "model.attention=[false,true]",
    "model.norm_num_groups=4",
    "diffusion.timesteps=20",
    "train.steps=12",
    "train.warmup_steps=2",
    "train.log_every=2",
    "train.checkpoint_every=5",
    "train.sample_every=6",
    "judge.classifier_steps=20",
    "judge.clip_steps=10",
    "evaluate.steps=2",
    "evaluate.n_distance=64",
    "evaluate.n_accuracy=32",
    "evaluate.n_compare=32",
    "evaluate.n_slowest=4",
    "evaluate.guidance_sweep=[1.0,3.0]",
    "evaluate.n_sweep=64",
    "edit.n_images=8",
    "edit.strengths=[0.5]",
    "edit.masks=[half]",
    "edit.steps=4",
    "visualize.steps=4",
    "visualize.columns=4",
    "export.latency_batches=[1]",
]


def tree(destination: Path, *overrides: str) -> Path:
    """Copy the files of the work tree without outputs, compose tiny parameters and commit the copy."""
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in listed:
        if name and name != "dvc.lock" and (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, destination / name)
    copy_bytecode({Path(name).parent for name in listed if name.endswith(".py")}, destination)
    command = [sys.executable, "-m", "tasks.preset", "digits", *OVERRIDES, *overrides]
    subprocess.run(command, cwd=destination, check=True, capture_output=True)
    git(destination, "init", "--quiet")
    git(destination, "add", ".")
    git(destination, "commit", "--quiet", "-m", "a tiny chain")
    return destination


def copy_bytecode(folders: set[Path], destination: Path) -> None:
    """Copy what Python has compiled here, which is valid for copies of the files with their times."""
    for folder in folders:
        if (compiled := ROOT / folder / "__pycache__").is_dir() and (destination / folder).is_dir():
            shutil.copytree(compiled, destination / folder / "__pycache__", ignore=UNFINISHED)


def run(tree: Path, *command: str) -> str:
    """Output of a Python module, run in `tree` as a person would who has nothing set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AFTERIMAGE_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def git(where: Path, *arguments: str) -> str:
    """Output of a Git command in `where`, with a test author."""
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "core.hooksPath=", *arguments]
    return subprocess.run(command, cwd=where, check=True, capture_output=True, text=True).stdout.strip()
