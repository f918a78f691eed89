"""What every stage has before its work begins."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tasks.runtime import stage
from tests.support import commands

ROOT = Path(__file__).parents[2]
FAILS_IN_A_LOOP = """
from tasks.runtime import stage
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress
def fails() -> None:
    bar = progress(desc="fails", total=3)
    bar.update()
    raise StageError("the third image is broken")
stage.main(fails)
"""


def test_threads_wait_briefly_then_sleep_unless_the_environment_says_otherwise(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    stage.limit_openmp_spin()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")) == ("ACTIVE", None)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    stage.limit_openmp_spin()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and 0 < int(os.environ["GOMP_SPINCOUNT"]) < 10_000


def test_the_sentence_of_an_error_has_a_line_of_its_own_below_the_progress_bar():
    done = subprocess.run([sys.executable, "-c", FAILS_IN_A_LOOP], cwd=ROOT, capture_output=True)
    assert done.returncode == 1
    bar, sentence = done.stderr.decode().rstrip("\n").split("\n")
    assert bar.startswith("\rfails:   0%") and sentence == "fails: error: the third image is broken"


def test_a_folder_that_cannot_be_copied_is_one_sentence():
    def copies() -> None:
        raise shutil.Error([("a", "b", "[Errno 13] Permission denied: 'a'"), ("c", "d", "[Errno 13] and so on")])

    done = commands.call(lambda: stage.main(copies))
    assert (done.returncode, done.stderr) == (1, "copies: error: [Errno 13] Permission denied: 'a'\n")
