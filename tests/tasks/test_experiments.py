"""What DVC shows of experiments: a baseline once `dvc.lock` is committed, and tables that fit a screen.

Stages that write numbers stand in for those that compute them; names and form of the files are the real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import model_outputs, tiny

SCREEN = 160
CHAIN = """\
stages:
  train:
    cmd: python -c "from pathlib import Path; Path('outputs').mkdir(exist_ok=True);
      Path('outputs/pipeline').write_text(Path('params.yaml').read_text())"
    params: [train, diffusion]
    outs: [outputs/pipeline]
  evaluate:
    cmd: python evaluate.py
    deps: [outputs/pipeline]
    metrics: [reports/metrics.json]
    outs: [reports/evaluation]
  register:
    cmd: python -c ""
    deps: [outputs/pipeline, reports/evaluation]
"""
EVALUATE = """\
import json, pathlib, re
rate = float(re.search(r"learning_rate: (.*)", pathlib.Path("params.yaml").read_text())[1])
headline = json.loads(pathlib.Path("headline.json").read_text())
changing = ("frechet_distance_unguided", "label_accuracy_guided", "clip_score_guided")
pathlib.Path("reports/evaluation").mkdir(parents=True)
pathlib.Path("reports/metrics.json").write_text(json.dumps(
    {name: value + rate if name in changing else value for name, value in headline.items()}))
"""


def dvc(where: Path, *arguments: str) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": str(SCREEN),
        "DVC_NO_ANALYTICS": "1",
    }
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain that has run once; its `dvc.lock` is not committed."""
    root = tmp_path_factory.mktemp("experiments")
    tiny.git(root, "init", "--quiet")
    dvc(root, "init", "--quiet")
    (root / "dvc.yaml").write_text(CHAIN)
    (root / "evaluate.py").write_text(EVALUATE)
    found = model_outputs.measurements().measures
    found["clip_score"] = found["label_accuracy"].model_copy(update={"value": 81.7})
    headline = model_outputs.measurements(measures=found).headline_numbers()
    assert len(headline) <= 10
    (root / "headline.json").write_text(json.dumps(headline))
    (root / "params.yaml").write_text("train:\n  learning_rate: 0.004\n  steps: 500\ndiffusion:\n  schedule: cosine\n")
    (root / ".gitignore").write_text("/outputs\n/reports\n")
    tiny.git(root, "add", ".")
    tiny.git(root, "commit", "--quiet", "-m", "a chain")
    dvc(root, "repro", "--quiet")
    return root


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_first_experiment_has_a_baseline_once_the_lock_is_committed(tree: Path) -> None:
    tiny.git(tree, "add", "dvc.lock")
    tiny.git(tree, "commit", "--quiet", "-m", "Results of this machine")
    dvc(tree, "exp", "run", "--quiet", "-S", "train.learning_rate=0.001", "-S", "diffusion.schedule=linear")
    changes = json.loads(dvc(tree, "metrics", "diff", "--json"))["reports/metrics.json"]
    assert set(changes) == {
        "frechet_distance_unguided",
        "label_accuracy_guided",
        "clip_score_guided",
    }
    assert all(change["old"] > change["new"] for change in changes.values())
    plain = dvc(tree, "exp", "show", "--only-changed").splitlines()
    names = ["frechet_distance_unguided", "clip_score_guided", "train.learning_rate", "diffusion.schedule"]
    assert all(plain[1].index(name) + len(name) <= SCREEN for name in names), "hashes alone stand further right"
    table = dvc(tree, "exp", "show", "--only-changed", "--drop", ".*/").splitlines()
    assert all(name in table[1] for name in names) and "outputs" not in table[1]
    assert max(map(len, table)) <= SCREEN
    assert len(table) == 3 + 3 + 1, "each experiment has one line"
