"""Every parameter is in the key of DVC's run cache, and another resolution changes every artefact."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.stage.cache import _get_cache_hash

from tasks import params
from tasks.params import composition
from tasks.runtime import consistency
from tests.infra.test_wiring import STAGES
from tests.support import tiny
from tests.tasks.test_presets import REQUIRED_OVERRIDES

MAKE = "import json, yaml; json.dump(yaml.safe_load(open('params.yaml'))['image'], open('made.json', 'w'))"


def key_of(stage: str, document: dict[str, Any]) -> str:
    """The key of DVC's run cache for the outputs of `stage` with these parameters."""
    entry = STAGES[stage]
    values = {key: functools.reduce(dict.__getitem__, key.split("."), document) for key in entry["params"]}
    read = {"params.yaml": values}
    deps = [{"path": "a", "hash": "md5", "md5": "0" * 32}]
    return _get_cache_hash(copy.deepcopy({"cmd": entry["cmd"], "deps": deps, "params": read}), key=True)


def leaves(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Key paths of all scalar values of a document."""
    if isinstance(value, dict | list) and value:
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(below, (*where, key))
    else:
        yield where


def changed(document: dict[str, Any], where: tuple[Any, ...]) -> dict[str, Any]:
    other = copy.deepcopy(document)
    holder = other
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = "another value"
    return other


@pytest.mark.parametrize("name", composition.names())
def test_every_parameter_is_in_the_key_of_each_stage_that_reads_it(name):
    document = composition.compose(name, REQUIRED_OVERRIDES.get(name, []))
    readers = [(stage, section) for stage, entry in STAGES.items() for section in entry.get("params", [])]
    sections = {key for key, value in document.items() if isinstance(value, dict)}
    assert {section for _, section in readers if "." not in section} == sections
    for stage, read in readers:  # a section, or one value of another stage's
        before, place = key_of(stage, document), tuple(read.split("."))
        for where in leaves(functools.reduce(dict.__getitem__, place, document), place):
            assert key_of(stage, changed(document, where)) != before, f"{'.'.join(map(str, where))} in {stage}"


def made(folder: Path, **image: int) -> tuple[dict[str, int], str]:
    """Run `dvc repro` of a stage that writes the section `image`; returns the written values and DVC's output."""
    (folder / "params.yaml").write_text(yaml.safe_dump({"image": image}))
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=folder, capture_output=True, text=True, check=True
    )
    return json.loads((folder / "made.json").read_text()), done.stdout


def dvc_folder(folder: Path, cache: Path) -> Path:
    """A work tree with one stage and a shared cache."""
    folder.mkdir()
    stage = {"cmd": f'python -c "{MAKE}"', "deps": ["input"], "params": ["image"], "outs": ["made.json"]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"make": stage}}))
    (folder / "input").write_text("the same in all")
    for command in (["init", "--no-scm", "--quiet"], ["cache", "dir", str(cache)]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_another_resolution_is_made_and_an_old_shared_cache_gives_nothing_back(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    old = dvc_folder(tmp_path / "old", tmp_path / "cache")
    assert made(old, size=16, channels=1)[0] == {"size": 16, "channels": 1}
    # DVC leaves keys named `size` out of the key of its run cache. If this fails, DVC has fixed it.
    wrong, output = made(old, size=32, channels=1)
    assert wrong == {"size": 16, "channels": 1} and "is cached" in output

    clone = dvc_folder(tmp_path / "clone", tmp_path / "cache")
    for resolution in (16, 32):
        right, output = made(clone, resolution=resolution, channels=1)
        assert right == {"resolution": resolution, "channels": 1} and "Running stage" in output
    right, output = made(clone, resolution=16, channels=1)
    assert right["resolution"] == 16 and "is cached" in output


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_chain_at_16_then_at_32(tmp_path, monkeypatch):
    """Every stage that depends on the resolution runs, and every artefact names 32."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    for name in ("MLFLOW_TRACKING_URI", "AFTERIMAGE_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    tiny.tree(tmp_path)
    assert set(repro(tmp_path, 16)) == set(STAGES)
    assert resolutions(tmp_path) == dict.fromkeys(resolutions(tmp_path), 16)
    ran = repro(tmp_path, 32)
    assert set(ran) == set(STAGES) - {"download", "ingest"}  # `validate` checks that the images are large enough
    found = resolutions(tmp_path)
    assert len(found) == 6 and found == dict.fromkeys(found, 32)
    assert json.loads((tmp_path / "outputs/pipeline/unet/config.json").read_text())["sample_size"] == 32
    assert "32 x 32 pixels" in (tmp_path / "outputs/model/README.md").read_text()


def repro(folder: Path, resolution: int) -> list[str]:
    """`dvc repro` with another `image.resolution`; returns the stages that ran."""
    document = params.read(folder / "params.yaml")
    document["image"]["resolution"] = resolution
    document["evaluate"]["allow_small_n"] = True  # the judge of larger images has more features
    (folder / "params.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]


def resolutions(folder: Path) -> dict[str, int]:
    """Artefact -> the resolution in its description."""
    outs = {"codec": "outputs/codec", "encode": "data/latents", "train": "outputs/pipeline", "judge": "outputs/judge"}
    outs |= {"export": "outputs/onnx", "package": "outputs/model"}
    artefacts = {artefact.made_by: artefact for inputs in consistency.INPUTS.values() for artefact in inputs.values()}
    return {
        name: artefact.values(json.loads((folder / outs[name] / artefact.description).read_text()))["image.resolution"]
        for name, artefact in artefacts.items()
    }
