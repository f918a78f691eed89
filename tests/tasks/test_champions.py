"""Who is and was champion: the history in tags, rollbacks, and checks of champion and challenger on present data."""

from __future__ import annotations

import json
import shutil

import pytest

from tasks import champion_check, rollback
from tasks.params import EvaluateParams, ImageParams, JudgeParams
from tasks.registration import champions
from tasks.registration.champions import Reign
from tasks.runtime import tracking
from tasks.runtime.errors import StageError
from tests.support import model_outputs
from tests.support.commands import call
from tests.support.registry import NAME, PARAMS, write_digits
from tests.support.webhook import receiving


@pytest.fixture
def store(tmp_path, migrated_database, monkeypatch):
    """A registered model with four versions and no champion."""
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    client = tracking.connect()
    client.create_registered_model(NAME)
    for _ in range(4):
        client.create_model_version(NAME, source=str(tmp_path))
    return client


def promote(client, number: int, now: str) -> None:
    champions.set_champion(client, client.get_model_version(NAME, str(number)), f"promoted {number}", now=now)


def test_history_after_three_promotions_and_two_rollbacks(store):
    for number, day in ((1, "01"), (2, "02"), (4, "03")):
        promote(store, number, f"2026-11-{day}T00:00:00Z")
    promote(store, 4, "2026-11-04T00:00:00Z")  # nothing changes
    found, alias = rollback.reigns(NAME)
    assert [(reign.version, reign.since[8:10]) for reign in found] == [(1, "01"), (2, "02"), (4, "03")] and alias == 4
    assert champions.at(found, "2026-11-02T23:00:00Z").version == 2
    assert champions.at(found, "2026-10-31T00:00:00Z") is None

    past = call(rollback.main, "--name", NAME, "--history", "--at", "2026-11-02T23:00:00Z")
    assert past.stdout.splitlines()[1].split()[1] == "2" and past.stderr == "", "the present alias is another matter"

    assert rollback.rollback(NAME, reason="blurry") == f"version 2 of {NAME} is champion again, in place of version 4"
    assert rollback.rollback(NAME).startswith("version 1 "), "not the version that the first one replaced"
    with pytest.raises(StageError, match="has had no champion before"):
        rollback.rollback(NAME)
    found, alias = rollback.reigns(NAME)
    assert [reign.version for reign in found] == [1, 2, 4, 2, 1] and alias == 1
    replaced = store.get_model_version(NAME, "4")
    assert "version 2 restored, blurry" in champions.why_withdrawn(replaced)
    assert store.get_model_version(NAME, "2").tags["afterimage.withdrawn"]
    rollback.rollback(NAME, to=4)
    assert champions.why_withdrawn(store.get_model_version(NAME, "4")) is None
    assert rollback.reigns(NAME)[1] == 4


def test_a_champion_from_before_the_history_is_its_first_entry(store):
    store.set_registered_model_alias(NAME, "champion", "3")
    promote(store, 4, "2999-01-01T00:00:00Z")
    found, _ = rollback.reigns(NAME)
    assert [(reign.version, reign.reason) for reign in found] == [(3, champions.BEFORE), (4, "promoted 4")]
    assert rollback.rollback(NAME).startswith("version 3 ")


def test_a_crash_between_tag_and_alias_is_repaired_by_the_next_decision(store, monkeypatch):
    promote(store, 1, "2026-11-01T00:00:00Z")
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "set_registered_model_alias", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            promote(store, 2, "2026-11-02T00:00:00Z")
    promote(store, 2, "2026-11-03T00:00:00Z")
    found, alias = rollback.reigns(NAME)
    assert [reign.version for reign in found] == [1, 2] and alias == 2


def test_the_command_prints_the_history(store):
    promote(store, 2, "2026-11-02T00:00:00Z")
    shown = call(rollback.main, "--name", NAME, "--history").stdout.splitlines()
    assert shown[1].split() == ["2026-11-02T00:00:00Z", "2", "promoted", "2"]
    as_json = json.loads(call(rollback.main, "--name", NAME, "--history", "--json").stdout)
    assert [Reign(**one).version for one in as_json] == [2]
    early = call(rollback.main, "--name", NAME, "--history", "--at", "2026-01-01T00:00:00Z")
    assert early.returncode == 1 and "had no champion at" in early.stderr
    wrong = call(rollback.main, "--name", NAME, "--history", "--at", "yesterday")
    assert wrong.returncode == 1 and "'yesterday' is no time; write it as 2026-11-26T12:00:00Z" in wrong.stderr
    assert "MLflow has no registered model nothing" in call(rollback.main, "--name", "nothing").stderr


@pytest.mark.parametrize(
    ("moment", "version"),
    [
        ("2026-11-02", 1),
        ("2026-11-02T12:00:00Z", 2),
        ("2026-11-02T12:00:00", 2),
        ("2026-11-02T12:00:00.5+00:00", 2),
        ("2026-11-02T12:30:00+01:00", 1),
        ("2026-11-02T11:30:00-01:00", 2),
    ],
)
def test_the_champion_at_a_time_with_or_without_an_offset(moment, version):
    reigns = [Reign(1, "2026-11-01T12:00:00Z", ""), Reign(2, "2026-11-02T12:00:00Z", "")]
    found = champions.at(reigns, moment)
    assert found is not None and found.version == version


@pytest.mark.parametrize("arguments", [["--at", "2026-11-02T00:00:00Z"], ["--json"], ["--history", "--to", "1"]])
def test_an_option_of_the_history_alone_rolls_nothing_back(store, arguments):
    promote(store, 1, "2026-11-01T00:00:00Z")
    promote(store, 2, "2026-11-02T00:00:00Z")
    done = call(rollback.main, "--name", NAME, *arguments)
    assert done.returncode == 2 and "--history" in done.stderr
    assert rollback.reigns(NAME)[1] == 2


def test_the_gates_do_not_promote_a_withdrawn_version_again(work):
    work.register(learning_rate=1e-3, distance=20.0)
    work.register(learning_rate=2e-3, distance=10.0)
    assert work.aliases["champion"] == 2
    rollback.rollback(NAME)
    work.again()
    assert work.aliases == {"challenger": 2, "champion": 1}
    assert "withdrawn by a rollback" in work.promotion(2)


def test_a_check_measures_both_versions_once_and_promotes_the_better(work, capsys):
    """Versions 1 and 2 have equal weights; the numbers remembered of the champion then become worse."""
    from tasks.judge import judge

    images, folder = work.root / "data" / "images", work.root / "outputs" / "judge"
    work.register(learning_rate=1e-3, distance=20.0)
    work.register(learning_rate=2e-3, distance=30.0)
    assert work.aliases == {"challenger": 2, "champion": 1}
    write_digits(images)
    size = ImageParams(resolution=model_outputs.SIZE, channels=1)
    judge(images, work.root / "data" / "accepted.json", folder, JudgeParams(classifier_steps=15, clip_steps=5), size)
    evaluate = EvaluateParams(
        sampler="ddim",
        steps=2,
        n_distance=24,
        n_accuracy=12,
        n_compare=2,
        n_slowest=2,
        guidance_scale=1.5,
        seed_blocks=3,
        allow_small_n=True,
    )
    lenient = {"max_distance_over_floor": 1e9, "min_label_accuracy": 0.0, "min_clip_over_real": 0.0}
    params = PARAMS.model_copy(update=lenient | {"max_near_copies": 1.0})
    capsys.readouterr()
    first = champion_check.check(images, folder, params, evaluate)
    assert not first.promoted and "does not beat the champion's" in first.sentence
    assert capsys.readouterr().out.count("measuring version") == 2
    assert champion_check.check(images, folder, params, evaluate) == first
    assert "measuring" not in capsys.readouterr().out, "without new data nothing is drawn"
    record = json.loads(work.versions[2].tags[champion_check.CHECKED])
    assert record["decision"] == first.sentence == work.promotion(2)

    (name,) = [name for name in work.versions[1].tags if name.startswith("afterimage.measured.")]
    worse = json.loads(work.versions[1].tags[name]) | {"frechet_distance_unguided": "1e9"}
    work.client.set_model_version_tag(NAME, "1", name, json.dumps(worse))
    assert champion_check.check(images, folder, params, evaluate).promoted
    assert work.aliases == {"challenger": 2, "champion": 2}
    again = champion_check.check(images, folder, params, evaluate)
    assert not again.promoted and again.sentence.startswith("version 2 is champion and challenger; ")


def test_a_new_champion_is_announced_and_an_unreachable_webhook_fails_nothing(store, monkeypatch, capsys):
    with receiving() as receiver:
        monkeypatch.setenv("AFTERIMAGE_WEBHOOK_URL", receiver.address)
        promote(store, 1, "2026-11-01T00:00:00Z")
        promote(store, 1, "2026-11-02T00:00:00Z")  # nothing changes
        promote(store, 2, "2026-11-03T00:00:00Z")
        rollback.rollback(NAME, reason="blurry")
        events = [(body["event"], body["version"], body["replaces"]) for body in receiver.received]
        assert events == [("promoted", 1, None), ("promoted", 2, 1), ("rolled-back", 1, 2)]
        assert receiver.received[-1]["text"].endswith("in place of version 2: restored by a rollback: blurry")
        receiver.status = 500
        promote(store, 3, "2026-11-04T00:00:00Z")
    promote(store, 4, "2026-11-05T00:00:00Z")
    assert rollback.reigns(NAME)[1] == 4
    said = capsys.readouterr().out
    assert "the webhook was not called: 127.0.0.1: status 500" in said
    assert "the webhook was not called: 127.0.0.1: URLError" in said and "a-secret-path" not in said
