"""Presets: each is complete and valid, `params.yaml` is the default one, and mistakes give one sentence."""

from __future__ import annotations

import difflib
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks import params, preset
from tasks.params import composition
from tests.support import commands, cpu

ROOT = Path(__file__).resolve().parents[2]
PATH = f"download.path={ROOT / 'tests'}"
OF_THE_README = {
    "digits", "digits_ddpm", "digits_dit", "digits_ect", "cifar10_ddpm", "cifar10_ddpm_b512", "cifar10_ect",
    "cifar10_flow", "cifar10_tiny", "imagenet_dit_b2", "folder", "hub",
}  # fmt: skip
PICTURES = {"celebahq_ddim64", "celebahq_ldm", "laion_sd", "sdxl_lora"}
CONTROLLED = {"digits_control_tiny", "flickr_control_tiny", "sd15_control"}
FLOWS = {"celebahq_ldm_flow"}
DREAMBOOTH = {"dreambooth_base_tiny", "dreambooth_tiny", "sd15_dreambooth", "sd15_style_lora", "sdxl_dreambooth_lora"}
TINY = {f"{name}_tiny" for name in PICTURES}
REQUIRED_OVERRIDES = {"hub": ["download.hub.repo=owner/name"]} | {
    name: [PATH]
    for name in {"cifar10_tiny", "folder", "sdxl_lora", "flickr_control_tiny", "sd15_control", *TINY, *DREAMBOOTH}
}
REQUIRED_OVERRIDES["dreambooth_tiny"] = [PATH, f"train.init_from={ROOT / 'tests'}"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return commands.call(preset.main, *arguments)


@functools.cache
def composed(name: str) -> dict[str, Any]:
    """The preset with the overrides that it requires; read it only."""
    return composition.compose(name, REQUIRED_OVERRIDES.get(name, []))


def test_the_presets_of_the_readme_exist():
    assert set(composition.names()) == OF_THE_README | PICTURES | TINY | FLOWS | CONTROLLED | DREAMBOOTH


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_tiny_preset_is_a_small_one_of_its_kind(name):
    large, tiny = composed(name), composed(f"{name}_tiny")
    for section, key in (("codec", "kind"), ("codec", "conditioning"), ("evaluate", "sampler"), ("evaluate", "steps")):
        assert large[section][key] == tiny[section][key]
    assert tiny["image"]["resolution"] == 64 and tiny["codec"]["autoencoder"]["weights"] is None
    assert tiny["train"]["steps"] <= 2000 and tiny["evaluate"]["allow_small_n"]


def test_a_large_preset_takes_pictures_from_a_folder_instead():
    document = composition.compose("celebahq_ddim64", ["source=folder", PATH])
    assert (document["download"]["source"], document["download"]["hub"]["repo"]) == ("folder", None)


@pytest.mark.parametrize("name", composition.names())
def test_every_preset_is_valid_and_survives_writing(name, tmp_path):
    document = composed(name)
    assert document["preset"] == name
    file = tmp_path / "params.yaml"
    file.write_text(preset.dump(document, name), encoding="utf-8")
    assert params.load(file).model_dump(mode="json", by_alias=True) == document


@pytest.mark.parametrize("name", [name for name in composition.names() if composed(name)["train"]["weights"]])
def test_published_weights_are_continued_by_the_recipe_that_trained_them(name):
    """A preset that others build on may train faster from scratch; its steps would destroy published weights."""
    document = composed(name)
    assert document["train"]["optimizer"] == "adamw" and document["train"]["learning_rate"] <= 1e-4
    assert document["diffusion"]["timestep_density"] == "uniform"


DROPPED_BY_DVC = {"size", "nfiles"}
"""Names that DVC's run cache drops from its key at any depth: it would restore the outputs of another value."""


def keys_of(value: object) -> Iterator[str]:
    """Every key of a parsed document, at any depth."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield key
            yield from keys_of(below)
    elif isinstance(value, list):
        for below in value:
            yield from keys_of(below)


@pytest.mark.parametrize("name", composition.names())
def test_no_parameter_has_a_name_that_dvc_drops(name):
    document = composed(name)
    assert not DROPPED_BY_DVC & set(keys_of(document))


def test_no_section_has_a_field_that_dvc_drops():
    def models(kind: type[params.Section]) -> Iterator[type]:
        yield kind
        for below in kind.__subclasses__():
            yield from models(below)

    for model in models(params.Section):
        names = {field.alias or name for name, field in model.model_fields.items()}
        assert not DROPPED_BY_DVC & names, model.__name__


LONG = "several licences that are named here, one after the other: as many as do not go on one line of a file"


@pytest.mark.parametrize(
    ("name", "others"),
    [
        *((name, []) for name in composition.names()),
        *((name, [f"download.licence='{LONG}'", "train.learning_rate=1e-6"]) for name in ("digits", "laion_sd")),
    ],
)
def test_dvc_changes_one_line_of_it(name, others, tmp_path):
    """What `dvc exp run -S` calls rewrites the whole file: in its own style only the changed value differs."""
    from dvc.utils.hydra import apply_overrides

    file = tmp_path / "params.yaml"
    document = composition.compose(name, [*REQUIRED_OVERRIDES.get(name, []), *others]) if others else composed(name)
    text = preset.dump(document, name)
    file.write_text(text, encoding="utf-8")
    apply_overrides(file, ["train.learning_rate=0.0123"])
    removed, added = different_lines(text, file.read_text(encoding="utf-8"))
    assert len(removed) == 1 and added == ["  learning_rate: 0.0123"]


def different_lines(before: str, after: str) -> tuple[list[str], list[str]]:
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return tuple([line[2:] for line in lines if line[0] == sign] for sign in "-+")


def test_base_names_every_parameter():
    """The parameters that a preset does not set are in base.yaml, and never come from a default in the code."""
    base = yaml.safe_load((composition.PRESETS / "base.yaml").read_text(encoding="utf-8"))
    complete = composed("digits")
    assert {key: set(value) for key, value in base.items() if isinstance(value, dict)} == {
        key: set(value) for key, value in complete.items() if isinstance(value, dict)
    }


def test_params_yaml_is_the_default_preset():
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert text == preset.dump(composed("digits"), "digits"), "run: python -m tasks.preset digits"


def test_overrides_of_values_and_of_parts():
    document = composition.compose(
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


@pytest.mark.parametrize("source", sorted(set(composition.parts()["source"]) - {"folder"}))
def test_every_source_of_the_hub_is_valid(source):
    document = composition.compose("hub", [f"source={source}", "download.hub.repo=owner/name"])
    assert document["download"]["source"] in ("hub", "laion")


@pytest.mark.parametrize(
    "name", ["pics #1", "pics ", " pics", "a\tb", "2023", "null", "a: b", "~x", "[1]", "'quoted'", "1e3", "no", "a=b"]
)
def test_a_path_is_taken_as_it_was_typed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    for path in (name, str(tmp_path / name)):
        document = composition.compose("folder", [f"download.path={path}"])
        Path("params.yaml").write_text(preset.dump(document, "folder"))
        assert params.load(Path("params.yaml")).download.path == path


def test_a_path_in_the_home_folder_and_with_spaces(tmp_path, monkeypatch):
    (tmp_path / "my pictures (1)").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    document = composition.compose("folder", ["download.path=~/my pictures (1)"])
    assert document["download"]["path"] == str(tmp_path / "my pictures (1)")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["digit"], "there is no preset 'digit'; did you mean 'digits'?"),
        (["base"], "there is no preset 'base'"),
        (["digits", "train.stepps=3"], "unknown parameter 'train.stepps'; did you mean 'steps'?"),
        (
            ["digits", "stepps=3"],
            "unknown parameter 'stepps'; did you mean prior.steps or train.steps or evaluate.",
        ),
        (["digits", "train.n_distance=3"], "unknown parameter 'train.n_distance'; did you mean evaluate.n_distance?"),
        (["digits", "sorce=folder"], "unknown part 'sorce'; did you mean 'source'?"),
        (["digits", "download=3"], "'download' is a section and not a value; set one of its keys, such as download.so"),
        (
            ["digits", "train.init_from=/no/where"],
            "train.init_from '/no/where' does not exist; give the path of a folder",
        ),
        (["digits", "validate.baseline=/no/where"], "validate.baseline '/no/where' does not exist; give the path of a"),
        (["digits", "train.steps=many"], "parameter 'train.steps' is 'many'"),
        (["digits", "train"], "'train' is not an override"),
        (["digits", "model.attention=["], "the overrides cannot be read"),
        (["digits", "conditioning=labels"], "there is no conditioning 'labels'; did you mean 'label'?"),
        (["digits", "source=celebahq"], "preset 'digits' does not support overriding source"),
        (["hub"], "set download.hub.repo"),
        (["digits_ddpm", "evaluate.guidance_scale=2.0"], "guidance needs a condition"),
        (["folder"], "set either download.path"),
        (["folder", "download.path=~nobody-of-that-name/x"], "in the home folder of an unknown user"),
        (["folder", "download.path=/d/${y}"], "'dvc exp run' reads as a reference"),
        (["folder", "download.path=/nowhere/at/all"], "download.path '/nowhere/at/all' does not exist"),
        (["digits", "image.resolution=18"], "image.resolution 18 is no multiple of 4"),
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
    assert [line.split()[0] for line in lines] == composition.names()
    assert all(len(line.split()) > 5 for line in lines)


def test_what_was_edited_by_hand_is_kept_beside_it(tmp_path):
    target = tmp_path / "params.yaml"
    written = run("digits", "train.steps=600", "--params", str(target)).stdout
    assert ".bak" not in written and " -> " not in written
    target.write_text(target.read_text().replace("batch_size: 64", "batch_size: 48", 1) + "# mine\n")
    edited = target.read_text()
    done = run("digits", "train.seed=5", "--params", str(target)).stdout.splitlines()
    assert done[0] == f"preset: {target} had been edited; the old one is kept as {target}.bak"
    assert {"preset: train.steps: 600 -> 400", "preset: train.seed: 0 -> 5"} < set(done)
    assert sum(" -> " in line for line in done) == 3
    assert Path(f"{target}.bak").read_text() == edited
    # as written by a preset, so nothing is lost with it
    assert ".bak" not in run("digits", "--params", str(target)).stdout
    target.write_text(edited)
    assert f"kept as {target}.bak" in run("digits", "--params", str(target)).stdout
    target.write_text("train: [")
    assert f"kept as {target}.bak2" in run("digits", "--params", str(target)).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml", "params.yaml.bak", "params.yaml.bak2"]


def test_the_kept_files_are_ignored_by_git(tmp_path):
    command = ["git", "check-ignore", "params.yaml.bak", "params.yaml.bak2"]
    assert len(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()) == 2


def gpu_presets() -> list[str]:
    folder = ROOT / "tasks" / "presets"
    return [path.stem for path in sorted(folder.glob("*.yaml")) if "For a GPU" in path.read_text(encoding="utf-8")]


FULL_PRECISION = {"cifar10_ect"}
"""Presets whose network computes in float32: the rounding of bf16 is as large as what consistency tuning compares."""


def test_there_are_presets_for_a_gpu():
    assert len(gpu_presets()) > 10 and set(gpu_presets()) > FULL_PRECISION


@pytest.mark.parametrize("name", gpu_presets())
def test_presets_for_a_gpu_use_it(name):
    """Compiled, in bf16 and NHWC; only convolutions have a memory format, and pixels and labels are not encoded."""
    document = composed(name)
    model, codec, train = (document[section] for section in ("model", "codec", "train"))
    lower = "no" if name in FULL_PRECISION else "bf16"
    encoded = codec["kind"] == "autoencoder" or codec["conditioning"] == "text"
    assert train["compile"] == document["evaluate"]["compile"] == "gpu"
    assert train["channels_last"] is (model["architecture"] == "unet")
    assert train["precision"] == document["evaluate"]["precision"] == lower
    assert document["encode"]["precision"] == ("bf16" if encoded else "no")
    assert document["encode"]["workers"] == document["ingest"]["workers"] == "auto"
    # An adapter is so small that every step may update its averages; 800 steps of std-0.10 would suffer from 8.
    assert train["ema_every"] == (1 if model["lora_rank"] else 4 if name == "sd15_dreambooth" else 8)


def test_activations_are_computed_again_only_where_memory_needs_it():
    """Stable Diffusion decides by the free memory; SDXL, and a ControlNet beside its U-Net, always do so."""
    found = {name: composed(name)["train"]["gradient_checkpointing"] for name in gpu_presets()}
    assert {name: value for name, value in found.items() if value is not False} == {
        "laion_sd": "auto",
        "sd15_dreambooth": "auto",
        "sd15_style_lora": "auto",
        "sd15_control": True,
        "sdxl_lora": True,
        "sdxl_dreambooth_lora": True,
    }


@pytest.mark.parametrize("name", sorted(set(composition.names()) - set(gpu_presets())))
def test_presets_for_a_cpu_compute_in_float32(name):
    document = composed(name)
    assert {document[section]["precision"] for section in ("encode", "train", "evaluate")} == {"no"}
    assert document["train"]["compile"] is document["evaluate"]["compile"] is False


@pytest.mark.parametrize("name", composition.names())
def test_a_preset_draws_in_one_precision(name):
    """Class images are drawn only if there is a subject."""
    preset = composed(name)
    sections = ["evaluate", "edit", "visualize", *(["prior"] if preset["prior"]["instance_prompt"] else [])]
    expected = "bf16" if name in gpu_presets() and name not in FULL_PRECISION else "no"
    assert {section: preset[section]["precision"] for section in sections} == dict.fromkeys(sections, expected)


def test_larger_batches_see_as_many_images():
    small, large = composed("cifar10_ddpm"), composed("cifar10_ddpm_b512")
    for key in ("steps", "warmup_steps", "log_every", "checkpoint_every", "sample_every"):
        assert small["train"][key] * small["train"]["batch_size"] == large["train"][key] * large["train"]["batch_size"]
    assert large["train"]["learning_rate"] == 2 * small["train"]["learning_rate"]


def test_of_many_changes_some_are_shown(tmp_path):
    target = tmp_path / "params.yaml"
    run("digits", "--params", str(target))
    lines = run("cifar10_ddpm", "--params", str(target)).stdout.splitlines()
    assert sum(" -> " in line for line in lines) == preset.SHOWN_CHANGES
    assert lines[-2].startswith("preset: and ") and lines[-2].endswith(" more")


def test_it_answers_at_once(tmp_path):
    """As a process: what it imports counts."""
    with cpu.at_most(2 * 2):
        for overrides in ([], ["train.seed=1"]):
            arguments = ["digits", *overrides, "--params", str(tmp_path / "params.yaml")]
            assert subprocess.run([sys.executable, "-m", "tasks.preset", *arguments], cwd=ROOT).returncode == 0


def test_the_tiny_dreambooth_has_the_codec_and_the_network_of_its_base():
    base, tuned = composed("dreambooth_base_tiny"), composed("dreambooth_tiny")
    assert all(base[name] == tuned[name] for name in ("ingest", "image", "codec", "encode", "model", "diffusion"))
    assert base["encode"]["leave_out"] == [tuned["prior"]["subject"]] and base["prior"]["instance_prompt"] is None
