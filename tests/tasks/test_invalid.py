"""Invalid combinations of parameters, one per file: a stage refuses them at load in one sentence and opens no data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.params import read
from tasks.runtime import stage
from tasks.train import train
from tests.support import commands, cpu

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "invalid").glob("*.yaml"))
SECONDS = 3
"""CPU seconds, which do not depend on other processes of the machine."""


def command_line(file: Path, folder: Path) -> list[str]:
    """Write the parameters of a file into `folder`; returns the arguments of a training, none of which exists."""
    document = read(ROOT / "params.yaml")
    for section, changes in yaml.safe_load(file.read_text(encoding="utf-8"))["changes"].items():
        document[section] |= changes
    params = folder / "params.yaml"
    params.write_text(yaml.safe_dump(document), encoding="utf-8")
    names = ("latents", "codec", "accepted.json", "prior", "pipeline", "averages", "report")
    return [*(str(folder / name) for name in names), "--params", str(params)]


def check(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 1
    assert done.stderr.startswith("train: error: ") and len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_refused_at_load_in_one_sentence(file, tmp_path, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    done = commands.call(lambda: stage.main(train), *command_line(file, tmp_path))
    check(done, yaml.safe_load(file.read_text(encoding="utf-8"))["says"])
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_refused_before_anything_large_is_imported(tmp_path):
    command = [sys.executable, "-m", "tasks.train", *command_line(FILES[0], tmp_path)]
    environment = os.environ | {"AFTERIMAGE_SCRATCH": str(tmp_path / "scratch")}
    with cpu.at_most(SECONDS):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    check(done, yaml.safe_load(FILES[0].read_text(encoding="utf-8"))["says"])
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "is not a file; see infra/accelerate"), ("num_proceses: 2", "accelerate cannot read")],
)
def test_a_configuration_of_accelerate_that_does_not_serve(text, says, tmp_path):
    configuration = tmp_path / "own.yaml"
    if text:
        configuration.write_text(text, encoding="utf-8")
    environment = os.environ | {"AFTERIMAGE_ACCELERATE": str(configuration)}
    command = [sys.executable, "-m", "tasks.train", *"abcdef"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    check(done, says)
