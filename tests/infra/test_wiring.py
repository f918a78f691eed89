"""`dvc.yaml` says what the code does: its deps, params, outs and commands against the code itself."""

from __future__ import annotations

import ast
import importlib
import inspect
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tasks.runtime import stage

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ("tasks", "models")
STAGES: dict[str, dict] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]

# How a stage starts, where things lie, whom it tells: none of it decides which bytes come out, and a stage
# that depended on them would train again for a better error message. What they decide is in `params.yaml`.
PLUMBING = {
    f"tasks/{name}.py"
    for name in (
        "params/__init__",
        *(f"runtime/{name}" for name in ("atomic", "locks", "stage", "tracking", "workspace")),
    )
} | {"models/__init__.py"}


def sources_of(name: str) -> set[str]:
    """Project files that decide what stage `name` writes: what its file imports, and what that imports, and so on."""
    found: set[str] = set()
    waiting = [f"tasks/{name}.py"]
    while waiting:
        file = waiting.pop()
        if file in found or file in PLUMBING or file.endswith("__init__.py"):
            continue
        found.add(file)
        if file.endswith(".py"):
            waiting += read_by(file)
    return found


def read_by(file: str) -> list[str]:
    """Project files that `file` imports, outside of TYPE_CHECKING, or names in order to read them."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    modules = list(imported(tree, package=Path(file).parts[0]))
    files = [f"{module.replace('.', '/')}.py" for module in modules]
    named = [
        str(path.relative_to(ROOT))
        for folder in (*PROJECT, "mlflow")
        for path in (ROOT / folder).rglob("*.*")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == path.name
    ]
    page = file.removesuffix(".py") + ".html"
    return [found for found in [*files, *named, page] if (ROOT / found).is_file()]


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of modules that a syntax tree imports, wherever it does."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        yield from imported(node, package)


def paths(entries: list) -> list[str]:
    """Paths of a list of deps, outs or metrics; an entry with options is a mapping of one key."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def outs_of(name: str) -> list[str]:
    return [path for kind in ("outs", "metrics", "plots") for path in paths(STAGES[name].get(kind, []))]


def function_of(name: str):
    return getattr(importlib.import_module(f"tasks.{name}"), name)


@pytest.mark.parametrize("name", STAGES)
def test_source_files_are_dependencies(name):
    listed = {path for path in paths(STAGES[name]["deps"]) if path.startswith(("tasks/", "models/", "mlflow/"))}
    needed = sources_of(name)
    assert not needed - listed, f"add to deps of stage '{name}' in dvc.yaml: {sorted(needed - listed)}"
    assert not listed - needed, f"remove from deps of stage '{name}' in dvc.yaml: {sorted(listed - needed)}"


@pytest.mark.parametrize("name", STAGES)
def test_params_are_the_sections_that_the_function_reads(name):
    assert sorted(STAGES[name].get("params", [])) == sorted(stage.sections_of(function_of(name)))


@pytest.mark.parametrize("name", STAGES)
def test_command_names_dependencies_and_outs_in_the_order_of_the_function(name):
    python, flag, module, *arguments = shlex.split(STAGES[name]["cmd"])
    assert (python, flag, module) == ("python", "-m", f"tasks.{name}")
    assert len(arguments) == len(stage.paths_of(function_of(name)))
    deps, outs = paths(STAGES[name]["deps"]), outs_of(name)
    assert not set(arguments) - {*deps, *outs}, "an argument that DVC does not know is read or written behind its back"
    assert set(outs) <= set(arguments), "the stage is not told where one of its outs goes"
    data = {path for path in deps if not path.startswith(("tasks/", "models/", "mlflow/", "$"))}
    assert data <= set(arguments), "the stage is not told where one of its inputs is"


def test_each_path_has_one_owner_and_each_input_a_maker():
    made = [path for name in STAGES for path in outs_of(name)]
    assert len(made) == len(set(made))
    for name, entry in STAGES.items():
        for path in paths(entry["deps"]):
            assert path in made or path.startswith("$") or (ROOT / path).is_file(), (
                f"{name} reads {path}, made by nobody"
            )


def test_nothing_that_reads_images_goes_round_the_verdict():
    """Every stage after `validate` depends on the verdict, so that asking for it by name cannot skip the gate."""
    behind = {"codec", "encode", "train", "judge", "evaluate", "visualize", "export", "package"}
    for name in behind:
        assert "data/accepted.json" in paths(STAGES[name]["deps"]), name
        assert "accepted" in inspect.signature(function_of(name)).parameters, name
    assert set(STAGES) - behind == {"download", "ingest", "validate", "register"}  # register reads what they made


def test_mlflow_folder_does_not_shadow_the_package():
    import mlflow

    assert Path(mlflow.__file__).parent != ROOT / "mlflow"
    assert not (ROOT / "mlflow" / "__init__.py").exists()


def test_import_linter_knows_every_stage():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    independent = next(contract["modules"] for contract in contracts if contract["type"] == "independence")
    assert sorted(independent) == sorted(f"tasks.{name}" for name in STAGES)


def test_what_measures_has_no_part_in_what_is_drawn():
    """Another judge re-encodes and retrains nothing: neither its files, nor its parameters, nor its networks lead
    to the pipeline."""
    needed, waiting = set(), ["train"]
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting += [
            other for other in STAGES if other not in needed and set(outs_of(other)) & set(paths(STAGES[name]["deps"]))
        ]
    assert {"codec", "encode"} <= needed and "judge" not in needed
    sections = {section for name in needed for section in STAGES[name].get("params", [])}
    assert "judge" not in sections and "codec" in sections
    code = {path for name in needed for path in paths(STAGES[name]["deps"])}
    assert not {"tasks/judge.py", "models/judges/judge.py", "models/judges/metrics.py"} & code
    for name in ("encode", "train"):  # the codec trains with the same small building blocks, and is the last to
        assert not {"models/judges/clip.py", "models/judges/classifier.py", "models/judges/fit.py"} & set(
            paths(STAGES[name]["deps"])
        )
