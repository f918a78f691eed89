"""Two pipelines at once, in one work tree and in two that share cache, scratch and MLflow: same bytes, one run."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from sqlite3 import connect
from typing import TYPE_CHECKING

import pytest

from tests.support import tiny
from tests.support.stage_drill import environment, hashes

if TYPE_CHECKING:
    from tests.flows.conftest import Chain

pytestmark = pytest.mark.slow  # chains that compute everything


def start(tree: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """Start `make repro` without the installation."""
    return subprocess.Popen(
        [sys.executable, "-m", "infra.run", *arguments],
        cwd=tree,
        env=environment() | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(3600)
def test_two_in_one_work_tree(tmp_path, chain: Chain):
    """DVC lets one of them work; the other ends with one error, or finds everything done, and can be repeated."""
    tree = tiny.tree(tmp_path / "tree")
    both = [start(tree, "encode") for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes or "busy" in "".join(said), said
    for code, text in zip(codes, said, strict=True):
        if code:
            assert "Unable to acquire lock" in text or "is busy, it is being blocked by" in text
            assert "the same command continues from here" in text and "Traceback" not in text
    again = start(tree, "encode")
    output, _ = again.communicate()
    assert again.returncode == 0, output
    of_chain = hashes(chain.tree)
    assert {path: of_chain[path] for path in hashes(tree)} == hashes(tree)
    assert "data/latents" in hashes(tree)


@pytest.mark.timeout(7200)
def test_two_work_trees_that_share_a_store(tmp_path, chain: Chain, migrated_database: Path):
    """As the clones of two deployments do: one training run and one version, though both compute the same."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "mlflow.db").write_bytes(migrated_database.read_bytes())
    shared = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{store / 'mlflow.db'}",
        "AFTERIMAGE_SCRATCH": str(store / "scratch"),
    }
    trees = [tiny.tree(tmp_path / name) for name in ("one", "two")]
    for tree in trees:
        set_cache = [sys.executable, "-m", "dvc", "cache", "dir", "--local", str(store / "cache")]
        subprocess.run(set_cache, cwd=tree, check=True, capture_output=True)
    both = [start(tree, **shared) for tree in trees]
    for process in both:
        output, _ = process.communicate()
        assert process.returncode == 0, output[-3000:]
    assert hashes(trees[0]) == hashes(trees[1]) == hashes(chain.tree)
    with closing(connect(store / "mlflow.db")) as database:
        kinds = database.execute(
            "SELECT t.value, r.status FROM runs r JOIN tags t USING (run_uuid) WHERE t.key = 'afterimage.kind'"
        ).fetchall()
        versions = database.execute("SELECT name, version FROM model_versions").fetchall()
    assert sorted(kinds) == [("evaluation", "FINISHED"), ("training", "FINISHED")]
    assert versions == [("afterimage-digits", 1)]
    assert os.listdir(store / "cache")
