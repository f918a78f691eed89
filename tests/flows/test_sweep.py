"""A sweep of two tiny trials, end to end: one is killed and tried again, and a second run finds both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support import tiny

TINY = {
    "title": "Two rates",
    "question": "Does a sweep survive a kill?",
    "preset": "digits",
    "overrides": {key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in tiny.OVERRIDES)},
    "grid": {"train.learning_rate": [0.001, 0.004]},
    "evaluate": {"guidance_scale": [1, 3]},
    "seeds": [0],
    "metrics": ["frechet_distance_guided"],
}


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AFTERIMAGE_"))}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def trainings(tree: Path) -> Iterator[psutil.Process]:
    """Processes of the stage `train` in a clone of `tree`."""
    for process in psutil.process_iter():
        try:
            if "tasks.train" in process.cmdline() and str(tree) in process.cwd():
                yield process
        except psutil.Error:
            continue


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_trial_is_tried_again_and_a_finished_sweep_is_not_repeated(tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path / "tree")
    (tree / "sweeps" / "two.yaml").write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-m", "flows.sweep", "two", "--jobs", "2"]
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(command, cwd=tree, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        while not (found := list(trainings(tree))):
            assert running.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        found[0].kill()
        assert running.wait(timeout=900) == 0, (tmp_path / "log").read_text()[-3000:]
    text = (tmp_path / "log").read_text()
    assert "Retry 1/1" in text
    assert "sweep: best: learning_rate" in text
    assert (tree / "reports" / "sweeps" / "two.html").stat().st_size < 5_000_000
    assert not list((tree / ".prefect" / "workspaces").glob("sweep-*/dvc.yaml")), "the clones are gone"

    shown = json.loads(tiny.run(tree, "dvc", "exp", "show", "--json"))
    names = {each["name"] for revision in shown for each in revision.get("experiments") or []}
    wanted = "two-learning-rate-0p001-guidance-scale-3-seed-0"
    assert len(names) == 4 and wanted in names
    # DVC reports the outputs of the stages after `evaluate`, which no commit of this tree has, and applies all others.
    command = [sys.executable, "-m", "dvc", "exp", "apply", wanted]
    subprocess.run(command, cwd=tree, env=environment(), check=False)
    applied = yaml.safe_load((tree / "params.yaml").read_text())
    assert applied["train"]["learning_rate"] == 0.001
    assert json.loads((tree / "reports" / "evaluation" / "measurements.json").read_text())["guided_scale"] == 3

    again = tiny.run(tree, "flows.sweep", "two")
    assert "sweep: best: learning_rate" in again
    page = tmp_path / "page.html"
    tiny.run(tree, "tasks.compare", wanted, wanted.replace("0p001", "0p004"), "--out", str(page))
    assert "train.learning_rate" in page.read_text()
