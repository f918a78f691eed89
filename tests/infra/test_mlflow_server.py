"""The login of MLflow's server: what is refused before it starts, and what it is started with."""

from __future__ import annotations

import configparser
import importlib.util

import pytest

from infra import mlflow_server
from tasks.runtime.errors import StageError

PASSWORD = "a-password-of-some-length"


@pytest.fixture(autouse=True)
def login(monkeypatch):
    monkeypatch.setenv(mlflow_server.NAME, "somebody")
    monkeypatch.setenv(mlflow_server.PASSWORD, PASSWORD)
    monkeypatch.delenv(mlflow_server.DATABASE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())


@pytest.mark.parametrize(
    ("name", "password", "sentence"),
    [
        ("", "", "other machines reach MLflow on 0.0.0.0, so it needs a login"),
        ("somebody", "", "needs both"),
        ("", PASSWORD, "needs both"),
        ("admin", "password1234", "12 characters or more"),
        ("somebody", "short", "12 characters or more"),
    ],
)
def test_a_server_for_other_machines_needs_a_login_of_its_own(name, password, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv(mlflow_server.NAME, name)
    monkeypatch.setenv(mlflow_server.PASSWORD, password)
    with pytest.raises(StageError, match=sentence):
        mlflow_server.prepare("0.0.0.0", 5000, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_on_this_machine_no_login_is_needed(tmp_path, monkeypatch):
    for name in (mlflow_server.NAME, mlflow_server.PASSWORD):
        monkeypatch.delenv(name)
    command, variables = mlflow_server.prepare("127.0.0.1", 5000, "mine:5000", tmp_path)
    assert "--app-name" not in command and "--allowed-hosts" in command
    assert variables["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert variables["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_the_password_is_neither_in_the_command_nor_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv(mlflow_server.DATABASE, "postgresql://me:100%25@host/mlflow")
    command, variables = mlflow_server.prepare("0.0.0.0", 5000, None, tmp_path)
    assert command[-2:] == ["--app-name", "basic-auth"] and PASSWORD not in " ".join(command)
    assert variables["MLFLOW_AUTH_ADMIN_PASSWORD"] == PASSWORD
    file = tmp_path / "mlflow-login.ini"
    assert PASSWORD not in file.read_text() and file.stat().st_mode & 0o077 == 0
    settings = configparser.ConfigParser()
    settings.read(file)
    assert settings["mlflow"]["database_uri"] == "postgresql://me:100%25@host/mlflow"


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StageError, match="make install EXTRA=stack"):
        mlflow_server.prepare("0.0.0.0", 5000, None, tmp_path)
