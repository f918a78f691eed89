"""The diagram of docs/architecture.md against the imports of the code."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

from infra import architecture

ROOT = Path(__file__).resolve().parents[2]


def test_the_diagram_shows_the_imports_of_the_code():
    command = [sys.executable, "-m", "infra.architecture", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of four layers in which `flows` imports a package of `tasks`."""
    for folder in ("infra", "flows", "tasks/runtime", "models"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    for module in ("tasks/__init__.py", "models/pipeline.py"):
        (tmp_path / module).touch()
    (tmp_path / "tasks" / "runtime" / "stage.py").touch()
    (tmp_path / "flows" / "chain.py").write_text("from tasks.runtime import stage\n")
    (tmp_path / "docs").mkdir()
    document = f"# Architecture\n\n{architecture.BEGIN}\n{architecture.END}\n"
    (tmp_path / architecture.DOCUMENT).write_text(document)
    return tmp_path


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command on the packages of `project`, not on this project's."""
    script = (
        f"import importlib.util, sys; sys.path.insert(0, {str(project)!r}); sys.argv[1:] = {list(arguments)!r}\n"
        f"spec = importlib.util.spec_from_file_location('architecture', {architecture.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); sys.exit(module.main())"
    )
    command = [sys.executable, "-I", "-c", script]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


def test_a_new_import_makes_the_diagram_out_of_date(project: Path):
    assert run(project).returncode == 0
    assert "  flows --> tasks_runtime\n" in (project / architecture.DOCUMENT).read_text()
    assert run(project, "--check").returncode == 0
    (project / "tasks" / "runtime" / "stage.py").write_text("def f():\n    from models import pipeline\n")
    done = run(project, "--check")
    assert done.returncode == 1
    assert "is out of date; run 'python -m infra.architecture'" in done.stderr
    assert run(project).returncode == 0
    assert "  tasks_runtime --> models\n" in (project / architecture.DOCUMENT).read_text()


def test_an_import_for_types_only_is_no_arrow(project: Path):
    lines = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from models import pipeline\n"
    (project / "tasks" / "runtime" / "stage.py").write_text(lines)
    assert run(project).returncode == 0
    assert "--> models" not in (project / architecture.DOCUMENT).read_text()


def test_every_package_and_data_file_is_installed():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    markers = [marker for layer in architecture.LAYERS for marker in (ROOT / layer).rglob("__init__.py")]
    assert sorted(named["packages"]) == sorted(".".join(path.parent.relative_to(ROOT).parts) for path in markers)
    assert [pattern for pattern in named["package-data"]["tasks"] if not any((ROOT / "tasks").glob(pattern))] == []
    pages = {path.relative_to(ROOT / "tasks").as_posix() for path in (ROOT / "tasks").rglob("*.html")}
    assert pages <= set(named["package-data"]["tasks"])


def test_flows_import_how_a_stage_runs_parameters_presets_and_sweeps_alone(monkeypatch):
    """A list of what is allowed, so that a new package needs no entry; import-linter's contract lists the others."""
    monkeypatch.chdir(ROOT)
    graph = grimp.build_graph(*architecture.LAYERS, exclude_type_checking_imports=True, cache_dir=None)
    inside = {"flows", *graph.find_descendants("flows")}
    imported = {name for module in inside for name in graph.find_modules_directly_imported_by(module)} - inside
    allowed = ("tasks", "tasks.params", "tasks.runtime", "tasks.preset", "tasks.sweeps")
    assert {name for name in imported if ".".join(name.split(".")[:2]) not in allowed} == set()
    assert any(name.startswith("tasks.runtime.") for name in imported)
