"""A search with Optuna: points, pruning after a seed, and continuing a study."""

from tasks.sweeps import search
from tasks.sweeps.spec import Interval, Search, Spec

SPEC = Spec(
    title="T",
    question="Q?",
    preset="digits",
    search=Search(
        trials=6,
        startup=2,
        parameters={
            "train.learning_rate": Interval(low=1e-4, high=1e-2, log=True),
            "train.batch_size": Interval(low=8.0, high=64.0, integer=True),
            "diffusion.schedule": ["linear", "cosine"],
        },
    ),
    seeds=[0, 1],
)


def test_a_bad_point_is_pruned_after_its_first_seed_and_the_study_continues(tmp_path):
    path = tmp_path / "study.log"
    study = search.open_study(path, SPEC, [])
    for value in (3.0, 2.0, 1.0):
        point = search.ask(study, SPEC)
        assert 1e-4 <= point.settings["train.learning_rate"] <= 1e-2
        assert isinstance(point.settings["train.batch_size"], int)
        assert not search.report(study, point, value, 1, last=False)
        assert search.report(study, point, value, 2, last=True)
    bad = search.ask(study, SPEC)
    assert search.report(study, bad, 50.0, 1, last=False), "worse than the median of the others"
    left = search.ask(study, SPEC)
    assert search.done(study) == 4

    study = search.open_study(path, SPEC, [])  # the process was killed
    assert search.done(study) == 4
    again = search.ask(study, SPEC)
    assert again.settings == left.settings
    assert [complete for _, complete in search.points(study)] == [True, True, True, False, True]
    assert again.settings not in [settings for settings, _ in search.points(study)[:3]]


def test_another_search_has_another_study(tmp_path):
    path = tmp_path / "study.log"
    study = search.open_study(path, SPEC, [])
    search.fail(study, search.ask(study, SPEC))
    assert search.done(search.open_study(path, SPEC, [])) == 1
    assert search.done(search.open_study(path, SPEC, ["train.steps=5"])) == 0
