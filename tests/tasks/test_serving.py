"""`mlflow models serve`, as its own process: a prompt goes in, a PNG comes out."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from PIL import Image

from tests.support import model_outputs
from tests.support.registry import NAME

START_SECONDS = 240


@pytest.mark.slow
def test_mlflow_models_serve_answers_a_prompt_with_a_png(work, tmp_path):
    work.register()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = ["--model-uri", f"models:/{NAME}@champion", "--env-manager", "local"]
    command = [sys.executable, "-m", "mlflow", "models", "serve", *model, "--port", str(port), "--workers", "1"]
    with (tmp_path / "serve.log").open("wb") as log:
        served = subprocess.Popen(command, env=dict(os.environ), stdout=log, stderr=log, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    client.get("/ping").raise_for_status()
                    break
                except httpx.HTTPError:
                    assert served.poll() is None and time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
                    time.sleep(0.5)
            request = {"prompt": "a cat", "seed": 1, "steps": 3}
            first, second = (client.post("/invocations", json={"inputs": [request]}) for _ in range(2))
            assert first.status_code == 200, first.text
            (answer,) = first.json()["predictions"]
            image = Image.open(io.BytesIO(base64.b64decode(answer)), formats=["PNG"])
            assert image.size == (model_outputs.SIZE, model_outputs.SIZE)
            assert second.json() == first.json(), "the same request draws the same image"
            assert client.post("/invocations", json={"inputs": [{"prompt": "a bird"}]}).status_code == 400
    finally:
        os.killpg(served.pid, signal.SIGTERM)
        served.wait(timeout=30)
