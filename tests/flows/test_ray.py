"""`distributor: ray` of a stage that a flow of Prefect starts."""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.support import tiny
from tests.support.data_inputs import contents

STAGES = ("download", "ingest")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (make install EXTRA=ray)")
def test_a_flow_ingests_on_a_ray_cluster(tmp_path, monkeypatch):
    """The stage starts a cluster of two workers on this machine; it writes the bytes of one process."""
    tree = tiny.tree(tmp_path / "tree", "ingest.distributor=ray", "ingest.workers=2")
    chain = yaml.safe_load((tree / "dvc.yaml").read_text(encoding="utf-8"))
    short = {"stages": {name: chain["stages"][name] for name in STAGES}}
    (tree / "dvc.yaml").write_text(yaml.safe_dump(short, sort_keys=False), encoding="utf-8")
    sessions = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path, as those of sockets must be
    monkeypatch.setenv("RAY_TMPDIR", str(sessions))
    try:
        tiny.run(tree, "flows.pipeline")
        assert list(sessions.rglob("session_*")), "the stage ran without Ray"
    finally:
        shutil.rmtree(sessions)
    asked = (tree / "params.yaml").read_text(encoding="utf-8")
    (tree / "local.yaml").write_text(asked.replace("distributor: ray", "distributor: local"), encoding="utf-8")
    tiny.run(tree, "tasks.ingest", "data/raw", "local/images", "local/quarantine", "--params", "local.yaml")
    assert contents(tree / "data" / "images") == contents(tree / "local" / "images")
    assert contents(tree / "data" / "quarantine") == contents(tree / "local" / "quarantine")
