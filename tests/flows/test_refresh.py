"""The flows on a toy chain and a real Prefect API: parallel stages, refreshed data, pushed results, kept records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows import dvc
from tasks.runtime import loopback, tracking
from tests.support import tiny

pytestmark = pytest.mark.slow  # a server of its own, and a dozen processes of DVC

ROOT = tiny.ROOT
TOY = """\
stages:
  download:
    cmd: cp ../source.txt raw.txt
    outs: [raw.txt]
  ingest:
    cmd: python ingest.py
    deps: [raw.txt]
    outs: [data/images]
  validate:
    cmd: "grep -q bad raw.txt && echo 'validate: error: the data is bad' >&2 && exit 1 || cp raw.txt accepted.txt"
    deps: [data/images, raw.txt]
    outs: [accepted.txt]
  judge:
    cmd: cp accepted.txt judge.txt
    deps: [accepted.txt]
    outs: [judge.txt]
"""
INGEST = """\
import hashlib, json, pathlib
folder = pathlib.Path("data/images")
folder.mkdir(parents=True)
text = pathlib.Path("raw.txt").read_bytes()
(folder / "index.json").write_text(json.dumps({"sha256": hashlib.sha256(text).hexdigest()}))
"""


@pytest.fixture(scope="module")
def prefect():
    """A Prefect API with a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        loopback.exempt(os.environ)
        with prefect_test_harness(server_startup_timeout=600):
            yield


@pytest.fixture
def toy(prefect, tmp_path, migrated_database, monkeypatch) -> Path:
    """A toy work tree, its source beside it, a DVC remote, and an MLflow store."""
    root = tmp_path / "toy"
    root.mkdir()
    (root / "dvc.yaml").write_text(TOY)
    (root / "ingest.py").write_text(INGEST)
    (tmp_path / "source.txt").write_text("first")
    shutil.copy(ROOT / "params.yaml", root)
    (root / "tasks" / "presets").mkdir(parents=True)
    for name in ("none", "accepted_digits.json"):  # files that the parameters of the digits name
        shutil.copy(ROOT / "tasks" / "presets" / name, root / "tasks" / "presets")
    tiny.git(root, "init", "--quiet")
    subprocess.run(dvc.command("init", "--quiet"), cwd=root, check=True)
    remote = ["remote", "add", "--quiet", "--default", "storage", str(tmp_path / "remote")]
    subprocess.run(dvc.command(*remote), cwd=root, check=True)
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(root)
    return root


DIAMOND = """\
stages:
  first: {cmd: cp ../source.txt first.txt, outs: [first.txt]}
  left: {cmd: python slow.py left first.txt, deps: [first.txt], outs: [left.txt]}
  right: {cmd: python slow.py right first.txt, deps: [first.txt], outs: [right.txt]}
  timed: {cmd: python slow.py timed first.txt, deps: [first.txt], outs: [timed.txt], meta: {alone: true}}
  last: {cmd: "cat left.txt right.txt > last.txt", deps: [left.txt, right.txt, timed.txt], outs: [last.txt]}
"""
SLOW = """\
import pathlib, sys, time
name, reads = sys.argv[1:]
begin = time.time()
text = pathlib.Path(reads).read_text()
if text == "bad " + name:
    sys.exit(f"{name}: error: it is bad")
time.sleep({"left": 4, "right": 2, "timed": 1}[name])
pathlib.Path(name + ".txt").write_text(text + name)
pathlib.Path(name + ".span").write_text(f"{begin} {time.time()}")
"""


@pytest.fixture
def diamond(toy: Path) -> Path:
    """A toy chain with three independent stages, one of which must run alone."""
    (toy / "dvc.yaml").write_text(DIAMOND)
    (toy / "slow.py").write_text(SLOW)
    return toy


def span(root: Path, stage: str) -> tuple[float, float]:
    begin, end = (root / f"{stage}.span").read_text().split()
    return float(begin), float(end)


def overlap(root: Path, one: str, other: str) -> bool:
    (begin, end), (start, stop) = span(root, one), span(root, other)
    return begin < stop and start < end


def test_independent_stages_run_at_the_same_time_and_leave_the_same_lock_file(diamond):
    from flows.chain import pipeline

    state = pipeline(jobs=2, return_state=True)
    assert state.is_completed(), state.message
    assert state.message == "ran first, left, right, timed, last; 0 of 5 stages cached"
    assert overlap(diamond, "left", "right")
    assert not overlap(diamond, "left", "timed") and not overlap(diamond, "right", "timed")
    together = (diamond / "dvc.lock").read_bytes()
    again = pipeline(jobs=2, return_state=True)
    assert again.message == "ran nothing; 5 of 5 stages cached"
    assert (diamond / "dvc.lock").read_bytes() == together

    (diamond / "dvc.lock").unlink()
    shutil.rmtree(diamond / ".dvc" / "cache")
    assert pipeline(jobs=1, return_state=True).is_completed()
    assert not overlap(diamond, "left", "right")
    assert (diamond / "dvc.lock").read_bytes() == together


def test_a_failed_stage_stops_those_after_it_and_the_one_beside_it_ends(diamond):
    from flows.chain import pipeline

    (diamond.parent / "source.txt").write_text("bad right")
    state = pipeline(jobs=2, return_state=True)
    assert state.is_failed() and state.message == "right: error: it is bad"
    results = {row["stage"]: row["result"] for row in json.loads(artifact("stages").data)}
    assert results == {
        "first": "Completed",
        "left": "Completed",
        "right": "Failed",
        "timed": "not reached",
        "last": "not reached",
    }
    assert "right.txt" not in (diamond / "dvc.lock").read_text() and "left.txt" in (diamond / "dvc.lock").read_text()


def artifact(key: str):
    from prefect.artifacts import Artifact

    return Artifact.get(key)


def test_results_are_pushed_after_success_and_after_failure(toy):
    from flows.chain import pipeline

    state = pipeline(return_state=True)
    assert state.is_completed(), state.message
    assert state.message == "ran download, ingest, validate, judge; 0 of 4 stages cached"
    remote = toy.parent / "remote"
    pushed = {path for path in (remote / "files").rglob("*") if path.is_file()}
    assert len(pushed) == 3, "the text under its one hash, the folder and its index"
    assert any((remote / "runs").rglob("*")), "the run-cache"
    record = artifact("record").data
    assert "schema: '2.0'" in record and "train:" in record

    (toy.parent / "source.txt").write_text("a bad one")
    subprocess.run(dvc.command("repro", "--quiet", "--force", "--single-item", "download"), cwd=toy, check=True)
    failed = pipeline(return_state=True)
    assert failed.is_failed() and failed.message == "validate: error: the data is bad"
    assert {path for path in (remote / "files").rglob("*") if path.is_file()} > pushed


def test_a_push_that_fails_fails_the_run(toy, monkeypatch):
    from flows import stages
    from flows.chain import pipeline

    monkeypatch.setattr(stages, "NETWORK_RETRY_SECONDS", (0,))
    (toy.parent / "remote").write_text("a file where a folder belongs")
    state = pipeline(return_state=True)
    assert state.is_failed() and state.message.startswith("the results were not pushed: ")


def test_unchanged_data_is_a_no_op_with_proof_and_changed_data_starts_the_chain(toy):
    from prefect.client.orchestration import get_client

    from flows.data_refresh import data_refresh

    name = "afterimage-digits"
    client = tracking.connect()
    with get_client(sync_client=True) as api:
        flow = api.create_flow_from_name("afterimage")
        deployment = api.create_deployment(flow, "on-demand", entrypoint="flows/chain.py:pipeline", path=str(toy))

        def runs() -> int:
            return sum(run.deployment_id == deployment for run in api.read_flow_runs())

        first = data_refresh(return_state=True)
        assert first.is_completed() and "which has no version; started afterimage/on-demand as" in first.message
        assert runs() == 1
        found = json.loads((toy / "data" / "images" / "index.json").read_text())["sha256"]
        client.create_registered_model(name)
        client.create_model_version(name, source=str(toy), tags={"afterimage.data_sha256": found})
        client.set_registered_model_alias(name, "challenger", "1")
        same = data_refresh(return_state=True)
        assert (
            same.name == "Unchanged" and same.message == f"data {found[:12]} is that of {name} version 1; nothing to do"
        )
        assert [row["sha256"] for row in json.loads(artifact("data").data)] == [found, found]
        assert {row["stage"]: row["result"] for row in json.loads(artifact("stages").data)} == {
            "download": "Completed",
            "ingest": "Cached",
            "validate": "Cached",
        }
        assert runs() == 1
        (toy.parent / "source.txt").write_text("second")
        assert "is not that of afterimage-digits version 1; started" in data_refresh(return_state=True).message
        assert runs() == 2
        (toy.parent / "source.txt").write_text("a bad one")
        refused = data_refresh(return_state=True)
        assert refused.is_failed() and refused.message == "validate: error: the data is bad"
        assert runs() == 2


def test_a_check_of_the_champion_fails_with_the_sentence_of_its_command(toy):
    from flows.champion_check import champion_check

    state = champion_check(return_state=True)
    assert state.is_failed() and state.message.startswith("champion_check: error: "), state.message
