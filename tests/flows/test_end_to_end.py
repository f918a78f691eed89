"""The whole chain, tiny, in a work tree of its own: once as `make repro` runs it, then what reruns and what not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from flows import repro
from tasks import params
from tests.support import cpu, tiny

STAGES = list(yaml.safe_load((tiny.ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
ALWAYS = "register"
COMPUTING = [name for name in STAGES if name != ALWAYS]


def results(output: str) -> dict[str, str]:
    """Stage -> ran, cached or unchanged, from the summary's table."""
    found = re.findall(r"^(\w+) +(ran|cached|unchanged|not reached|FAILED)\b", output, re.MULTILINE)
    return dict(found)


@pytest.fixture
def tree(chain):
    """The tree as the first run left it; parameters that a test changes are put back."""
    before = (chain.tree / "params.yaml").read_text(encoding="utf-8")
    yield chain.tree
    (chain.tree / "params.yaml").write_text(before, encoding="utf-8")


@pytest.mark.timeout(900)
def test_one_command_makes_every_artefact_and_a_summary(chain):
    tree, output = chain.tree, chain.output
    assert results(output) == dict.fromkeys(STAGES, "ran")
    for path in (
        "reports/index.html",
        "reports/validation/index.html",
        "outputs/pipeline/unet/diffusion_pytorch_model.safetensors",
        "outputs/onnx/unet.onnx",
        "outputs/model",
        "mlflow.db",
    ):
        assert (tree / path).exists(), path
    metrics = json.loads((tree / "reports/metrics.json").read_text(encoding="utf-8"))
    for name, guidance in {"frechet_distance": "none", "kid": "none", "label_accuracy": "1.5"}.items():
        row = rf"^{name} +{guidance} +\S+ +3 x \d+ +(floor|real images) \S"
        assert re.search(row, output, re.MULTILINE), name
    assert re.search(rf"^fingerprint +{metrics['fingerprint']}$", output, re.MULTILINE)
    assert "git add dvc.lock" in output, "without a commit of the lock an experiment has no baseline"
    assert int(re.search(r"peak memory of the process tree: ([\d,]+) MiB", output).group(1).replace(",", "")) > 100
    assert re.search(r"^registered +afterimage-digits version 1, ", output, re.MULTILINE)
    for what in ("report", "pictures", "ONNX bundle", "MLflow UI"):
        assert re.search(rf"^{what} +\S", output, re.MULTILINE)


def test_at_most_the_lock_differs_afterwards(chain):
    assert tiny.git(chain.tree, "status", "--porcelain") in ("?? dvc.lock", "")


def test_again_everything_is_skipped(tree):
    with cpu.at_most(6):  # 3 s on two idle cores; loading MLflow alone would be as much again
        output = tiny.run(tree, "infra.run")
    assert results(output) == dict.fromkeys(COMPUTING, "unchanged") | {ALWAYS: "ran"}
    assert "version 1" in output and "version 2" not in output


def test_what_dvc_users_expect_works(tree):
    assert "frechet_distance" in tiny.run(tree, "dvc", "metrics", "show")
    assert "download" in tiny.run(tree, "dvc", "dag")
    tiny.run(tree, "dvc", "plots", "show")
    page = (tree / "dvc_plots" / "index.html").read_text(encoding="utf-8")
    assert "reports_figures_samples.png" in page and "reports_figures_training.png" in page
    assert not re.search(r"<script[^>]*src=.https?:", page), "without a network the page is empty"
    before = params.read(tree / "params.yaml")["train"]["learning_rate"]
    change(tree, "train", "learning_rate", 0.005)
    differences = json.loads(tiny.run(tree, "dvc", "params", "diff", "--json"))
    assert list(differences["params.yaml"]) == ["train.learning_rate"]
    assert differences["params.yaml"]["train.learning_rate"]["old"] == before != 0.005


# A changed parameter -> the stages that read it. Each of them, and what depends on its outs, is what runs again.
READERS = {
    "preset": set(),
    "download.licence": {"download"},
    "ingest.shards": {"ingest"},
    "validate.min_side": {"validate"},
    "image.channels": {"codec", "judge"},
    "codec.text_steps": {"codec"},
    "encode.shard_size": {"encode"},
    "prior.seed": {"prior"},
    "model.dropout": {"train"},
    "diffusion.schedule": {"train"},
    "train.learning_rate": {"train"},
    "judge.seed": {"judge"},
    "evaluate.seed": {"evaluate"},
    "edit.seed": {"edit"},
    "visualize.columns": {"visualize"},
    "export.seed": {"export"},
    "register.min_label_accuracy": {"register"},
}
AFTER = {
    "train": {"train", "evaluate", "edit", "visualize", "export", "package", "register"},
    "judge": {"judge", "evaluate", "edit", "visualize", "package", "register"},
    "evaluate": {"evaluate", "visualize", "package", "register"},
    "edit": {"edit", "visualize", "register"},
    "visualize": {"visualize", "register"},
    "export": {"export", "package", "register"},
    "encode": {"encode", "train", "evaluate", "edit", "visualize", "export", "package", "register"},
    "register": {"register"},
}


def test_a_changed_parameter_concerns_the_stages_that_read_it(tree):
    """All are changed at once: DVC says for each stage which sections of its own changed."""
    for name in READERS:
        section, _, key = name.rpartition(".")
        change(tree, section, key, "another value")
    concerned: dict[str, set[str]] = {name.split(".")[0]: set() for name in READERS}
    for stage, reasons in json.loads(tiny.run(tree, "dvc", "status", "--json")).items():
        for reason in reasons:
            if reason != "always changed":
                assert list(reason) == ["changed deps"] and list(reason["changed deps"]) == ["params.yaml"]
                for section in reason["changed deps"]["params.yaml"]:
                    concerned[section].add(stage)
    assert concerned == {name.split(".")[0]: stages for name, stages in READERS.items()}
    assert set(concerned) == set(params.read(tree / "params.yaml"))


@pytest.fixture(scope="module")
def order() -> list[str]:
    return repro.stages(tiny.ROOT)


@pytest.mark.parametrize("stage", AFTER)
def test_what_follows_from_a_stage(stage, order):
    """The graph's order, as DVC sees it, says what a changed out makes run again."""
    document = yaml.safe_load((tiny.ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    following = {stage}
    for name in order:
        made = {out for other in following for kind in ("outs", "metrics") for out in document[other].get(kind, [])}
        if made & set(document[name]["deps"]):
            following.add(name)
    assert following == AFTER[stage]


@pytest.mark.timeout(300)
def test_a_changed_parameter_reruns_its_stages_and_no_other(tree):
    change(tree, "prior", "seed", 3)  # one of the quick stages
    output = tiny.run(tree, "infra.run")
    assert {name for name, result in results(output).items() if result == "ran"} == {"prior", ALWAYS}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_results_of_before_come_from_the_cache(tree):
    """After A, B: A again. Nothing is computed, and a deleted result is back."""
    shutil.rmtree(tree / "reports" / "figures")
    shutil.rmtree(tree / "outputs" / "onnx")
    output = tiny.run(tree, "infra.run")
    ran = {name for name, result in results(output).items() if result == "ran"}
    assert ran == {ALWAYS}
    assert (tree / "outputs" / "onnx" / "unet.onnx").exists() and (
        tree / "reports" / "figures" / "samples.png"
    ).exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_experiment_leaves_the_work_tree_alone(tree):
    tiny.git(tree, "add", "dvc.lock")
    tiny.git(tree, "commit", "--quiet", "-m", "results")
    before = tiny.git(tree, "status", "--porcelain")
    tiny.run(tree, "dvc", "exp", "run", "--temp", "-S", "train.learning_rate=0.003", "--name", "faster")
    assert tiny.git(tree, "status", "--porcelain") == before
    shown = tiny.run(tree, "dvc", "exp", "show", "--csv")
    assert "faster" in shown and "0.003" in shown
    changed = json.loads(tiny.run(tree, "dvc", "metrics", "diff", "--json", "HEAD", "faster"))["reports/metrics.json"]
    assert "frechet_distance_unguided" in changed, "a tiny model may have equal scores, but no equal distance"
    table = tiny.run(tree, "dvc", "exp", "show", "--only-changed", "--drop", ".*/").splitlines()
    assert all(name in table[1] for name in [*changed, "train.learning_rate"])
    assert max(map(len, table)) <= 160


def change(tree: Path, section: str, key: str, value) -> None:
    file = tree / "params.yaml"
    document = params.read(file)
    (document[section] if section else document)[key] = value
    file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
