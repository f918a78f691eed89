"""Invalid combinations of parameters, one per file: a stage refuses them at load in one sentence and opens no data."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.params import read

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "invalid").glob("*.yaml"))
SECONDS = 3
"""CPU seconds, which do not depend on other processes of the machine."""


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_refused_at_load_in_one_sentence(file, tmp_path):
    wrong = yaml.safe_load(file.read_text(encoding="utf-8"))
    document = read(ROOT / "params.yaml")
    for section, changes in wrong["changes"].items():
        document[section] |= changes
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(document), encoding="utf-8")
    names = ("latents", "codec", "accepted.json", "pipeline", "averages", "report")  # none of which exists
    command = [sys.executable, "-m", "tasks.train", *(str(tmp_path / name) for name in names), "--params", str(params)]
    before = children_seconds()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"AFTERIMAGE_SCRATCH": str(tmp_path / "scratch")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert children_seconds() - before < SECONDS
    assert done.returncode == 1
    assert done.stderr.startswith("train: error: ") and len(done.stderr.strip().splitlines()) == 1
    assert wrong["says"] in done.stderr
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
    assert done.returncode == 1
    assert done.stderr.startswith("train: error: ") and len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr
