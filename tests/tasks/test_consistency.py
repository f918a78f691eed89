"""Inputs that were made with other parameters are refused, even if DVC considers them up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks import params
from tasks.runtime import atomic, consistency, stage
from tasks.runtime.errors import StageError
from tests.infra.test_wiring import STAGES, function_of
from tests.support.train_inputs import ROOT, run, write_inputs, write_params

PARAMS = params.load(ROOT / "params.yaml")
IMAGE = {"size": 16, "channels": 1}
"""Descriptions of the digits preset."""
DESCRIBED: dict[str, dict[str, Any]] = {
    "codec": {**IMAGE, "kind": "identity", "conditioning": "label"},
    "encode": {"image": IMAGE, "codec": "identity", "conditioning": "label"},
    "train": {**IMAGE, "latent": None, "conditioning": "label"},
    "judge": {"image": IMAGE},
    "export": {**IMAGE, "latent": None, "conditioning": "label"},
    "package": {**IMAGE, "latent": None, "conditioning": "label"},
}
READERS = [(name, argument) for name, arguments in consistency.INPUTS.items() for argument in arguments]
CHANGES = [{"size": 32}, {"channels": 3}, {"conditioning": "none"}]


def described_keys(name: str, argument: str) -> set[str]:
    """Changes of the description of an input; a judge has no conditioning."""
    described = DESCRIBED[consistency.INPUTS[name][argument].made_by]
    return {*IMAGE, *described}


def written(folder: Path, name: str, changes: dict[str, Any] | None = None) -> dict[str, Path]:
    """The inputs of stage `name` with the descriptions of the digits, and `changes`."""
    paths = {}
    for argument, artefact in consistency.INPUTS[name].items():
        described = json.loads(json.dumps(DESCRIBED[artefact.made_by]))
        (described.get("image") or described).update({k: v for k, v in (changes or {}).items() if k in IMAGE})
        described.update({k: v for k, v in (changes or {}).items() if k in described})
        paths[argument] = folder / argument
        atomic.write_json(paths[argument] / artefact.description, described)
    return paths


@pytest.mark.parametrize("name", consistency.INPUTS)
def test_inputs_of_the_requested_parameters_are_accepted(name, tmp_path):
    consistency.require(name, written(tmp_path, name), PARAMS)
    consistency.require(name, dict.fromkeys(consistency.INPUTS[name], tmp_path / "missing"), PARAMS)


@pytest.mark.parametrize(
    ("name", "argument", "changes"),
    [(*reader, changes) for reader in READERS for changes in CHANGES if set(changes) <= described_keys(*reader)],
)
def test_inputs_of_other_parameters_are_refused(name, argument, changes, tmp_path):
    artefact = consistency.INPUTS[name][argument]
    paths = written(tmp_path / "right", name) | {argument: written(tmp_path / "wrong", name, changes)[argument]}
    with pytest.raises(StageError) as raised:
        consistency.require(name, paths, PARAMS)
    key, wrong, right = {
        "size": ("image.resolution", 32, 16),
        "channels": ("image.channels", 3, 1),
        "conditioning": ("codec.conditioning", "none", "label"),
    }[next(iter(changes))]
    assert f"was made for {key} {wrong} and not {right}" in str(raised.value)
    assert f"run 'dvc repro -f -s {artefact.made_by}'" in str(raised.value)


@pytest.mark.parametrize("name", ["evaluate", "visualize"])
def test_autoguidance_needs_a_pipeline_with_a_guide(name, tmp_path):
    document = params.read(ROOT / "params.yaml")
    document["train"]["guide_step"], document[name]["guidance"] = 100, "auto"
    asked = params.parse(document)
    paths = written(tmp_path, name)
    description = paths["pipeline"] / "afterimage.json"
    atomic.write_json(description, {**DESCRIBED["train"], "files": {"unet/config.json": ""}})
    with pytest.raises(StageError) as raised:
        consistency.require(name, paths, asked)
    assert f"pipeline has no guide for {name}.guidance 'auto'; run 'dvc repro -f -s train'" in str(raised.value)
    consistency.require(name, paths, PARAMS)
    atomic.write_json(description, {**DESCRIBED["train"], "files": {"guide/config.json": ""}})
    consistency.require(name, paths, asked)


def test_every_stage_that_reads_such_an_input_compares_it():
    """By the folders that `dvc.yaml` names, so that a new reader cannot be forgotten."""
    makers = {"outputs/codec": "codec", "data/latents": "encode", "outputs/pipeline": "train"}
    makers |= {"outputs/judge": "judge", "outputs/onnx": "export", "outputs/model": "package"}
    for name, entry in STAGES.items():
        arguments = dict(zip(stage.paths_of(function_of(name)), entry["cmd"].split()[3:], strict=True))
        deps = [dep for dep in entry["deps"] if isinstance(dep, str)]
        reads = {argument: makers[path] for argument, path in arguments.items() if path in makers and path in deps}
        compared = {argument: artefact.made_by for argument, artefact in consistency.INPUTS.get(name, {}).items()}
        assert compared == reads, name


def test_the_command_refuses_before_it_begins(tmp_path, migrated_database):
    write_inputs(tmp_path)
    write_params(tmp_path)
    document = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(document.replace("resolution: 8", "resolution: 32"))
    done = run(tmp_path, migrated_database)
    assert done.returncode == stage.FAILED
    assert done.stderr.strip().splitlines()[-1].startswith("train: error: ")
    assert "codec was made for image.resolution 8 and not 32; run 'dvc repro -f -s codec'" in done.stderr
    assert not (tmp_path / "scratch" / "train").exists()
