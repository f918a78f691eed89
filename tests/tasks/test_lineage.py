"""The lineage of a model version: commit, changes of code and parameters, DVC's lock, and no secret."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from tasks.runtime import lineage


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.hooksPath=", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_lineage_of_a_work_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERIMAGE_FLOW_RUN_ID", "flow-1")
    git(tmp_path, "init", "--quiet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "code.py").write_text("a = 1\n")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {train: {cmd: x}, register: {cmd: y}}\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = lineage.lineage("d")
    assert clean["git"] == {
        "commit": git(tmp_path, "rev-parse", "HEAD"),
        "dirty": False,
        "diff": "",
        "diff_is_cut": False,
        "left_out": {},
    }
    assert clean["dvc"]["stages"] == {"train": {"cmd": "x"}}
    assert clean["prefect_flow_run"] == "flow-1"

    (tmp_path / "dvc.lock").write_text("stages: {register: {cmd: z}, train: {cmd: x}}\n")
    assert lineage.lineage("d") == clean, "the entry of the stage that is running does not count, nor the order"
    (tmp_path / "tasks" / "code.py").write_text("a = 2\n")
    dirty = lineage.lineage("d")
    assert dirty["git"]["dirty"]
    assert "+a = 2" in dirty["git"]["diff"]
    (tmp_path / "tasks" / "code.py").write_text("a = 3\n" * 100_000)
    cut = lineage.lineage("d")["git"]
    assert cut["diff_is_cut"]
    assert lineage.DIFF_CHARACTERS - 10 < len(cut["diff"]) <= lineage.DIFF_CHARACTERS
    assert lineage.tags(dirty)["afterimage.git_dirty"] == "true"


@pytest.fixture
def changed_tree(tmp_path, monkeypatch) -> Path:
    """A work tree with uncommitted changes in code, parameters, settings and notes."""
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "--quiet")
    files = ("tasks/code.py", "tasks/other.py", "params.yaml", ".dvc/config", "notes.txt")
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("first\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "tasks" / "code.py").write_text("steps = 2  # twice\n")
    (tmp_path / "params.yaml").write_text(f"train:\n  steps: 20\n  pin: {'6d958be0' * 8}\n")
    (tmp_path / "tasks" / "other.py").write_text('password = "correct-horse-battery"\n')
    (tmp_path / ".dvc" / "config").write_text("secret_access_key = wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY\n")
    (tmp_path / "notes.txt").write_text("call 555\n")
    return tmp_path


def test_lineage_keeps_code_and_parameters_and_no_secret(changed_tree):
    facts = lineage.lineage("d")["git"]
    assert "+steps = 2" in facts["diff"] and "+  pin: 6d958be0" in facts["diff"]
    assert facts["left_out"] == {
        ".dvc/config": lineage.NOT_CODE,
        "notes.txt": lineage.NOT_CODE,
        "tasks/other.py": "contains a possible secret (Secret Keyword)",
    }
    assert not any(secret in json.dumps(facts) for secret in ("correct-horse", "wJalr", "555"))
    assert (
        lineage.tags(lineage.lineage("d"))["afterimage.git_diff_left_out"] == ".dvc/config, notes.txt, tasks/other.py"
    )


@pytest.mark.parametrize(
    "line",
    [
        "url: http://user:PASSWORD@host/x.zip",
        "url: https://host/x?X-Amz-Signature=6d958be074577803d12ecdefd02955f39262c83c",
        "HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyzABCDEF12",
        "key = 'AKIAIOSFODNN7EXAMPLE'",
        "secret_access_key: wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize("name", ["tasks/code.py", "params.yaml"])
def test_lineage_detects_many_kinds_of_secrets_added_or_removed(changed_tree, line, name):
    (changed_tree / name).write_text(f"a: 1\n{line}\n")
    assert name in lineage.lineage("d")["git"]["left_out"]
    git(changed_tree, "commit", "-qam", "second")
    (changed_tree / name).write_text("a: 1\n")
    facts = lineage.lineage("d")["git"]
    assert list(facts["left_out"]) == [name] and facts["diff"] == ""


def test_lineage_stores_no_diff_without_the_scanner(changed_tree, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "detect_secrets" else find(name))
    facts = lineage.lineage("d")["git"]
    assert facts["diff"] == "" and facts["dirty"]
    assert facts["left_out"]["params.yaml"] == lineage.NO_SCANNER


def test_lineage_without_git_and_without_dvc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("AFTERIMAGE_FLOW_RUN_ID", raising=False)
    facts = lineage.lineage("d")
    assert facts["git"]["commit"] is None
    assert facts["dvc"] == {"stages": None, "sha256": None}
    assert lineage.tags(facts) == {"afterimage.data_sha256": "d"}
