"""The stage `validate`: good data is accepted, each kind of bad data is refused by name, no later stage runs."""

import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tasks.download import download
from tasks.formats import quarantine
from tasks.ingest import ingest
from tasks.params import Demands, ValidateParams
from tasks.pictures.images import schema
from tasks.pictures.index import ImageIndex
from tasks.runtime import integrity
from tasks.runtime.errors import StageError
from tasks.validate import validate
from tasks.validation import expectations
from tasks.validation.expectations import Table, judge
from tasks.validation.report.findings import Gate
from tests.support import tiny
from tests.support.data_inputs import (
    ROOT,
    call_stage,
    contents,
    folder_params,
    ingest_params,
    picture,
    record_checksums,
    run_and_measure,
    write_params,
    write_tree,
)

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


def asked(**others):
    """What a chain without conditions asks, in batches of four."""
    values = {"codec.conditioning": "none", "evaluate.allow_small_n": True, "image.resolution": 8}
    return Demands.model_validate(values | {"judge.extractor.kind": "in_domain", "train.batch_size": 4} | others)


def rewrite(images, change):
    """Replace a column of every row of the shard: what no source of ours writes, but a damaged one might."""
    name, values = change
    path = images / "shard-0.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    if values is None:
        table = table.remove_column(place)
    else:
        table = table.set_column(place, name, pa.array([values(row) for row in table.to_pylist()]))
        table = table.cast(schema()) if name != "width" else table
    pq.write_table(table, path)
    record_checksums(images)


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Download, ingest and validate files; returns the complaint, or None where they are accepted.

    The Data Docs, which take as long as the checks, are written with `docs=True` alone.
    """
    write_docs = expectations.write_docs

    def call(files, licence="mine", change=None, demands=None, resolution=8, docs=False, **limits):
        monkeypatch.setattr(expectations, "write_docs", write_docs if docs else lambda *_: None)
        folder = write_tree(tmp_path / "in", files)
        download(tmp_path / "raw", folder_params(folder, licence=licence))
        ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())
        if change:
            rewrite(tmp_path / "images", change)
        (tmp_path / "accepted.json").unlink(missing_ok=True)
        try:
            paths = [tmp_path / name for name in ("images", "quarantine", "accepted.json", "report")]
            validate(*paths, gates(**limits), asked(**{"image.resolution": resolution} | (demands or {})))
        except StageError as error:
            return str(error)
        return None

    return call


def test_good_data_is_accepted_with_the_hash_of_the_data_and_the_docs_show_every_gate(tmp_path, judged, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert judged(CLASSED, docs=True) is None
    assert not list((tmp_path / "temporary").iterdir()), "nothing is left there"
    verdict = json.loads((tmp_path / "accepted.json").read_text())
    index = json.loads((tmp_path / "images" / "index.json").read_text())
    assert verdict["verdict"] == "accepted"
    assert verdict["sha256"] == index["sha256"]
    assert not re.search(r"20\d\d-\d\d", (tmp_path / "accepted.json").read_text())
    docs = tmp_path / "report" / "data_docs"
    assert (docs / "index.html").is_file()
    pages = [path.read_text() for path in (docs / "validations").rglob("*.html")]
    assert len(pages) == 5
    assert any("aspect_ratio" in page for page in pages)


def test_the_same_data_has_the_same_verdict_and_pages(tmp_path, judged, monkeypatch):
    """Also on a file system that lists its folders in another order."""
    assert judged(CLASSED, docs=True) is None
    verdict, pages = (tmp_path / "accepted.json").read_bytes(), contents(tmp_path / "report")
    walk = os.walk

    def backwards(*arguments, **options):
        for parent, folders, files in walk(*arguments, **options):
            folders.sort(reverse=True)
            yield parent, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert judged(CLASSED, docs=True) is None
    assert (tmp_path / "accepted.json").read_bytes() == verdict
    assert contents(tmp_path / "report") == pages
    for page in (tmp_path / "report" / "data_docs").rglob("*.html"):
        (logo,) = re.findall(r'src="([^"]*logo-long.png[^"]*)"', page.read_text())
        assert (page.parent / logo).is_file()


def with_captions(text):
    return CLASSED | {"captions.csv": text.encode()}


def every_caption(special):
    lines = [f"{name},{special if name == 'train/cat/3.png' else 'a thing'}" for name in CLASSED]
    return "image,caption\n" + "\n".join(lines)


def near(seed):
    """Almost `picture(seed)`: another file whose perceptual hash is the same or differs in one bit."""
    image = PIL.Image.open(io.BytesIO(picture(seed))).convert("RGB")
    file = io.BytesIO()
    image.point(lambda value: max(0, value - 2)).save(file, "PNG")
    return file.getvalue()


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
    "no class": (CLASSED | {"train/x.png": picture(900)}, {"warn_only": []}, "no class folder", "train/x.png"),
    "repeats": (
        CLASSED | {f"train/cat/copy{seed}.png": picture(0) for seed in range(9)},
        {},
        "repeat another",
        "train/cat/copy0.png",
    ),
    "leaks": (
        CLASSED | {f"test/cat/copy{seed}.png": picture(seed) for seed in range(8)},
        {},
        "held out and in the training split",
        "test/cat/copy0.png",
    ),
    "a long caption": (with_captions(every_caption("x" * 3000)), {}, "max_caption_characters", "train/cat/3.png"),
    "no caption": (with_captions(every_caption("")), {}, "no caption", "train/cat/3.png"),
    "near repeats": (
        CLASSED | {f"train/cat/near{seed}.png": near(seed) for seed in range(8)},
        {"warn_only": []},
        "nearly repeat another",
        "train/cat/near0.png",
    ),
    "near leaks": (
        CLASSED | {f"test/cat/near{seed}.png": near(seed) for seed in range(8)},
        {"warn_only": []},
        "a near duplicate is in the training split",
        "test/cat/near0.png",
    ),
    "another script": (with_captions(every_caption("кошка (cat)")), {"warn_only": []}, "LATIN", "train/cat/3.png"),
    "unsafe": (
        CLASSED,
        {"change": ("safety", lambda row: "unsafe" if row["key"] == "train/cat/3.png" else "safe")},
        "not rated safe",
        "train/cat/3.png",
    ),
    "safety unknown": (
        CLASSED,
        {"change": ("safety", lambda row: None if row["key"] == "train/cat/3.png" else "safe")},
        "not rated safe",
        "train/cat/3.png",
    ),
    "no origin": (CLASSED, {"change": ("source", lambda row: "")}, "no origin", "test/cat/0.png"),
    "labels that are not there": (
        CLASSED,
        {"change": ("label", lambda row: 7 if row["key"] == "train/owl/3.png" else row["label"])},
        "labels name no class",
        "train/owl/3.png",
    ),
    "labels that are NaN": (
        CLASSED,
        {"change": ("label", lambda row: None if row["key"] == "train/owl/3.png" else row["label"]), "warn_only": []},
        "no class folder",
        "train/owl/3.png",
    ),
    "a column gone": (CLASSED, {"change": ("phash", None)}, "columns of the shards", "shard-0.parquet: phash"),
    "a column of another type": (
        CLASSED,
        {"change": ("width", lambda row: float("nan"))},
        "columns of the shards",
        "shard-0.parquet: width",
    ),
    "hashes that are none": (
        CLASSED,
        {"change": ("phash", lambda row: "0" if row["key"] == "train/owl/3.png" else row["phash"])},
        "hashes are damaged",
        "train/owl/3.png",
    ),
    "captions not read": (
        with_captions(every_caption("a thing")) | {"more.csv": b"image,words\ntrain/cat/3.png,a cat\n"},
        {"warn_only": [], "max_quarantined_fraction": 0.1},
        "look like captions and are not read",
        "more.csv",
    ),
    "a lost line": (
        with_captions(every_caption("a thing") + "\nlost.png,gone"),
        {"warn_only": []},
        "lines that name no image",
        "captions.csv",
    ),
    "many files of captions not read": (
        CLASSED | {f"words/{seed}.md": b"a cat" for seed in range(8)},
        {},
        "max_quarantined_fraction 0.02",
        "words/0.md",
    ),
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
    page = (tmp_path / "report" / "index.html").read_text()
    failed = "3" if case == "no test split" else "[12]"  # without it, codec and judge lack their images as well
    assert re.search(rf"The data is refused: {failed} of \d+ checks", page) and complaint in html.unescape(page)
    assert offender is None or offender.split(",")[0] in html.unescape(page)
    assert not re.search(r"<script|https?://", page), "the page needs a network"


@pytest.mark.parametrize("case", ["near repeats", "near leaks", "another script", "no class", "a lost line"])
def test_a_warning_is_reported_and_stops_nothing(tmp_path, judged, capsys, case):
    files, _, complaint, offender = CASES[case]
    assert judged(files) is None
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validate: warning:")]
    assert complaint in said
    assert offender in said
    findings = json.loads((tmp_path / "report" / "findings.json").read_text())["findings"]
    (failed,) = [finding for finding in findings if not finding["success"]]
    assert (failed["severity"], failed["offenders"][0]) == ("warning", offender)
    assert {finding["severity"] for finding in findings} == {"warning", "failure"}


def test_images_below_the_resolution_are_refused_or_counted(tmp_path, judged, capsys):
    """The least side is the resolution unless the parameter allows less; then the number of enlarged ones is said."""
    files = CLASSED | {"train/cat/x.png": picture(900, (9, 9))}
    said = judged(files, min_side=None, resolution=12, docs=True)
    assert any("aspect_ratio" in page.read_text() for page in (tmp_path / "report" / "data_docs").rglob("*.html"))
    assert "smaller than validate.min_side 12; remove them, or set it to 9" in said
    assert "train/cat/x.png" in said
    assert judged(files, min_side=9, resolution=12) is None
    note = "1 images are smaller than image.resolution 12 and are enlarged"
    assert f"validate: {note}" in capsys.readouterr().out
    findings = json.loads((tmp_path / "report" / "findings.json").read_text())["findings"]
    assert [finding["gate"]["note"] for finding in findings if finding["gate"]["check"] == "size"] == [note]
    assert f'<td data-column="Note">{note}</td>' in (tmp_path / "report" / "index.html").read_text()


KAGGLE = {
    f"{folder}/{seed}.png": picture(seed + 100 * position)
    for position, folder in enumerate(["train/cat", "train/dog", "test"])
    for seed in range(8)
}


def test_unlabelled_images_are_refused_only_for_label_conditioning(tmp_path, judged, capsys):
    """The layout of a Kaggle competition: labelled training images, a flat folder of test images."""
    assert judged(KAGGLE) is None
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validate: warning:")]
    assert "no class folder" in warning and "(test/0.png, test/1.png" in warning
    refused = judged(KAGGLE, demands={"codec.conditioning": "label"})
    assert "images lie in no class folder, and codec.conditioning is 'label'" in refused
    assert "test/0.png" in refused


def test_unread_caption_files_are_reported_once(tmp_path, judged, capsys):
    folders = CLASSED | {f"words/{seed}.txt": b"a cat" for seed in range(3)}
    assert judged(folders, docs=True, max_quarantined_fraction=0.1) is None
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("ingest: 3 files or lines look like captions")]
    assert "are not read (words/0.txt: it has the name of an image" in line
    findings = json.loads((tmp_path / "report" / "findings.json").read_text())["findings"]
    (failed,) = [finding for finding in findings if not finding["success"]]
    assert (failed["unexpected"], failed["offenders"][0]) == (3, "words/0.txt")
    assert any("does not lie beside it" in page.read_text() for page in (tmp_path / "report").rglob("*.html"))


def test_two_gates_of_a_table_must_not_expect_the_same(tmp_path):
    """Great Expectations would merge them and return one result too few."""
    gates = [Gate(check, "ExpectColumnValuesToNotBeNull", {"column": "key"}, "empty") for check in ("keys", "names")]
    with pytest.raises(AssertionError, match="gates of the table 'images' expect the same twice: names"):
        judge([Table("images", pd.DataFrame({"key": ["a"]}), gates)], tmp_path / "docs")


def test_a_failure_may_be_made_a_warning(judged):
    assert "min_side" in judged(CLASSED, min_side=100)
    assert judged(CLASSED, min_side=100, warn_only=["size"]) is None


def test_the_label_balance_is_compared_with_the_baseline(tmp_path, judged):
    """The baseline is a file that a person copies and commits: the same files give the same verdict."""
    assert judged(CLASSED) is None
    baseline = tmp_path / "baseline.json"
    shutil.copy(tmp_path / "accepted.json", baseline)
    limits = {"baseline": str(baseline), "warn_only": [], "max_label_drift": 0.1}
    assert judged(CLASSED, **limits) is None
    grown = CLASSED | {f"train/cat/new{seed}.png": picture(900 + seed) for seed in range(20)}
    said = judged(grown, **limits)
    assert "the label balance moved by 19.6%" in said  # cats: 16 of 48, then 36 of 68
    assert "cat 33.3% to 52.9%" in said
    assert judged(grown, **limits | {"max_label_drift": 0.2}) is None
    assert judged(grown, **limits | {"warn_only": ["drift"]}) is None
    shutil.copy(tmp_path / "accepted.json", baseline)
    assert judged(grown, **limits) is None
    baseline.write_text(json.dumps(json.loads(baseline.read_text()) | {"source": "another"}))
    assert judged(CLASSED, **limits) is None, "another source has another balance"


@pytest.mark.parametrize("text", ["[]", "no JSON", '{"labels": {"cat": "many"}}'])
def test_an_unreadable_baseline_is_refused(tmp_path, judged, text):
    (tmp_path / "baseline.json").write_text(text)
    assert "validate.baseline" in judged(CLASSED, baseline=str(tmp_path / "baseline.json"))


def test_an_empty_licence_is_refused(judged):
    assert "download.licence" in judged(CLASSED, licence="")


def test_quarantined_inputs_below_the_limit_are_accepted(judged):
    assert judged(CLASSED | {"train/cat/x.png": b"no"}, max_quarantined_fraction=0.03) is None


def test_a_text_file_beside_the_images_does_not_count_as_damaged(judged):
    assert judged(CLASSED | {f"notes{number}.txt": b"x" for number in range(10)}) is None


def test_many_offenders_are_counted(judged):
    said = judged(CLASSED, min_side=100)
    assert re.search(r"min_side 100.*\((\S+, ){4}\S+ and 43 more\)", said)


def test_no_later_stage_runs_on_refused_data(tmp_path):
    """A failed gate ends with one sentence, and the stages behind it refuse, each by itself."""
    params = write_params(tmp_path / "params.yaml", validate={"min_images": 5000})
    where = {
        name: tmp_path / name for name in ("raw", "images", "quarantine", "accepted.json", "report", "codec", "latents")
    }
    assert call_stage("download", where["raw"], params=params).returncode == 0
    assert call_stage("ingest", where["raw"], where["images"], where["quarantine"], params=params).returncode == 0
    done = call_stage(
        "validate", where["images"], where["quarantine"], where["accepted.json"], where["report"], params=params
    )
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if "validate: error:" in line]
    assert "1797 images are fewer than validate.min_images 5000" in sentence
    assert "Traceback" not in done.stderr
    after = call_stage("codec", where["images"], where["accepted.json"], where["codec"], params=params)
    assert after.returncode == 1
    assert "was not accepted" in after.stderr
    assert not where["codec"].exists()


@pytest.mark.slow
def test_dvc_trains_nothing_on_refused_data(tmp_path):
    """A later stage asked for by name in a clone: DVC stops at the failed gate."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for name in ("tasks", "models", "flows"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=tiny.UNFINISHED)
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


def test_every_later_stage_depends_on_the_verdict():
    """Asking for a later stage by name runs `validate` first: DVC follows this dependency."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    names = list(stages)
    producers = {out: name for name, its in stages.items() for out in its.get("outs", []) + its.get("metrics", [])}

    def needs(name):
        return {name}.union(*(needs(producers[dep]) for dep in stages[name]["deps"] if dep in producers))

    for name in names[names.index("validate") + 1 :]:
        assert "validate" in needs(name), name


def write_metadata(root, count):
    """A normal form of `count` rows in 16 shards, 1% of them repeating another, with pictures of a byte."""
    random = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "quarantine").mkdir()
    quarantine.Writer(root / "quarantine").close()
    quarantine.QuarantineIndex(count, count, {}).write(root / "quarantine" / quarantine.INDEX)
    each, shards = count // 16, [f"shard-{number:x}.parquet" for number in range(16)]
    for number, shard in enumerate(shards):
        ids = range(number * each, (number + 1) * each)
        columns = {
            "key": [f"images/{i:08d}.jpg" for i in ids],
            "image": [{"bytes": b"x", "path": None}] * each,
            "width": random.integers(256, 512, each),
            "height": random.integers(256, 512, each),
            "mode": ["RGB"] * each,
            "label": random.integers(0, 10, each),
            "captions": [[f"a photo, number {i}, of something", f"another of {i}"] for i in ids],
            "split": random.choice(["train", "test"], each, p=[0.9, 0.1]).tolist(),
            "sha256": [hashlib.sha256(str(i - i % 100 if i % 100 == 1 else i).encode()).hexdigest() for i in ids],
            "phash": [f"{value:016x}" for value in random.integers(0, 2**63, each).tolist()],
            "safety": ["safe"] * each,
            "licence": ["CC0-1.0"] * each,
            "source": ["hub"] * each,
        }
        pq.write_table(pa.table(columns, schema()), root / "images" / shard, row_group_size=1024)
    ImageIndex(
        shards=shards,
        files=integrity.checksums(root / "images", "*.parquet"),
        rows=count,
        splits={"train": count * 9 // 10, "test": count // 10},
        caption_count=count,
        sha256="0" * 64,
        classes=[str(label) for label in range(10)],
        source="hub",
    ).write(root / "images" / "index.json")


@pytest.mark.slow
def test_a_million_rows_in_under_a_minute_and_little_memory(tmp_path):
    write_metadata(tmp_path, 1_000_000)
    params = write_params(tmp_path / "params.yaml", validate={"max_duplicate_fraction": 0.02})
    started = time.monotonic()
    paths = [tmp_path / name for name in ("images", "quarantine", "accepted.json", "report")]
    done, peak = run_and_measure("validate", *paths, params=params)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60
    assert peak < 1.5 * 2**30
