"""What every stage has before its work begins."""

import os

from tasks.runtime import stage


def test_threads_wait_briefly_then_sleep_unless_the_environment_says_otherwise(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    stage.limit_openmp_spin()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")) == ("ACTIVE", None)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    stage.limit_openmp_spin()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and 0 < int(os.environ["GOMP_SPINCOUNT"]) < 10_000
