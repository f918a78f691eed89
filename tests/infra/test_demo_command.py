"""The command of the demo: what it offers, what it refuses before it starts, how it ends."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from infra.demo import __main__ as command
from tests.support import model_outputs

ROOT = Path(__file__).parents[2]


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command says when it ends at once."""
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return str(ended.value)


def test_without_gradio_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert refusal(monkeypatch) == ("demo: error: the package gradio is not installed; run 'make install EXTRA=demo'")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_other_machines_reach_it_only_if_that_is_said(monkeypatch: pytest.MonkeyPatch, capsys, host: str) -> None:
    assert "add --allow-remote if that is meant" in refusal(monkeypatch, "--host", host)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    refusal(monkeypatch, "--host", host, "--allow-remote")
    assert f"warning: other machines can reach this page through {host}" in capsys.readouterr().out


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "localhost", "::1", "[::1]"])
def test_loopback_addresses_need_no_option(host: str) -> None:
    assert command.is_loopback(host)


def test_the_registered_versions_are_offered_newest_first(
    migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infra.demo import catalogue
    from tasks.drawing.place import LOGGED_MODEL
    from tasks.runtime import tracking

    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    (tmp_path / "outputs" / "pipeline").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = tracking.connect()
    client.create_registered_model("digits")
    for number in (1, 2, 3):
        tags = {LOGGED_MODEL: f"m-{number}"} if number != 2 else {}  # the second is of another project
        client.create_model_version("digits", str(tmp_path), tags=tags)
    client.set_registered_model_alias("digits", "champion", "1")
    client.set_registered_model_alias("digits", "other", "2")
    entries = catalogue.entries(None)
    assert [entry.name for entry in entries] == [
        "outputs/pipeline",
        "models:/digits@champion",
        "models:/digits/3",
        "models:/digits/1",
    ]
    assert entries[1].title == "digits@champion (version 1)"
    assert [entry.name for entry in catalogue.entries("models:/digits/1")][:2] == [
        "models:/digits/1",
        "outputs/pipeline",
    ]


def test_without_a_model_it_says_how_to_get_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infra.demo import catalogue
    from tasks.runtime.errors import StageError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    with pytest.raises(StageError, match="--model outputs/pipeline is no folder; run 'make repro'"):
        catalogue.entries(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="the extra demo is not installed")
def test_it_serves_this_machine_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    model_outputs.write_pipeline(tmp_path / "outputs" / "pipeline")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(temporary),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'none.db'}",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.demo", "--port", "7891"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = ""
    while "http" not in line:
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
    address = re.findall(r"http://127\.0\.0\.1:\d+", line)[0]
    assert "gradio" in httpx.get(address).text
    heartbeat = f"{address}/gradio_api/heartbeat/session"  # what an open page keeps waiting for
    with httpx.stream("GET", heartbeat, timeout=30) as waiting:
        assert waiting.status_code == 200
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert out.endswith("demo: ended\n")
    assert list(temporary.iterdir()) == []
