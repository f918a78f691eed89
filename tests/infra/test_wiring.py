"""`dvc.yaml` says what the code does: its deps, params, outs and commands against the code itself."""

from __future__ import annotations

import importlib
import inspect
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from tasks.runtime import closure, stage

ROOT = Path(__file__).resolve().parents[2]
STAGES: dict[str, dict] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def paths(entries: list) -> list[str]:
    """Paths of a list of deps, outs or metrics; an entry with options is a mapping of one key."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def outs_of(name: str) -> list[str]:
    return [path for kind in ("outs", "metrics", "plots") for path in paths(STAGES[name].get(kind, []))]


def code_of(name: str) -> list[str]:
    """The code that a stage depends on: files, and packages of which it needs every file."""
    return [path for path in paths(STAGES[name]["deps"]) if path.startswith(("tasks/", "models/", "mlflow/"))]


def files_of(path: str) -> list[str]:
    """`path`, or the files of the package `path` without those that only mark it and those that no code reads."""
    if (ROOT / path).is_file():
        return [path]
    files = [file for file in (ROOT / path).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return [file.relative_to(ROOT).as_posix() for file in files if file.stat().st_size and file.suffix != ".in"]


def function_of(name: str):
    return getattr(importlib.import_module(f"tasks.{name}"), name)


@pytest.mark.parametrize("name", STAGES)
def test_source_files_are_dependencies(name):
    listed = {file for path in code_of(name) for file in files_of(path)}
    needed = set(closure.closure(f"tasks/{name}.py"))
    assert not needed - listed, f"add to deps of stage '{name}' in dvc.yaml: {sorted(needed - listed)}"
    assert not listed - needed, f"remove from deps of stage '{name}' in dvc.yaml: {sorted(listed - needed)}"


def test_the_list_of_dependencies_stays_short():
    later = {"prior", "edit"}
    assert sum(len(code_of(name)) for name in STAGES if name not in later) <= 125
    assert all(len(code_of(name)) <= 15 for name in later)


@pytest.mark.parametrize("name", STAGES)
def test_params_are_the_sections_that_the_function_reads(name):
    assert sorted(STAGES[name].get("params", [])) == sorted(stage.sections_of(function_of(name)))


@pytest.mark.parametrize("name", STAGES)
def test_command_names_dependencies_and_outs_in_the_order_of_the_function(name):
    python, flag, module, *arguments = shlex.split(STAGES[name]["cmd"])
    assert (python, flag, module) == ("python", "-m", f"tasks.{name}")
    assert len(arguments) == len(stage.paths_of(function_of(name)))
    deps, outs = paths(STAGES[name]["deps"]), outs_of(name)
    assert not set(arguments) - {*deps, *outs}, "DVC does not know an argument that is read or written"
    assert set(outs) <= set(arguments), "an out of the stage is not among its arguments"
    data = {path for path in deps if not path.startswith(("tasks/", "models/", "mlflow/", "$"))}
    assert data <= set(arguments), "an input of the stage is not among its arguments"


def test_each_path_has_one_owner_and_each_input_a_maker():
    made = [path for name in STAGES for path in outs_of(name)]
    assert len(made) == len(set(made))
    for name, entry in STAGES.items():
        for path in paths(entry["deps"]):
            assert path in made or path.startswith("$") or (ROOT / path).exists(), (
                f"{name} reads {path}, which no stage makes"
            )


def test_nothing_that_reads_images_goes_round_the_verdict():
    """Every stage after `validate` depends on the verdict, so that asking for it by name cannot skip the gate."""
    behind = {"codec", "encode", "prior", "train", "judge", "evaluate", "edit", "visualize", "export", "package"}
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
    """Another judge causes no encoding and no training.

    Neither the files, nor the parameters, nor the networks of the judge are inputs of the pipeline.
    """
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
        listed = set(paths(STAGES[name]["deps"]))
        assert not {f"models/judges/{part}.py" for part in ("clip", "classifier", "fit")} & listed
