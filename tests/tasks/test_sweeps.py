"""Sweeps: the file, the trials, what makes two of them the same, and the leaderboard in MLflow."""

import shutil

import pytest
import yaml

from tasks.runtime import tracking
from tasks.runtime.errors import StageError
from tasks.sweeps import identity, leaderboard, plan, records, significance, spec
from tasks.sweeps.significance import Sample
from tests.support import sweep_runs, tiny

GOOD = {
    "title": "T",
    "question": "Q?",
    "preset": "digits",
    "grid": {"train.learning_rate": [0.001, 0.002], "train.batch_size": [8, 16]},
    "seeds": [0, 1],
}


@pytest.fixture
def store(tmp_path, migrated_database, monkeypatch):
    """An MLflow store of its own."""
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    return tracking.connect()


def load(folder, **changes):
    document = {key: value for key, value in (GOOD | changes).items() if value is not None}
    (folder / "mine.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return spec.load("mine", folder)


def test_a_grid_trains_every_combination_with_every_seed(tmp_path):
    trials = plan.trials(load(tmp_path))
    assert len(trials) == 8
    assert trials[0].label == "learning_rate 0.001, batch_size 8, seed 0"
    (evaluation,) = trials[-1].evaluations
    assert (evaluation.document["train"]["learning_rate"], evaluation.document["train"]["batch_size"]) == (0.002, 16)
    assert evaluation.document["train"]["seed"] == 1


def test_what_is_evaluated_needs_no_training_of_its_own(tmp_path):
    trials = plan.trials(load(tmp_path, grid=None, evaluate={"guidance_scale": [1, 7.5]}))
    assert len(trials) == 2
    assert [each.case for each in trials[0].evaluations] == ["guidance_scale 1", "guidance_scale 7.5"]
    first, second = (each.document for each in trials[0].evaluations)
    assert first["train"] == second["train"]
    assert second["evaluate"]["guidance_sweep"] == [7.5]


def test_points_are_trained_as_they_are_and_overrides_apply_to_all(tmp_path):
    found = load(tmp_path, grid=None, points=[{"train.steps": 100}, {"train.steps": 200}])
    trials = plan.trials(found, ["train.batch_size=4"])
    assert [each.evaluations[0].document["train"]["steps"] for each in trials] == [100, 200] * 2
    assert {each.evaluations[0].document["train"]["batch_size"] for each in trials} == {4}


WRONG = {
    "an unknown key": ({"gridd": {}}, "mine.yaml: unknown key 'gridd'; did you mean 'grid'?"),
    "nothing varies": ({"grid": None}, "nothing varies"),
    "two ways": ({"points": [{"train.steps": 3}]}, "grid and points exclude each other"),
    "a seed twice": ({"seeds": [1, 1]}, "contain a value twice"),
    "no seed": ({"seeds": []}, "'seeds' is \\[\\]: "),
    "a seed that is text": ({"seeds": ["x"]}, "'seeds.0' is 'x'"),
    "an unknown metric": ({"metrics": ["frechet_distance"]}, "did you mean 'frechet_distance_guided'|unguided"),
    "an evaluation of training": ({"evaluate": {"learning_rate": [1]}}, "evaluate.learning_rate cannot vary"),
    "a parameter twice": ({"overrides": {"train.batch_size": 4}}, "train.batch_size both varies and is fixed"),
    "points of different parameters": (
        {"grid": None, "points": [{"train.steps": 3}, {"train.batch_size": 3}]},
        "the points set different parameters",
    ),
    "an empty range": (
        {"grid": None, "search": {"trials": 2, "parameters": {"train.learning_rate": {"low": 1.0, "high": 0.1}}}},
        "the range from 1 to 0.1 is empty",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_sentence(name, tmp_path):
    changes, sentence = WRONG[name]
    with pytest.raises(spec.SweepError, match=sentence) as caught:
        load(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_parameters_that_cannot_work_are_named_before_anything_runs(tmp_path):
    with pytest.raises(spec.SweepError, match=r"learning_rat 0\.1: unknown parameter 'train\.learning_rat'"):
        plan.validate(load(tmp_path, grid={"train.learning_rat": [0.1]}))
    with pytest.raises(spec.SweepError, match="there is no sweep 'tmesteps' in sweeps/; did you mean 'timesteps'"):
        spec.load("tmesteps")


@pytest.mark.parametrize("name", spec.names())
def test_the_sweeps_of_the_project_are_valid(name):
    assert plan.validate(spec.load(name)) >= 3


@pytest.fixture
def stages(tmp_path):
    """The part of a small `dvc.yaml` that a sweep runs, committed with its code."""
    (tmp_path / "dvc.yaml").write_text(
        yaml.safe_dump(
            {
                "stages": {
                    "encode": {"deps": ["${download.path}", "encode.py"], "params": ["encode"], "outs": ["latents"]},
                    "judge": {"deps": ["latents"], "params": ["judge.seed"], "outs": [{"judge": {"cache": True}}]},
                    "train": {"deps": ["latents", "train.py"], "params": ["train"], "outs": ["model"]},
                    "evaluate": {"deps": ["model", "judge", "eval.py"], "params": ["evaluate"], "metrics": ["m.json"]},
                    "export": {"deps": ["model", "export.py"], "params": ["export"]},
                }
            }
        )
    )
    for name in ("encode.py", "train.py", "eval.py", "export.py"):
        (tmp_path / name).write_text("1")
    tiny.git(tmp_path, "init", "--quiet")
    tiny.git(tmp_path, "add", ".")
    tiny.git(tmp_path, "commit", "--quiet", "-m", "code")
    graph = {
        "encode": [],
        "judge": ["encode"],
        "train": ["encode"],
        "evaluate": ["judge", "train"],
        "export": ["train"],
    }
    return identity.stages(tmp_path, graph)


DOCUMENT = {"encode": {"a": 1}, "judge": {"seed": 1, "x": 2}, "train": {"steps": 3}, "evaluate": {"n": 4}, "export": {}}


def key(stages, folder, **changes):
    upstream = {"encode": {"latents": "abc"}}
    return identity.evaluation_key(stages, DOCUMENT | changes, upstream, identity.code_ids(folder, stages))


def test_only_what_can_change_the_result_is_part_of_the_key(stages, tmp_path):
    assert (stages.upstream, stages.trained) == (("encode", "judge"), ("train", "evaluate"))
    same = key(stages, tmp_path)
    assert same == key(stages, tmp_path, export={"opset": 1}, judge={"seed": 9})
    assert same != key(stages, tmp_path, train={"steps": 4})
    assert same != key(stages, tmp_path, evaluate={"n": 5})
    (tmp_path / "export.py").write_text("2")
    tiny.git(tmp_path, "commit", "--quiet", "-am", "other code")
    assert same == key(stages, tmp_path)
    (tmp_path / "train.py").write_text("2")
    assert same == key(stages, tmp_path), "trials run the committed code"
    tiny.git(tmp_path, "commit", "--quiet", "-am", "code of the training")
    assert same != key(stages, tmp_path)


def test_code_that_is_not_committed_is_refused(stages, tmp_path):
    tiny.git(tmp_path, "rm", "--quiet", "eval.py")
    tiny.git(tmp_path, "commit", "--quiet", "-m", "gone")
    with pytest.raises(StageError, match=r"eval.py is not committed in .*; commit it"):
        identity.code_ids(tmp_path, stages)


def test_trials_with_the_same_parameters_before_training_share_those_stages(stages):
    same = identity.upstream_key(stages, DOCUMENT)
    assert same == identity.upstream_key(stages, DOCUMENT | {"train": {"steps": 5}, "judge": {"seed": 1, "x": 3}})
    assert same != identity.upstream_key(stages, DOCUMENT | {"judge": {"seed": 2}})


def test_welch_decides_whether_means_differ():
    a = Sample.of([1.0, 1.1, 1.2])
    assert significance.differ(a, Sample.of([1.05, 1.15, 1.25])) is False
    assert significance.differ(a, Sample.of([9.0, 9.1, 9.2])) is True
    assert significance.differ(a, Sample.of([9.0])) is None
    # by hand: standard error 0.1 * sqrt(2 / 3), 4 degrees of freedom, t = 2.776
    assert significance.margin(a, Sample.of([2.0, 2.1, 2.2])) == pytest.approx(2.776 * 0.1 * (2 / 3) ** 0.5)


def test_the_quantiles_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom, quantile in enumerate(significance.QUANTILES, 1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-3)


def test_the_leaderboard_ranks_by_mean_and_says_what_differs(store, tmp_path):
    parent, board = sweep_runs.sweep(store, tmp_path)
    assert [row.case for row in board.rows] == ["learning_rate 0.001", "learning_rate 0.002", "learning_rate 0.004"]
    assert [row.verdict for row in board.rows] == [
        "best mean",
        "no difference beyond the spread",
        "worse by more than the spread",
    ]
    assert board.rows[0].samples["frechet_distance_unguided"].mean == pytest.approx(1.1)
    assert leaderboard.Board.from_json(records.leaderboard(store, parent.info.run_id)) == board
    assert store.get_run(parent.info.run_id).info.status == "FINISHED"
    children = store.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=100
    )
    assert len(children) == 9
    assert children[0].data.params["preset"] == "digits"
    assert len(store.get_metric_history(children[0].info.run_id, "train/loss")) == 10


def test_different_fingerprints_are_not_ranked(store, tmp_path):
    specification = sweep_runs.rates(seeds=1)
    parent = records.parent(store, "rates", "rates", specification, [])
    found = []
    for number, trial in enumerate(plan.trials(specification)):
        run = sweep_runs.log(
            store, parent, trial.evaluations[0], tmp_path, f"{number:064}", fingerprint=f"{min(number, 1)}" * 64
        )
        found.append(records.result(store, run))
    board = leaderboard.board(found, specification.metrics, [result.case for result in found], ["x"])
    assert "measured in different ways (fingerprints 000000000000 and 111111111111)" in board.refusal
    assert {row.verdict for row in board.rows} == {""}
    assert "Without a result: x." in leaderboard.markdown(board)


def test_a_sweep_continues_with_what_is_not_finished(store, tmp_path):
    specification = sweep_runs.rates(seeds=1)
    parent = records.parent(store, "rates", "rates", specification, [])
    first, second, _ = (trial.evaluations[0] for trial in plan.trials(specification))
    sweep_runs.log(store, parent, first, tmp_path, "a" * 64)
    failed = records.begin(store, parent, second, "b" * 64)
    records.fail(store, failed, "killed")
    assert records.finished(store, "a" * 64, "rates").seed == 0
    assert records.finished(store, "b" * 64, "rates") is None
    assert records.finished(store, "a" * 64, "another sweep") is None
    assert store.get_run(failed).data.tags[records.REASON] == "killed"
    again = sweep_runs.log(store, parent, second, tmp_path, "b" * 64)
    assert again == failed, "the run is continued, not made twice"
    assert records.REASON not in store.get_run(failed).data.tags
    assert records.parent(store, "rates", "rates", specification, []).info.run_id == parent.info.run_id
