"""The stage `validate`: good data passes, each kind of bad data fails by name, and then nothing after it starts."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.download import download
from tasks.ingest import ingest
from tasks.params import ValidateParams
from tasks.stage import StageError
from tasks.validate import validate
from tests.data_inputs import ROOT, contents, folder_params, ingest_params, picture, run_stage, write_params, write_tree

CLASSED = {
    f"{split}/{name}/{seed}.png": picture(seed + 100 * position)
    for position, (split, name) in enumerate(
        [("train", "cat"), ("train", "dog"), ("train", "owl"), ("test", "cat"), ("test", "dog"), ("test", "owl")]
    )
    for seed in range(8)
}


def gates(**others):
    values = {
        "min_images": 10,
        "min_side": 8,
        "max_aspect_ratio": 2.0,
        "max_quarantined_fraction": 0.02,
        "min_images_per_class": 5,
        "max_duplicate_fraction": 0.05,
    }
    return ValidateParams.model_validate(values | others)


@pytest.fixture
def judged(tmp_path):
    """Download, ingest and validate files; returns the complaint, or None where they are accepted."""

    def call(files, licence="mine", **limits):
        folder = write_tree(tmp_path / "in", files)
        download(tmp_path / "raw", folder_params(folder, licence=licence))
        ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "aside", ingest_params())
        (tmp_path / "accepted.json").unlink(missing_ok=True)
        try:
            paths = [tmp_path / name for name in ("images", "aside", "accepted.json", "report")]
            validate(*paths, gates(**limits))
        except StageError as error:
            return str(error)
        return None

    return call


def test_good_data_is_accepted_with_the_hash_of_the_data(tmp_path, judged):
    assert judged(CLASSED) is None
    verdict = json.loads((tmp_path / "accepted.json").read_text())
    index = json.loads((tmp_path / "images" / "index.json").read_text())
    assert verdict["verdict"] == "accepted"
    assert verdict["sha256"] == index["sha256"]
    assert not re.search(r"20\d\d-\d\d", (tmp_path / "accepted.json").read_text())


def test_the_data_docs_show_every_gate(tmp_path, judged):
    assert judged(CLASSED) is None
    assert (tmp_path / "report" / "index.html").is_file()
    pages = [path.read_text() for path in (tmp_path / "report" / "validations").rglob("*.html")]
    assert len(pages) == 3
    assert any("aspect_ratio" in page for page in pages)


def test_the_same_data_has_the_same_verdict_and_pages(tmp_path, judged):
    assert judged(CLASSED) is None
    verdict, pages = (tmp_path / "accepted.json").read_bytes(), set(contents(tmp_path / "report"))
    assert judged(CLASSED) is None
    assert (tmp_path / "accepted.json").read_bytes() == verdict
    assert set(contents(tmp_path / "report")) == pages


def with_captions(text):
    return CLASSED | {"captions.csv": text.encode()}


def every_caption(special):
    lines = [f"{name},{special if name == 'train/cat/3.png' else 'a thing'}" for name in CLASSED]
    return "image,caption\n" + "\n".join(lines)


CASES = {
    "too few": (CLASSED, {"min_images": 100}, "48 images are fewer than validate.min_images 100", None),
    "too small": (CLASSED | {"train/cat/x.png": picture(900, (4, 9))}, {}, "min_side 8", "train/cat/x.png"),
    "too long": (CLASSED | {"train/cat/x.png": picture(900, (90, 9))}, {}, "max_aspect_ratio", "train/cat/x.png"),
    "damaged": (
        CLASSED | {"train/cat/x.png": b"no", "train/dog/y.png": b""},
        {},
        "max_quarantined_fraction 0.02",
        "train/cat/x.png, train/dog/y.png",
    ),
    "a small class": (CLASSED | {"train/fox/x.png": picture(900)}, {}, "min_images_per_class 5", "fox"),
    "a class of unreadable images": (
        CLASSED | {"train/fox/x.png": b"no"},
        {"max_quarantined_fraction": 0.5},
        "min_images_per_class",
        "fox",
    ),
    "no class": (CLASSED | {"train/x.png": picture(900)}, {}, "no class folder", "train/x.png"),
    "repeats": (
        CLASSED | {f"train/cat/copy{seed}.png": picture(0) for seed in range(9)},
        {},
        "repeat another",
        "train/cat/copy0.png",
    ),
    "leaks": (
        CLASSED | {f"test/cat/copy{seed}.png": picture(seed) for seed in range(8)},
        {},
        "held out and trained on",
        "test/cat/copy0.png",
    ),
    "a long caption": (with_captions(every_caption("x" * 3000)), {}, "max_caption_characters", "train/cat/3.png"),
    "no caption": (with_captions(every_caption("")), {}, "no caption", "train/cat/3.png"),
    "no test split": ({"one.png": picture(1)}, {"min_images": 1}, "a split is empty", None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_failed_gate_names_the_first_offenders(tmp_path, judged, case):
    files, limits, complaint, offender = CASES[case]
    said = judged(files, **limits)
    assert said is not None
    assert complaint in said
    assert offender is None or f"({offender}" in said
    assert said.count("validate.") <= 2, "one gate fails, not a crowd of them"
    assert not (tmp_path / "accepted.json").exists()
    assert (tmp_path / "report" / "index.html").is_file()


def test_no_licence_is_no_answer(judged):
    assert "download.licence" in judged(CLASSED, licence="")


def test_some_damage_is_tolerated(judged):
    assert judged(CLASSED | {"train/cat/x.png": b"no"}, max_quarantined_fraction=0.03) is None


def test_a_text_beside_the_images_is_no_damage(judged):
    assert judged(CLASSED | {f"notes{number}.txt": b"x" for number in range(10)}) is None


def test_many_offenders_are_counted(judged):
    said = judged(CLASSED, min_side=100)
    assert re.search(r"min_side 100.*\((\S+, ){4}\S+ and 43 more\)", said)


def test_through_the_entry_point_nothing_after_it_runs(tmp_path):
    """A failed gate ends with one sentence, and the stages behind it refuse, each by itself."""
    params = write_params(tmp_path / "params.yaml", validate={"min_images": 5000})
    where = {
        name: tmp_path / name for name in ("raw", "images", "aside", "accepted.json", "report", "codec", "latents")
    }
    assert run_stage("download", where["raw"], params=params).returncode == 0
    assert run_stage("ingest", where["raw"], where["images"], where["aside"], params=params).returncode == 0
    done = run_stage(
        "validate", where["images"], where["aside"], where["accepted.json"], where["report"], params=params
    )
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if "validate: error:" in line]
    assert "1797 images are fewer than validate.min_images 5000" in sentence
    assert "Traceback" not in done.stderr
    after = run_stage("codec", where["images"], where["accepted.json"], where["codec"], params=params)
    assert after.returncode == 1
    assert "was not accepted" in after.stderr
    assert not where["codec"].exists()


def test_dvc_trains_nothing_on_refused_data(tmp_path):
    """A later stage asked for by name in a clone: DVC stops at the failed gate."""
    for name in ("dvc.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("tasks", "models", "flows"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_params(tmp_path / "params.yaml", validate={"min_images": 5000})
    dvc = [sys.executable, "-m", "dvc"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"}
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, env=environment, check=True)
    done = subprocess.run([*dvc, "repro", "train"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "1797 images are fewer than validate.min_images 5000" in done.stderr
    assert "Running stage 'validate'" in done.stdout
    assert "Running stage 'codec'" not in done.stdout
    assert (tmp_path / "reports" / "validation" / "index.html").is_file()
    for missing in ("data/accepted.json", "data/latents", "outputs/codec", "outputs/pipeline"):
        assert not (tmp_path / missing).exists()


def test_every_stage_behind_it_depends_on_the_verdict():
    """Asking for a later stage by name runs `validate` first: DVC follows this dependency."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    names = list(stages)
    producers = {out: name for name, its in stages.items() for out in its.get("outs", []) + its.get("metrics", [])}

    def needs(name):
        return {name}.union(*(needs(producers[dep]) for dep in stages[name]["deps"] if dep in producers))

    for name in names[names.index("validate") + 1 :]:
        assert "validate" in needs(name), name
