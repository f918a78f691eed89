"""The phase of consistency tuning: it begins from the averaged weights, keeps them, and resumes exactly."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.train_inputs import (
    WEIGHTS,
    copy_of,
    history,
    kill_when,
    prepare_here,
    results,
    start_warm,
    train_here,
    write_inputs,
    write_params,
)

AFTER = 30
DISTIL = {"after": AFTER, "d": 10}
TEACHER = "pipeline/teacher/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, migrated_database):
    """Return the folder of a training of 30 steps with dropout, and 30 of consistency tuning."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_inputs(folder)
    write_params(folder, dropout=0.2, ema_snapshots=0, distil=DISTIL)
    with pytest.MonkeyPatch.context() as patch:
        train_here(folder, patch, migrated_database)
    return folder


def has_step(folder: Path, step: int):
    return lambda: any((folder / "scratch" / "train").glob(f"*/step-{step:08d}/manifest.json"))


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_killed_at_and_after_the_switch_ends_in_the_same_bytes(
    undisturbed, tmp_path, monkeypatch, migrated_database, capsys
):
    copy_of(undisturbed, tmp_path)
    for step in (AFTER, 40):
        process = start_warm(tmp_path, migrated_database)
        kill_when(process, has_step(tmp_path, step))
        assert process.returncode == -signal.SIGKILL, process.output()
    capsys.readouterr()
    train_here(tmp_path, monkeypatch, migrated_database)
    assert "continues at step" in capsys.readouterr().out
    assert results(tmp_path) == results(undisturbed)


def test_the_teacher_is_what_a_training_without_tuning_ends_in(undisturbed, tmp_path, monkeypatch, migrated_database):
    from safetensors.torch import load_file

    from models.pipeline import load_pipeline

    copy_of(undisturbed, tmp_path)
    write_params(tmp_path, dropout=0.2, steps=AFTER, ema_snapshots=0)
    train_here(tmp_path, monkeypatch, migrated_database)
    alone, teacher = load_file(tmp_path / WEIGHTS), load_file(undisturbed / TEACHER)
    assert all((weight == teacher[name]).all() for name, weight in alone.items())
    tuned = load_pipeline(undisturbed / "pipeline")
    assert list(tuned.companions) == ["teacher"]
    assert any((weight != teacher[name]).any() for name, weight in tuned.network.state_dict().items())
    kept, whole = history(tmp_path), history(undisturbed)
    assert whole[: len(kept) - 1] == kept[:-1]  # the last row of a whole run has a held-out loss besides


def test_learning_rate_and_averages_start_anew(undisturbed):
    rates = {int(row["step"]): float(row["learning_rate"]) for row in history(undisturbed)}
    assert rates[28] < 0.0002 < 0.0015 < rates[35]


def test_given_weights_are_tuned_from_the_first_step(undisturbed, tmp_path, monkeypatch, migrated_database):
    """They are the teacher, and no step changes them."""
    from safetensors.torch import load_file

    copy_of(undisturbed, tmp_path)
    shutil.copytree(undisturbed / "pipeline", tmp_path / "trained")
    given = str(tmp_path / "trained")
    write_params(
        tmp_path, dropout=0.2, steps=10, init_from=given, ema_snapshots=0, distil=DISTIL | {"after": 0, "d": 5}
    )
    train_here(tmp_path, monkeypatch, migrated_database)
    weights, teacher = load_file(undisturbed / WEIGHTS), load_file(tmp_path / TEACHER)
    assert all((weight == teacher[name]).all() for name, weight in weights.items())
    tuned = load_file(tmp_path / WEIGHTS)
    assert any((weight != tuned[name]).any() for name, weight in weights.items())


def test_losses_of_the_phases_are_not_compared_for_divergence(undisturbed):
    from tasks import params
    from tasks.training.log import HistoryRow
    from tasks.training.tuning import rows_of_phase

    train = params.load(undisturbed / "params.yaml").train
    row = HistoryRow(step=10, learning_rate=0.1, loss=1.0, loss_by_timestep={}, gradient_norm=None)
    rows = [replace(row, step=step) for step in (10, 20, 30, 40, 50)]
    assert [row.step for row in rows_of_phase(rows, train)] == [40, 50]
    assert [row.step for row in rows_of_phase(rows[:3], train)] == [10, 20, 30]


def test_timesteps_of_the_tuning_have_their_own_distribution(undisturbed, tmp_path, monkeypatch, migrated_database):
    """Log sigma / alpha is N(-2, 0.1^2) here, and the log SNR -2 times that."""
    copy_of(undisturbed, tmp_path)
    write_params(tmp_path, ema_snapshots=0, distil=DISTIL | {"noise_mean": -2.0, "noise_std": 0.1})
    prepared = prepare_here(tmp_path, monkeypatch, migrated_database)
    before, after = (prepared.timesteps.log_snr(prepared.batches.draw(step).t) for step in (AFTER - 1, AFTER))
    assert before.std() > 1.5
    assert float(after.mean()) == pytest.approx(4, abs=0.3) and after.std() < 0.5
    held_out = prepared.timesteps.log_snr(prepared.held_out[0].t)
    assert held_out.std() > 2
