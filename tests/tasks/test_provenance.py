"""The lineage of a version: DVC's hashes computed without DVC, where outputs are found, and how the result reads."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from tasks.provenance import objects, outputs, prefect_run, source
from tasks.provenance.checks import Check, lines
from tasks.provenance.outputs import Outputs, Places
from tasks.runtime.errors import StageError
from tests.support import tiny
from tests.support.data_inputs import serving


def store(cache, content: bytes, suffix: str = "") -> str:
    """Write an object as DVC does; returns its name."""
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest() + suffix
    path = objects.in_cache(cache, md5)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


@pytest.fixture
def kept(tmp_path) -> Outputs:
    """A file and a folder in a cache, as a recorded lock names them; the work tree is empty."""
    cache = tmp_path / "cache"
    files = {name: store(cache, name.encode()) for name in ("a.txt", "b/c.txt")}
    entries = [{"md5": md5, "relpath": name} for name, md5 in files.items()]
    folder = store(cache, json.dumps(entries, sort_keys=True).encode(), objects.FOLDER)
    (tmp_path / "root").mkdir()
    recorded = {"one.txt": store(cache, b"one"), "folder": folder}
    return Outputs(recorded, Places(tmp_path / "root", cache), tmp_path / "fetched")


def test_hashes_are_those_of_dvc(tmp_path):
    tree = tmp_path / "tree"
    (tree / "data" / "__pycache__").mkdir(parents=True)
    for name in ("z.txt", "a.txt", "B.txt", "ä.txt"):
        (tree / "data" / name).write_text(name)
    (tree / "data" / "__pycache__" / "x.pyc").write_text("compiled")
    (tree / ".dvcignore").write_text("__pycache__\n")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tree, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=tree, check=True)
    md5 = objects.path_md5(tree / "data")
    assert f"md5: {md5}" in (tree / "data.dvc").read_text()
    assert objects.require(tree / ".dvc" / "cache", md5) == 4


def test_outputs_in_the_cache(kept):
    assert kept.check(None).passed
    assert kept.found == {"one.txt": "cache", "folder": "cache"}
    assert kept.read("folder", "b/c.txt") == b"b/c.txt"


def test_a_damaged_object_is_a_cross_with_its_remedy(kept):
    path = objects.in_cache(
        kept.places.cache, objects.read_listing(kept.places.cache, kept.recorded["folder"])["a.txt"]
    )
    path.write_bytes(b"other")
    result = kept.check(None)
    assert not result.passed
    (failed,) = result.failures()
    assert failed.name == "folder" and str(path) in failed.detail and "dvc fetch folder" in failed.detail
    with pytest.raises(StageError, match="folder was not found"):
        kept.read("folder", "a.txt")


def test_a_missing_object_is_looked_for_in_the_work_tree(kept):
    objects.in_cache(kept.places.cache, kept.recorded["one.txt"]).unlink()
    (failed,) = kept.check(None).failures()
    assert failed.detail == "neither in the cache nor in the work tree; no DVC remote is configured"
    (kept.places.root / "one.txt").write_bytes(b"two")
    assert not kept.check(None).passed
    (kept.places.root / "one.txt").write_bytes(b"one")
    assert kept.check(None).passed and kept.found["one.txt"] == "work tree"


def test_recorded_changes_are_applied_to_the_commit(tmp_path, monkeypatch):
    """Also a diff whose last line is an empty line of context."""
    from tasks.runtime import lineage

    root = tmp_path / "root"
    (root / "tasks").mkdir(parents=True)
    tiny.git(tmp_path, "init", "--quiet", str(root))
    code = root / "tasks" / "code.py"
    code.write_text("a = 1\n\n\n\n")
    tiny.git(root, "add", ".")
    tiny.git(root, "commit", "-qm", "first")
    code.write_text("a = 2\n\n\n\n")
    monkeypatch.chdir(root)
    recorded = lineage.lineage("d")["git"]
    source.check_out(root, recorded["commit"], tmp_path / "clone")
    source.apply_changes(tmp_path / "clone", recorded)
    assert (tmp_path / "clone" / "tasks" / "code.py").read_text() == code.read_text()
    with pytest.raises(StageError, match="git cat-file failed"):
        source.check_out(root, "0" * 40, tmp_path / "none")


def test_the_tree_has_a_mark_for_each_check():
    below = [Check("run", True, "there", [Check("lock", False, "differs")]), Check("flow", None, "none")]
    top = Check("model", True, "version 1", below)
    assert list(lines(top)) == ["✓ model: version 1", "├─ ✓ run: there", "│  └─ ✗ lock: differs", "└─ - flow: none"]
    assert list(lines(top, "ascii"))[2] == "|  `- FAILED lock: differs"
    assert not top.passed and [check.name for check in top.failures()] == ["lock"]
    assert json.loads(json.dumps(top.to_json()))["below"][0]["below"][0]["ok"] is False


def test_the_flow_run_is_looked_up(monkeypatch):
    with serving() as site:
        monkeypatch.setenv("PREFECT_API_URL", f"{site.address}/api")
        site.files["/api/flow_runs/abc"] = json.dumps({"name": "digits", "state_name": "Completed"}).encode()
        assert prefect_run.check("abc").ok is True
        assert prefect_run.check("def").ok is False
    monkeypatch.delenv("PREFECT_API_URL")
    assert prefect_run.check("abc").ok is None and prefect_run.check(None).ok is None


def test_the_state_is_written_for_dvc(tmp_path):
    outputs.write_state(tmp_path, {"a": {"cmd": "x"}}, "train: {}\n")
    assert (tmp_path / "dvc.lock").read_text().startswith("schema: '2.0'\nstages:")
