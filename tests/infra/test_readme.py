"""The README's commands run in their order, in a clone; its sampler runs outside this project on saved weights.

A command or a block of code that is in none of the tables here fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import documents, tiny
from tests.support.documents import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = documents.blocks(README)

IN_ORDER = [
    "make repro",
    "make help",
    "source .venv/bin/activate",
    "dvc metrics show",
    "dvc plots show",
    "cd outputs/onnx && python -m afterimage_bundle.bundle --label 3 --seed 0 --out ../three.png",
    "make dag",
    "dvc repro",
    'git commit -m "Results of this machine" dvc.lock',
    "dvc exp run -S train.learning_rate=0.001",
    "dvc exp run --temp -S train.optimizer=adamw",
    "dvc exp show --only-changed --drop '.*/'",
    "dvc params diff",
    'make draw ARGS="--label 3 --count 4 --out threes.png"',
    "python -m tasks.preset --list",
    "python -m tasks.preset digits conditioning=text",
]
"""Commands that run in one shell of a clone with tiny parameters, in the README's order."""

SERVERS = "starts servers that stay; tests/flows/test_prefect_server.py and tests/infra/test_infra.py do"
LONG = "takes minutes to hours, and so do what it runs; see the other tests"
DATA = "needs images or a network; its parameters are composed"
NOT_HERE = {
    "make repro PYTHON=python3.12": "would make another environment",
    "make test": LONG,
    "make drills": LONG,
    "pytest -m slow": LONG,
    "pytest -m gpu": "needs a GPU",
    "python -m flows.pipeline": "tests/flows/test_flows.py runs it",
    "make demo": SERVERS,
    "make docs": "needs the extra docs; tests/infra/test_site.py builds the site",
    "make ui": SERVERS,
    "make serve": SERVERS,
    "make serve PORT=4300": SERVERS,
    "make stack": "starts servers that stay; tests/infra/test_local_stack.py does",
    "python -m infra.migrate_store": "tests/infra/test_migrate_store.py runs it",
    "make stop": SERVERS,
    "make verify": "the tiny model of this test is refused; tests/flows/test_verify.py runs it",
    "make reproduce VERSION=1": "tests/flows/test_verify.py runs it",
    "python -m tasks.rollback": "needs two champions; tests/tasks/test_champions.py runs it",
    "make run PRESET=digits ARGS=train.steps=9": SERVERS,
    "make sweep NAME=timesteps": LONG,
    "python -m tasks.compare": "tests/tasks/test_compare.py runs it",
    "python -m tasks.preset NAME [key=value ...]": "names its parts only",
    "python -m tasks.preset folder download.path=~/pictures && make repro": DATA,
    "python -m tasks.preset folder download.url=s3://bucket/pictures/ && make repro": DATA,
    "python -m tasks.preset hub download.hub.repo=OWNER/NAME": DATA,
}
"""Commands of which only the form is checked, with the reason."""

PYTHON = {"UNet2DModel": "test_sampler_runs_without_this_project", "mlflow.pyfunc": "test_commands_in_their_order"}
"""A word in each Python block, and the test that runs that block."""


def test_every_command_and_block_is_known():
    known = {*IN_ORDER, *NOT_HERE}
    assert set(documents.commands(README)) == known, "add it to IN_ORDER, or to NOT_HERE with the reason"
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "mermaid"}
    for block in (block for kind, block in BLOCKS if kind == "python"):
        assert sum(word in block for word in PYTHON) == 1, f"no test runs this block:\n{block}"
    assert set(PYTHON.values()) <= set(globals())


@pytest.mark.parametrize("command", [*IN_ORDER, *NOT_HERE])
def test_command_has_a_form_that_its_program_takes(command, tmp_path):
    documents.require_form(command, tmp_path)
    assert command in IN_ORDER or not command.startswith(("cd ", "source ", "git ")), "nothing checks its form"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_commands_in_their_order(tmp_path):
    """In a fresh shell of a clone that has its `.venv`; the gates of a first version let a tiny model pass."""
    clone = tiny.tree(tmp_path / "clone")
    shutil.copy(ROOT / "dvc.lock", clone)
    (clone / ".venv").symlink_to(sys.prefix)
    passing = ["register.min_label_accuracy=0.0", "register.max_distance_over_floor=1e9"]
    composed = [sys.executable, "-m", "tasks.preset", "digits", *tiny.OVERRIDES, *passing]
    subprocess.run(composed, cwd=clone, check=True, capture_output=True)
    tiny.git(clone, "add", ".")
    tiny.git(clone, "commit", "--quiet", "-m", "tiny parameters")
    shell = ['make() { command make -o install "$@"; }']  # the environment is there
    shell += [f"({command})" if command.startswith("cd ") else command for command in IN_ORDER]
    shell.insert(shell.index("dvc params diff") + 1, "git checkout -q params.yaml && python ../served.py")
    block = next(block for kind, block in BLOCKS if kind == "python" and "mlflow.pyfunc" in block)
    (tmp_path / "served.py").write_text(f"{block}\nassert png.startswith(b'\\x89PNG')\nprint('served')")
    environment = {
        name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS") if name in os.environ
    }
    environment |= {"PATH": "/usr/local/bin:/usr/bin:/bin", "GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@test"}
    environment |= {"GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@test"}
    done = subprocess.run(
        ["bash", "-exc", "\n".join(shell)], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "served" in done.stdout and (clone / "outputs" / "three.png").exists()
    assert "train.learning_rate" in done.stdout


@pytest.mark.slow
def test_sampler_runs_without_this_project(tmp_path):
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "UNet2DModel" in b)
    assert len(block.strip().splitlines()) <= 20
    from tests.support import random_digits

    random_digits.save(tmp_path / "outputs" / "pipeline")
    code = (
        f"{block}\nassert images.shape == (10, 1, 16, 16) and 0 <= images.min() and images.max() <= 1\nprint('drawn')"
    )
    # -I: neither the current folder nor the environment adds to the path, so nothing of this project is found
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "drawn", done.stderr


def test_the_results_name_the_class_of_cpu_and_the_spread_between_machines():
    results = README.partition("## Results")[2].partition("\n## ")[0]
    assert re.search(r"Measured on two cores of an? .*AVX", results)
    assert re.search(r"differ by a\s+tenth between machines", results)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z]+)", README))))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"^\| `([a-z0-9_]+)` \|", README, re.M))))
def test_presets_exist(name):
    assert (ROOT / "tasks" / "presets" / f"{name}.yaml").exists()
