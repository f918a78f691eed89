"""`make repro`: its summary, memory and signals; `make ui`; the files for accelerate, Docker and CI."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from infra import run as wrapper
from infra import ui
from tasks.params import composition
from tests.support import model_outputs, tiny

ROOT = Path(__file__).resolve().parents[2]

DVC_OUTPUT = """\
Stage 'download' didn't change, skipping
Stage 'ingest' is cached - skipping run, checking out outputs
Running stage 'train':
> python -m tasks.train data/latents
train: data/latents
Updating lock file 'dvc.lock'

Running stage 'register':
register: outputs/model outputs/judge
register: afterimage-digits version 3, champion
"""


def test_the_summary_says_what_dvc_did():
    chain = wrapper.Chain({name: wrapper.Stage() for name in ("download", "ingest", "train", "register", "later")})
    for line in DVC_OUTPUT.splitlines():
        chain.read(line)
    chain.close()
    assert {name: stage.result for name, stage in chain.stages.items()} == {
        "download": "unchanged",
        "ingest": "cached",
        "train": "ran",
        "register": "ran",
        "later": "not reached",
    }
    assert chain.registered == "afterimage-digits version 3, champion"


def test_the_stage_that_ran_last_is_the_one_that_failed():
    chain = wrapper.Chain({"ingest": wrapper.Stage(), "train": wrapper.Stage()})
    for line in DVC_OUTPUT.splitlines()[:5]:
        chain.read(line)
    chain.close(failed=True)
    assert chain.stages["train"].result == "FAILED"
    assert chain.stages["ingest"].result == "cached"


@pytest.mark.parametrize(
    ("result", "shown"), [("ran", ["download", "ingest"]), ("FAILED", ["download", "ingest", "train"])]
)
def test_the_table_of_times_leaves_out_what_was_not_asked_for(result, shown, capsys):
    reached = {"download": wrapper.Stage("unchanged"), "ingest": wrapper.Stage(result, 2.0)}
    wrapper.print_times(wrapper.Chain({**reached, "train": wrapper.Stage()}), 3.0, wrapper.Memory(os.getpid()))
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[2 : 2 + len(shown)]] == shown and rows[2 + len(shown)].startswith("in all")


def test_memory_is_that_of_the_whole_tree():
    """A child that holds 200 MB, under a parent that holds nothing."""
    child = "block = bytearray(b'x' * 200_000_000); print('held', flush=True); import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            memory = wrapper.Memory(process.pid)
            memory.start()
            time.sleep(3 * wrapper.SAMPLE_SECONDS)
            memory.stop()
        finally:
            for descendant in psutil.Process(process.pid).children(recursive=True):
                descendant.kill()
            process.kill()
    assert 200e6 < memory.peak < 300e6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_wrapper(number, tmp_path):
    """The chain's own processes end with the command that a person sees, also when that is killed outright."""
    file = str(tmp_path / "pid")
    inner = f"import os, pathlib, time; pathlib.Path({file!r}).write_text(str(os.getpid())); time.sleep(60)"
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    script = (
        "import sys; from infra.run import interruptible, passed_on\n"
        f"with interruptible([sys.executable, '-c', {middle!r}]) as running: list(passed_on(running.output))"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True) as process:
        inner_pid = int(waited_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        assert psutil.pid_exists(inner_pid)
        os.kill(process.pid, number)
        process.wait(30)
    waited_for(lambda: not alive(inner_pid))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def waited_for(condition):
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_a_failing_chain_is_named_and_its_reason_is_the_stages_own(tmp_path):
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  good: {cmd: echo fine}\n  bad: {cmd: 'echo \"bad: error: no such thing; do that\" >&2; exit 3'}\n",
        encoding="utf-8",
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "infra.run", "--single-item", "good", "bad"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "bad: error: no such thing; do that" in done.stdout
    assert re.search(r"^good +ran", done.stdout, re.MULTILINE) and re.search(r"^bad +FAILED", done.stdout, re.MULTILINE)
    assert done.stderr.strip() == (
        "repro: stopped in stage 'bad'; the reason is above, and the same command continues from here"
    )


def test_first_words_come_at_once():
    """Within a second; measured as work, which a busy machine does not stretch as it does waiting."""
    with subprocess.Popen(
        [sys.executable, "-m", "infra.run", "--dry"], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"repro: the chain of dvc.yaml\n"
        spent = psutil.Process(process.pid).cpu_times()
        process.stdout.read()
    assert spent.user + spent.system < 1


def test_a_taken_port_is_said_before_anything_starts():
    import socket

    with socket.socket() as other:
        other.bind((ui.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "infra.ui", "--port", str(port)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.strip() == f"ui: error: port {port} is in use; name another one: make ui PORT={port + 1}"


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "infra" / "accelerate").glob("*.yaml"))])
def test_accelerate_reads_each_configuration(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "infra" / "accelerate" / f"{name}.yaml"))
    assert config.mixed_precision == "no", "train.precision decides"
    assert config.use_cpu == (name in {"cpu", "cpu_2proc"}), "FSDP on a CPU is set by the project"
    assert (config.num_processes > 1) == name.startswith(("multi", "cpu_2proc", "cpu_fsdp", "fsdp"))


@pytest.mark.slow
def test_two_processes_on_the_cpu_find_each_other(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import torch; from accelerate import Accelerator; a = Accelerator()\n"
        "print(f'{a.num_processes} {a.device.type} {a.reduce(torch.tensor(a.process_index + 1)).item()}\\n', end='')\n"
        "a.end_training()",
        encoding="utf-8",
    )
    config = str(ROOT / "infra" / "accelerate" / "cpu_2proc.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert sorted(done.stdout.split()) == sorted(["2", "cpu", "3"] * 2)


def test_dockerfile_builds_from_the_lock_as_a_normal_user():
    instructions = [
        line.split(maxsplit=1)
        for line in re.sub(r"\\\n", " ", (ROOT / "infra" / "Dockerfile").read_text(encoding="utf-8")).splitlines()
        if line and not line.startswith("#")
    ]
    runs = [value for name, value in instructions if name == "RUN"]
    assert any("install -r /tmp/requirements.lock" in value for value in runs)
    users = [value for name, value in instructions if name == "USER"]
    assert users and users[-1] not in ("root", "0")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".venv", ".env", "data", "mlflow.db*", ".dvc/config.local"} <= set(ignored)


def test_ci_runs_make_test():
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_the_readme_names_every_preset():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in composition.names() if f"`{name}`" not in readme] == []


def test_the_first_results_come_with_the_way_to_a_baseline(tmp_path, monkeypatch):
    """`dvc exp show` and `dvc metrics diff` compare with what the last commit's dvc.lock names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert wrapper.no_baseline() is None, "there is no Git"
    tiny.git(tmp_path, "init", "--quiet")
    assert wrapper.no_baseline() is None, "there are no results"
    for text in ("one", "two"):
        (tmp_path / "dvc.lock").write_text(text)
        assert "git add dvc.lock && git commit" in (wrapper.no_baseline() or "")
        tiny.git(tmp_path, "add", "dvc.lock")
        tiny.git(tmp_path, "commit", "--quiet", "-m", text)
        assert wrapper.no_baseline() is None


def test_the_summary_names_the_guidance_of_each_number(capsys):
    wrapper.print_measures(model_outputs.measurements())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["measure", "guidance", "value", "samples"]
    assert ["frechet_distance", "none", "20", "3", "x", "64", "floor", "10"] in rows
    assert ["label_accuracy", "1.5", "0.99", "3", "x", "32", "real", "images", "1"] in rows
    measured = model_outputs.measurements()
    found = {**measured.measures, "kid": measured.measures["frechet_distance"]}
    wrapper.print_measures(measured.model_copy(update={"headline": "kid", "measures": found}))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][1:3] == ["kid", "frechet_distance"]
    assert ["clip_score", "-", "-", "-", "the", "images", "have", "no", "captions"] in rows
