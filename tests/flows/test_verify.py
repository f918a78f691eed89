"""`python -m tasks.verify` and `make reproduce` on a tiny chain with a real store, commit, cache and remote."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from infra import reproduce
from tasks import verify
from tasks.provenance import objects
from tests.support import tiny
from tests.support.commands import call

MODEL = "models:/afterimage-digits/1"


@pytest.fixture(scope="module")
def tree(chain, tmp_path_factory) -> Path:
    """A copy of the tiny work tree, with its MLflow store and DVC cache."""
    return shutil.copytree(chain.tree, tmp_path_factory.mktemp("verify") / "tree", symlinks=True)


@pytest.fixture(autouse=True)
def here(tree, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MLFLOW_TRACKING", "AFTERIMAGE_", "PREFECT_API"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tree)


def test_a_registered_version_is_verified_down_to_its_bytes(tree):
    done = call(verify.main, MODEL)
    assert done.returncode == 0, done.stdout
    assert "✗" not in done.stdout and "every check passed" in done.stdout
    for name in ("model files", "MLflow run", "dvc.lock", "params.yaml", "git commit", "code", "outputs", "data"):
        assert f"✓ {name}: " in done.stdout, done.stdout
    assert "- Prefect run: none was recorded" in done.stdout


def test_unknown_versions_are_one_sentence(tree):
    for model in ("models:/afterimage-digits/9", "models:/nothing@champion", "afterimage-digits"):
        done = call(verify.main, model)
        assert done.returncode == 1
        assert done.stderr.startswith("verify: error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_reproducing_from_the_shared_cache_compares_weights_and_metrics(tree):
    assert reproduce.reproduce(MODEL, share_cache=True) == []


@pytest.mark.slow
def test_every_changed_record_is_a_cross(tree):
    """Bytes of the registered model, an object that only the remote has, and one that nothing has."""
    remote = tree.parent / "remote"
    tiny.run(tree, "dvc", "remote", "add", "--local", "--default", "storage", str(remote))
    tiny.run(tree, "dvc", "push", "--quiet", "outputs/judge", "outputs/codec")
    recorded = {out["path"]: out["md5"] for stage in _lock(tree).values() for out in stage.get("outs", [])}
    for path in ("outputs/judge", "reports/train"):
        objects.in_cache(tree / ".dvc" / "cache", recorded[path]).unlink()
        shutil.rmtree(tree / path)
    (card,) = (tree / "mlruns").rglob("artifacts/model/README.md")
    card.write_text("another card")
    done = call(verify.main, MODEL, "--json")
    assert done.returncode == 1
    crosses = {}
    pending = [json.loads(done.stdout)]
    while pending:
        check = pending.pop()
        pending += check["below"]
        if check["ok"] is False:
            crosses[check["name"]] = check["detail"]
    assert set(crosses) == {"model files", "registered files", "reports/train"}
    assert "content" in crosses["model files"] and "remote storage does not hold it" in crosses["reports/train"]


def _lock(tree: Path) -> dict:
    return yaml.safe_load((tree / "dvc.lock").read_text(encoding="utf-8"))["stages"]


@pytest.mark.slow
def test_reproducing_computes_the_same_weights(tree):
    assert reproduce.reproduce(MODEL, share_cache=False) == []
