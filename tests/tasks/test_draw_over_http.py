"""A registered model drawn on another machine: MLflow's server keeps the files and gives them out over http."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.images.pixels import to_uint8
from models.noise.samplers import Sampling
from models.pipeline import load_pipeline
from tests.support.registry import NAME, ROOT, workspace_in

pytestmark = pytest.mark.slow


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """MLflow's server with its database and artifacts in `folder`; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "kept"),
    ]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            *store,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ],
        cwd=folder,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_model_is_registered_and_drawn_over_http(tmp_path, exported, migrated_database, monkeypatch):
    work = workspace_in(tmp_path / "team", exported, migrated_database, monkeypatch)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (work.root / "mlflow.db").rename(elsewhere / "mlflow.db")
    with server(elsewhere) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        work.register()
        version = work.client.get_model_version(NAME, "1")
        assert work.client.get_run(version.run_id).info.artifact_uri.startswith("mlflow-artifacts:")
        laptop = tmp_path / "laptop"
        laptop.mkdir()
        options = ["--label", "1", "--seed", "3", "--count", "2", "--sampler", "ddim", "--steps", "4"]
        options += ["--guidance", "1.5", "--out", "drawn"]
        done = subprocess.run(
            [sys.executable, "-m", "tasks.draw", "--model", f"models:/{NAME}@champion", *options],
            cwd=laptop,
            env=os.environ | {"PYTHONPATH": str(ROOT), "AFTERIMAGE_SCRATCH": str(laptop / "scratch")},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    drawn = np.stack([np.asarray(Image.open(laptop / "drawn" / f"{index:04d}.png")) for index in range(2)])[:, None]
    pipeline = load_pipeline(exported / "outputs" / "pipeline")
    assert np.array_equal(drawn, to_uint8(pipeline.sample([3, 4], [1, 1], Sampling("ddim", 4, guidance_scale=1.5))))
