"""`params.yaml`: strict types, unknown keys, and combinations that cannot work, each with one sentence."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from models.noise import samplers
from tasks import params
from tasks.params import section

ROOT = Path(__file__).resolve().parents[2]
DIGITS: dict[str, Any] = params.read(ROOT / "params.yaml")


def changed(**values: Any) -> dict[str, Any]:
    """The default parameters with `section__key=value` replaced."""
    document = copy.deepcopy(DIGITS)
    for where, value in values.items():
        section, key = where.split("__")
        document[section][key] = value
    return document


def test_defaults_are_valid_and_frozen():
    loaded = params.load(ROOT / "params.yaml")
    assert loaded.train.steps == DIGITS["train"]["steps"]
    with pytest.raises(ValueError, match="frozen"):
        loaded.train.steps = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"train__learning_rte": 0.1}, "unknown parameter 'train.learning_rte'; did you mean 'learning_rate'?"),
        ({"train__steps": "500"}, "parameter 'train.steps' is '500'"),
        ({"train__steps": 500.0}, "parameter 'train.steps' is 500.0"),
        ({"train__horizontal_flip": 1}, "parameter 'train.horizontal_flip' is 1"),
        ({"train__precision": False}, "parameter 'train.precision' is False"),
        ({"train__steps": 0}, "parameter 'train.steps' is 0"),
        ({"train__warmup_steps": 500}, "train.warmup_steps 500 leaves nothing of train.steps 400"),
        ({"train__gradient_accumulation": 3}, "train.gradient_accumulation must divide train.batch_size"),
        ({"train__condition_dropout": 0.0}, "set train.condition_dropout above 0"),
        ({"train__condition_dropout": 1.0}, "train.condition_dropout 1 never shows the network its condition"),
        ({"train__clip_norm": float("inf")}, "parameter 'train.clip_norm' is inf: input should be a finite number"),
        ({"model__dropout": 1.0}, "parameter 'model.dropout' is 1.0"),
        ({"evaluate__seed": -1}, "parameter 'evaluate.seed' is -1"),
        ({"model__attention": [False, True]}, "model.attention has 2 flags for 3 resolutions"),
        ({"model__norm_num_groups": 7}, "model.norm_num_groups 7 does not divide"),
        ({"model__attention_head_dim": 5}, "model.attention_head_dim 5 does not divide"),
        ({"image__resolution": 18}, "image.resolution 18 is no multiple of 4"),
        ({"image__channels": 2}, "parameter 'image.channels' is 2"),
        ({"diffusion__schedule": "cosin"}, "parameter 'diffusion.schedule' is 'cosin'"),
        (
            {"diffusion__prediction": "epsilon"},
            "'epsilon' does not fit diffusion.schedule 'rectified_flow'; set it to 'fl",
        ),
        (
            {"diffusion__schedule": "cosine"},
            "'flow_prediction' does not fit diffusion.schedule 'cosine'; set it to 'eps",
        ),
        ({"diffusion__zero_terminal_snr": True}, "'rectified_flow' begins at pure noise anyway: set it to false"),
        (
            {"diffusion__loss_weighting": "min_snr"},
            "'min_snr' gives pure noise, where a rectified flow begins, a weight",
        ),
        (
            {"diffusion__timestep_density": "uniform", "diffusion__density_std": 2.0},
            "not read by diffusion.timestep_dens",
        ),
        ({"diffusion__shift": 0.0}, "parameter 'diffusion.shift' is 0.0"),
        (
            {"evaluate__sampler": "ddim"},
            "evaluate.sampler 'ddim' does not sample diffusion.schedule 'rectified_flow'; us",
        ),
        ({"visualize__sampler": "ddpm"}, "use one of: euler, heun, dpm_solver_pp_2m"),
        ({"train__guide_step": 500}, "train.guide_step 500 is not before the end, train.steps 400; lower it"),
        ({"codec__conditioning": "none"}, "guidance needs a condition"),
        (
            {"evaluate__guidance": "auto"},
            "evaluate.guidance 'auto' compares with the weights of train.guide_step, which",
        ),
        ({"visualize__guidance": "auto"}, "set it to an early step, or visualize.guidance to 'classifier_free'"),
        (
            {"train__guide_step": 5, "visualize__guidance": "auto", "visualize__guidance_scales": [1.0]},
            "visualize.guidance 'auto' needs a scale, and scale 1 is no guidance",
        ),
        ({"train__guide_step": 500}, "train.guide_step 500 is not before the end"),
        (
            {"codec__kind": "autoencoder", "train__weights": "a/b", "train__pin": "0" * 40},
            "name that in codec.autoencoder.weights and set codec.autoencoder.scaling to 'published'",
        ),
        ({"codec__conditioning": "text", "train__weights": "a/b", "train__pin": "0" * 40}, "in codec.text.weights"),
        ({"ingest__caption_templates": ["no place"]}, "exactly one '{}'"),
        ({"download__source": "folder"}, "set either download.path"),
        ({"download__path": "tests"}, "download.path is only read by download.source 'folder' and 'laion'"),
        ({"download__source": "hub"}, "set download.hub.repo"),
        ({"download__source": "laion"}, "set either download.path (local Parquet tables of addresses)"),
        ({"download__hub": {"repo": "a/b"}}, "download.hub is only read by download.source 'hub' and 'laion'"),
        ({"download__hub": {"rep": "a/b"}}, "unknown parameter 'download.hub.rep'; did you mean 'repo'?"),
        ({"download__images": 5}, "download.columns and download.images are only read by download.source 'hub'"),
        ({"download__laion": {"threads": 3}}, "download.laion is only read by download.source 'laion'"),
        ({"download__url": "http://localhost/x"}, "download.url is not read by download.source 'digits'"),
        ({"download__source": "folder", "download__url": "http://x/y.zip"}, "download.url needs download.sha256"),
        (
            {"download__source": "folder", "download__url": "ftp://x/y.zip", "download__sha256": "0" * 64},
            "must begin with http",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(values, sentence):
    with pytest.raises(params.ParamsError) as error:
        params.parse(changed(**values))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_autoguidance_is_for_models_with_a_guide_conditional_or_not():
    assert get_args(section.Guidance) == samplers.GUIDANCES
    auto = {"train__guide_step": 100, "evaluate__guidance": "auto", "visualize__guidance": "auto"}
    assert params.parse(changed(**auto)).evaluate.sampling.guidance == "auto"
    unconditional = params.parse(changed(codec__conditioning="none", edit__guidance_scale=1.0, **auto))
    assert unconditional.visualize.sampling(2.0).guidance == "auto"
    with pytest.raises(params.ParamsError, match="guidance needs a condition"):
        params.parse(changed(codec__conditioning="none", **(auto | {"visualize__guidance": "classifier_free"})))
    never_dropped = {**auto, "train__condition_dropout": 0.0, "edit__guidance_scale": 1.0}
    with pytest.raises(
        params.ParamsError, match=r"evaluate\.guidance_sweep other than 1 needs a model that is trained"
    ):
        params.parse(changed(**never_dropped))
    params.parse(changed(**never_dropped, evaluate__guidance_sweep=[]))


@pytest.mark.parametrize("kind", [params.IngestParams, params.EncodeParams])
def test_as_many_workers_as_cores_of_this_process(kind, monkeypatch):
    assert kind.model_construct(workers="auto").worker_count == len(os.sched_getaffinity(0))
    assert kind.model_construct(workers=3).worker_count == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5, 7, 11})
    assert kind.model_construct(workers="auto").worker_count == 5
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert kind.model_construct(workers="auto").worker_count == 12


def test_missing_parameter_missing_section_and_no_sections():
    document = copy.deepcopy(DIGITS)
    del document["train"]["steps"]
    with pytest.raises(params.ParamsError, match=r"parameter 'train.steps' is missing; add it"):
        params.parse(document)
    with pytest.raises(params.ParamsError, match="unknown parameter 'trian'; did you mean 'train'"):
        params.parse({**DIGITS, "trian": {}})
    with pytest.raises(params.ParamsError, match="holds no sections"):
        params.parse(None)


def test_files_that_are_not_there_or_not_yaml(tmp_path):
    with pytest.raises(params.ParamsError, match=r"does not exist; write it with 'python -m tasks.preset digits'"):
        params.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("train:\n  steps: [1\nx: 2\n", encoding="utf-8")
    with pytest.raises(params.ParamsError, match="is not valid YAML at line 3"):
        params.load(tmp_path / "params.yaml")


def test_a_mistake_in_the_last_section_stops_the_first_stage(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(changed(register__min_label_accuracy=95)), encoding="utf-8")
    command = [sys.executable, "-m", "tasks.download", str(tmp_path / "raw"), "--params", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("download: error: parameter 'register.min_label_accuracy' is 95")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "raw").exists()


def test_the_file_as_dvc_rewrites_it(tmp_path):
    """`dvc exp run -S` writes YAML 1.2, where `no` needs no quotes and 1e-05 no point."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    rewritten = text.replace("precision: 'no'", "precision: no").replace("learning_rate: 0.004", "learning_rate: 1e-05")
    assert rewritten.count("\n") == text.count("\n") and rewritten != text
    (tmp_path / "params.yaml").write_text(rewritten, encoding="utf-8")
    train = params.load(tmp_path / "params.yaml").train
    assert (train.precision, train.learning_rate) == ("no", 1e-5)


def test_the_samplers_of_each_path_are_those_that_exist():
    """The parameters name them again, because they load without NumPy."""
    from models.noise import samplers
    from tasks.params import chain

    assert chain.DIFFUSION_SAMPLERS == samplers.OF_DIFFUSION
    assert chain.FLOW_SAMPLERS == samplers.OF_FLOW
