"""Presets: each is complete and valid, `params.yaml` is the default one, and mistakes end in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks import params, preset

ROOT = Path(__file__).resolve().parents[2]
PATH = f"download.path={ROOT / 'tests'}"
OF_THE_README = {"digits", "digits_ddpm", "cifar10_ddpm", "cifar10_tiny", "folder", "hub"}
PICTURES = {"celebahq_ddim64", "celebahq_ldm", "laion_sd", "sdxl_lora"}
TINY = {f"{name}_tiny" for name in PICTURES}
SAID_BY_A_PERSON = {"hub": ["download.hub.repo=owner/name"]} | {
    name: [PATH] for name in {"cifar10_tiny", "folder", "sdxl_lora", *TINY}
}


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tasks.preset", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_presets_of_the_readme_exist():
    assert set(preset.names()) == OF_THE_README | PICTURES | TINY


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_tiny_preset_is_a_small_one_of_its_kind(name):
    large, tiny = preset.compose(name, SAID_BY_A_PERSON.get(name, [])), preset.compose(f"{name}_tiny", [PATH])
    for section, key in (("codec", "kind"), ("codec", "conditioning"), ("evaluate", "sampler"), ("evaluate", "steps")):
        assert large[section][key] == tiny[section][key]
    assert tiny["image"]["size"] == 64 and tiny["codec"]["autoencoder"]["weights"] is None
    assert tiny["train"]["steps"] <= 2000 and tiny["evaluate"]["allow_small_n"]


def test_a_large_preset_takes_pictures_from_a_folder_instead():
    document = preset.compose("celebahq_ddim64", ["source=folder", PATH])
    assert (document["download"]["source"], document["download"]["hub"]["repo"]) == ("folder", None)


@pytest.mark.parametrize("name", preset.names())
def test_every_preset_is_valid_and_survives_writing(name, tmp_path):
    document = preset.compose(name, SAID_BY_A_PERSON.get(name, []))
    assert document["preset"] == name
    file = tmp_path / "params.yaml"
    file.write_text(preset.dump(document, name), encoding="utf-8")
    assert params.load(file).model_dump(mode="json", by_alias=True) == document


def test_base_names_every_parameter():
    """What a preset leaves out is seen in one file, and never comes from a default in the code."""
    base = yaml.safe_load((preset.PRESETS / "base.yaml").read_text(encoding="utf-8"))
    complete = preset.compose("digits", [])
    assert {key: set(value) for key, value in base.items() if isinstance(value, dict)} == {
        key: set(value) for key, value in complete.items() if isinstance(value, dict)
    }


def test_params_yaml_is_the_default_preset():
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert text == preset.dump(preset.compose("digits", []), "digits"), "run: python -m tasks.preset digits"


def test_overrides_of_values_and_of_parts():
    document = preset.compose(
        "folder",
        [
            PATH,
            "conditioning=label",
            "train.learning_rate=2e-4",
            "model.block_out_channels=[16,32]",
            "model.attention=[false,true]",
        ],
    )
    assert document["codec"]["conditioning"] == "label"
    assert document["train"]["condition_dropout"] > 0
    assert document["train"]["learning_rate"] == 2e-4
    assert document["model"]["block_out_channels"] == [16, 32]


@pytest.mark.parametrize("source", sorted(set(preset.parts()["source"]) - {"folder"}))
def test_every_source_of_the_hub_is_valid(source):
    document = preset.compose("hub", [f"source={source}", "download.hub.repo=owner/name"])
    assert document["download"]["source"] in ("hub", "laion")


def test_a_path_in_the_home_folder_and_with_spaces(tmp_path, monkeypatch):
    (tmp_path / "my pictures (1)").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    document = preset.compose("folder", ["download.path=~/my pictures (1)"])
    assert document["download"]["path"] == str(tmp_path / "my pictures (1)")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["digit"], "there is no preset 'digit'; did you mean 'digits'?"),
        (["base"], "there is no preset 'base'"),
        (["digits", "train.stepps=3"], "unknown parameter 'train.stepps'; did you mean 'steps'?"),
        (["digits", "train.steps=many"], "parameter 'train.steps' is 'many'"),
        (["digits", "train"], "'train' is no override"),
        (["digits", "model.attention=["], "the overrides cannot be read"),
        (["digits", "conditioning=labels"], "there is no conditioning 'labels'; did you mean 'label'?"),
        (["digits", "source=celebahq"], "preset 'digits' lets nobody choose its source"),
        (["hub"], "set download.hub.repo"),
        (["digits_ddpm", "evaluate.guidance_scale=2.0"], "guidance needs a condition"),
        (["folder"], "set either download.path"),
        (["folder", "download.path=/nowhere/at/all"], "download.path '/nowhere/at/all' does not exist"),
        (["digits", "image.size=18"], "image.size 18 cannot be halved 2 times"),
    ],
)
def test_mistakes_end_in_one_sentence_and_change_nothing(arguments, sentence, tmp_path):
    target = tmp_path / "params.yaml"
    target.write_text("as it was", encoding="utf-8")
    done = run(*arguments, "--params", str(target))
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.startswith("preset: error: ") and len(done.stderr.strip().splitlines()) == 1
    assert target.read_text(encoding="utf-8") == "as it was"


def test_list_names_each_preset_with_its_purpose():
    lines = run("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == preset.names()
    assert all(len(line.split()) > 5 for line in lines)
