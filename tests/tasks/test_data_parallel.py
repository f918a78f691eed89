"""Two processes that each hold the whole network (DDP, gloo): no step waits, and no process for a checkpoint."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.train_inputs import write_inputs, write_params

ROOT = Path(__file__).resolve().parents[2]
RARELY = {"steps": 100, "log_every": 100, "checkpoint_every": 3, "sample_every": 100, "warmup_steps": 0}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_step_waits_and_the_other_process_goes_on_while_a_checkpoint_is_written(tmp_path, migrated_database):
    write_inputs(tmp_path)
    write_params(tmp_path, gradient_accumulation=2, **RARELY)
    (tmp_path / "mlflow.db").write_bytes(migrated_database.read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.support.data_parallel", str(port), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert first["advanced"] == [True], "the second process waited for the checkpoint of the first"
    for found in (first, second):
        assert found["waits"][0] == found["waits"][1] > 0, "each call ends in a checkpoint, which waits; no step does"
        assert found["views"] is True
    assert first["weights"] == second["weights"]
