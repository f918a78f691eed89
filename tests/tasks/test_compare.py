"""The page that compares runs, and the findings."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from infra import browser
from models.images import pictures
from tasks import compare, findings
from tasks.comparison import finding, lookup, subject
from tasks.comparison import page as pages
from tasks.runtime import tracking
from tasks.runtime.errors import StageError
from tasks.sweeps import plan, records
from tests.support import page_checks, sweep_runs


@pytest.fixture(scope="module")
def made(tmp_path_factory, migrated_database):
    """A store with a complete sweep, its folder, and the parent run with the leaderboard; made once."""
    folder = tmp_path_factory.mktemp("swept")
    shutil.copy(migrated_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        use(folder, patch)
        return (folder, *sweep_runs.sweep(tracking.connect(), folder))


def use(folder, monkeypatch):
    """Make the MLflow store in `folder` the current one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(folder / "scratch"))
    monkeypatch.chdir(folder)


@pytest.fixture
def swept(made, monkeypatch):
    folder, parent, board = made
    use(folder, monkeypatch)
    return tracking.connect(), parent, board


@pytest.fixture
def store(swept):
    return swept[0]


@pytest.mark.parametrize("titles", [None, ["hot dog", "dog", "a long name"]])
def test_the_first_row_of_a_grid_is_cut_into_its_images(titles, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
    pictures.save_png(pictures.grid(images, 3, scale=4, column_titles=titles), tmp_path / "grid.png")
    found = subject.first_row(tmp_path / "grid.png")
    np.testing.assert_array_equal(found[:, :, ::4, ::4], images[:3])
    assert found.shape == (3, 3, 32, 32)


def test_the_page_shows_what_differs_and_whether_it_exceeds_the_spread(swept, tmp_path):
    _, parent, board = swept
    runs = [row.runs[0] for row in board.rows]
    assert compare.compare(runs, tmp_path / "page.html", parent.info.run_id) == []
    html = (tmp_path / "page.html").read_text()
    assert len(html) < 1_000_000
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert "<script" not in html
    assert re.search(r"<th scope=\"row\">train.learning_rate</th>\s*<td[^>]*>0.001</td>", html)
    assert "train.batch_size</th>" not in html, "equal parameters are left out"
    assert "B: no difference beyond the spread; C: worse" in html
    assert html.count("<svg") >= 2
    assert "worse by more than the spread" in html, "the leaderboard"
    assert html.count('alt="A, 1"') == 2, "unguided and guided samples of seed 1"
    assert "sweep rates: the first seed of every combination" in html


@pytest.mark.skipif(browser.find() is None, reason="no Chromium here")
def test_the_page_is_legible_on_a_phone_and_on_a_screen(swept, tmp_path):
    _, parent, board = swept
    compare.compare([row.runs[0] for row in board.rows], tmp_path / "page.html", parent.info.run_id)
    with browser.browse(browser.find()) as page:
        for theme, width in (("light", 390), ("dark", 390), ("light", 1280), ("dark", 1920)):
            page_checks.check(page, (tmp_path / "page.html").as_uri(), theme, width)
        assert page.evaluate("document.images.length") >= 6


def test_different_fingerprints_are_refused_in_words(store, tmp_path):
    parent = records.parent(store, "other", "other", sweep_runs.rates(), [])
    one, other = (trial.evaluations[0] for trial in plan.trials(sweep_runs.rates(seeds=1))[:2])
    first = sweep_runs.log(store, parent, one, tmp_path, "a" * 64)
    second = sweep_runs.log(store, parent, other, tmp_path, "b" * 64, fingerprint="e" * 64)
    refused = compare.compare([first, second], tmp_path / "page.html")
    assert len(refused) == 1
    assert (
        "B (learning_rate 0.002, seed 0) are not compared with those of A (learning_rate 0.001, seed 0)" in refused[0]
    )
    html = (tmp_path / "page.html").read_text()
    assert "are not compared with" in html
    assert "no difference beyond the spread" not in html
    assert "Numbers of B" in html


def test_the_refusal_names_what_was_measured_differently():
    a = {"n_distance": 64, "judge": {"classifier": "a"}, "seed": 1}
    b = {"n_distance": 128, "judge": {"classifier": "b"}, "seed": 1}
    assert list(pages._differences(a, b)) == ["another judge", "n_distance is 128 and not 64"]


def test_a_reference_that_names_nothing_is_one_sentence(store):
    with pytest.raises(StageError, match=r"MLflow has no run 0{32}; 'make ui' lists the runs"):
        lookup.find("0" * 32)
    with pytest.raises(StageError, match=r"'nothing' is neither an MLflow run, nor a registered version"):
        lookup.find("nothing")
    with pytest.raises(StageError, match=r"MLflow has no version models:/none/3"):
        lookup.find("models:/none/3")
    with pytest.raises(StageError, match=r"one run cannot be compared"):
        compare.compare(["0" * 32], "page.html")


def test_a_registered_version_and_its_training_run_are_found(work):
    work.register()
    by_version = lookup.find("afterimage-test/1")
    by_run = lookup.find(work.runs("training")[0].info.run_id)
    assert by_version.measured == by_run.measured == lookup.find("models:/afterimage-test@champion").measured
    assert by_version.params["train.learning_rate"] == "0.002"
    assert by_version.params["evaluate.guidance_scale"] == "1.5"
    assert [step for step, _ in by_run.curves["train/loss"]] == list(range(10, 101, 10))


def test_a_finding_has_two_sentences_and_a_figure(swept, tmp_path, monkeypatch):
    client, _, _ = swept
    monkeypatch.setattr(findings.spec, "names", lambda: ["rates", "timesteps"])
    monkeypatch.setattr(findings.spec, "load", lambda name: sweep_runs.rates())
    findings.write([], tmp_path / "findings")
    text = (tmp_path / "findings" / "rates.md").read_text()
    assert (
        "The lowest mean frechet distance unguided is 1.1 ± 0.1 (learning\\_rate 0.001, 3 seeds). Worse by more than "
        "the spread between seeds: learning\\_rate 0.004 (9.1 ± 0.1); no difference beyond it: learning\\_rate 0.002 "
        "(1.15 ± 0.1)."
    ) in text
    assert "python -m flows.sweep rates" in text
    assert (tmp_path / "findings" / "rates.png").read_bytes().startswith(b"\x89PNG")
    index = (tmp_path / "findings" / "README.md").read_text()
    assert "[Rates](rates.md): The lowest mean" in index
    assert "not run yet; `python -m flows.sweep timesteps` runs it." in index
    assert index.count("not run here") == 4
    assert finding.read(client, "timesteps") is None


def test_a_sweep_that_has_not_run_is_one_sentence(store, tmp_path):
    with pytest.raises(StageError, match=r"sweep 'timesteps' has no leaderboard in MLflow; run 'python -m flows.sweep"):
        findings.write(["timesteps"], tmp_path)


def test_the_command_prints_one_sentence(tmp_path):
    command = [sys.executable, "-m", "flows.sweep", "tmesteps"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "sweep: error: there is no sweep 'tmesteps' in sweeps/; did you mean 'timesteps'?\n"
