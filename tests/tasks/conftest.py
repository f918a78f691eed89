"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.shared import made_once
from tests.support.train_inputs import SHORT, prepare_here, small_grids, train_here, write_inputs, write_params


@pytest.fixture(scope="session")
def judged(tmp_path_factory) -> Path:
    """Labelled and captioned digits, and the judge that was trained on them; read them only."""
    from tests.support import judge_inputs

    def make(folder: Path) -> None:
        judge_inputs.write_images(folder)
        judge_inputs.run_judge(folder)

    return made_once(tmp_path_factory, "judged", make)


@pytest.fixture
def trained(tmp_path, monkeypatch, migrated_database):
    """Return a function that runs a training with parameters of the section train, and returns its folder."""

    def call(folder: Path = tmp_path, conditioning: str = "label", **train) -> Path:
        if not (folder / "latents").exists():
            folder.mkdir(exist_ok=True)
            write_inputs(folder, conditioning)
        write_params(folder, conditioning, **SHORT | train)
        with small_grids():
            train_here(folder, monkeypatch, migrated_database)
        return folder

    return call


@pytest.fixture
def prepared(tmp_path, monkeypatch, migrated_database):
    """Return a function that builds a run with parameters of the section train, before its first step."""

    def call(conditioning: str = "label", **train):
        if not (tmp_path / "latents").exists():
            write_inputs(tmp_path, conditioning)
        write_params(tmp_path, conditioning, **train)
        return prepare_here(tmp_path, monkeypatch, migrated_database)

    return call


@pytest.fixture
def small_sample_grids():
    with small_grids():
        yield
