"""The first wrong moves of a newcomer end in one sentence that says what to do."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> str:
    """A Python without this project's packages, as the system's is."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return str(folder / "bin" / "python")


@pytest.mark.parametrize(
    "module", ["tasks.preset", "tasks.train", "infra.run", "infra.ui", "flows.pipeline", "flows.serve"]
)
def test_a_python_without_the_packages(bare_python, module):
    command = [bare_python, "-m", module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: this Python ({bare_python}) does not have the packages of this project; run 'make install', then "
        "'source .venv/bin/activate'\n"
    )


def test_a_folder_without_git(tmp_path):
    """As a downloaded zip gives it."""
    archive = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for name in archive.stdout.split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "infra.run", "--dry"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("repro: error: this folder is not a Git repository")
    tiny.git(tmp_path, "init", "--quiet")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Running stage 'download'" in done.stdout
