"""Running stages through DVC: order, what counts as cached, locks, clones, and that nothing outlives its caller.

A toy chain stands in for the real one, with stages that sleep where the real ones compute.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows import clone, dag, dvc, place, repro, server
from tasks.runtime import leash
from tasks.runtime.errors import StageError
from tests.support import cpu

ROOT = Path(__file__).resolve().parents[2]
TOY = """\
stages:
  last:
    cmd: cp second.txt last.txt
    deps: [second.txt]
    outs: [last.txt]
  first:
    cmd: python -c "open('first.txt', 'w').write(open('source.txt').read())"
    deps: [source.txt]
    outs: [first.txt]
  second:
    cmd: cp first.txt second.txt
    deps: [first.txt]
    outs: [second.txt]
  sleeper:
    cmd: python sleeper.py
    outs: [slept.txt]
  broken:
    cmd: 'echo "broken: error: the disk is made of cheese; buy another" >&2; exit 1'
    outs: [never.txt]
"""
SLEEPER = """\
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path("pids.tmp").write_text(f"{os.getpid()} {child.pid}")
os.rename("pids.tmp", "pids")
print("sleeping", flush=True)
time.sleep(600)
"""


def git(where: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=where, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy = tmp_path_factory.mktemp("pristine") / "toy"
    toy.mkdir()
    git(toy, "init", "--quiet")
    subprocess.run(dvc.command("init", "--quiet"), cwd=toy, check=True)
    (toy / "dvc.yaml").write_text(TOY)
    (toy / "sleeper.py").write_text(SLEEPER)
    (toy / "source.txt").write_text("one")
    (toy / ".gitignore").write_text("*.txt\n!source.txt\n/.prefect/\n/pids\n")
    shutil.copy(ROOT / "params.yaml", toy)
    (toy / "requirements.lock").touch()
    git(toy, "add", ".")
    git(toy, "commit", "--quiet", "-m", "toy")
    return toy


@pytest.fixture
def toy(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "lock").open("wb") as file:
        yield file.fileno()


def run(
    stage: str, toy: Path, environment: dict[str, str], descriptor: int, wait: float = 30
) -> tuple[bool, list[str]]:
    output: list[str] = []
    ran = repro.repro(stage, toy, environment, output.append, held=descriptor, wait_seconds=wait)
    return ran, output


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # asked at once: between two questions it may end
        return True


def sleepers(toy: Path) -> list[int]:
    """Processes of the stage `sleeper` and of the child that it started, once both run."""
    wait_for((toy / "pids").exists, 30)
    return [int(pid) for pid in (toy / "pids").read_text().split()]


def test_order_is_that_of_the_dependencies(toy: Path) -> None:
    order = repro.stages(toy)
    assert sorted(order) == ["broken", "first", "last", "second", "sleeper"]
    assert order.index("first") < order.index("second") < order.index("last")


def test_a_chain_that_dvc_cannot_read_is_one_sentence(toy: Path) -> None:
    (toy / "dvc.yaml").write_text("stages: {first: {cmd: 1, nonsense: 2}}")
    with pytest.raises(StageError, match="DVC cannot read the chain"):
        repro.stages(toy)


@pytest.fixture(scope="module")
def real_order() -> list[str]:
    return repro.stages(ROOT)


def test_the_real_chain_is_in_order(real_order: list[str]) -> None:
    assert real_order[0] == "download"
    assert real_order[-1] == "register"


def test_a_stage_runs_once_then_is_cached(toy: Path, environment: dict[str, str], descriptor: int) -> None:
    assert run("first", toy, environment, descriptor)[0] is True
    assert run("first", toy, environment, descriptor)[0] is False
    (toy / "source.txt").write_text("two")
    assert run("first", toy, environment, descriptor)[0] is True
    (toy / "source.txt").write_text("one")
    assert run("first", toy, environment, descriptor)[0] is False, "DVC's run-cache knows this one"
    assert (toy / "first.txt").read_text() == "one"


def test_stages_run_with_all_that_they_depend_on(toy: Path, environment: dict[str, str], descriptor: int) -> None:
    def bring(*stages: str) -> set[str]:
        return repro.repro_with_upstream(stages, toy, environment, print, held=descriptor, wait_seconds=30)

    assert bring("last") == {"first", "second", "last"}
    assert bring("second", "last") == set()
    with pytest.raises(StageError, match=r"^broken: error: the disk is made of cheese; buy another$"):
        bring("last", "broken")


def test_a_failure_is_the_sentence_of_the_stage(toy: Path, environment: dict[str, str], descriptor: int) -> None:
    with pytest.raises(StageError, match=r"^broken: error: the disk is made of cheese; buy another$"):
        run("broken", toy, environment, descriptor)


def test_a_missing_dependency_is_the_sentence_of_dvc(toy: Path, environment: dict[str, str], descriptor: int) -> None:
    with pytest.raises(StageError, match=r"^second: .*first\.txt"):
        run("second", toy, environment, descriptor)


def test_lines_come_live_and_progress_bars_are_thinned() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"one\r\n\x1b[32mtwo\x1b[0m\n" + b"".join(b"\r%d%%" % n for n in range(100)) + b"\r100%\nend")
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        assert list(repro.lines(stream)) == ["one", "two", "0%", "100%", "end"]


def test_a_line_is_passed_on_before_the_stage_ends() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream:
        os.write(writing, b"first\nsec")
        lines = repro.lines(stream)
        assert next(lines) == "first"
        os.write(writing, b"ond\n")
        assert next(lines) == "second"
        os.close(writing)


def flow_like(toy: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process that holds the workspace and runs the stage `sleeper`, as the flow does."""
    program = (
        "import os, pathlib, signal; from flows import clone, repro\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a process in the background ignores it
        "here = pathlib.Path.cwd()\n"
        "with clone.only_run(here, 'the first run', 0, print) as held:\n"
        "    repro.repro('sleeper', here, os.environ, print, held=held, wait_seconds=0)\n"
    )
    return subprocess.Popen([sys.executable, "-c", program], cwd=toy, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_no_process_of_a_stage_outlives_its_flow(
    toy: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    process = flow_like(toy, environment)
    pids = sleepers(toy)
    process.send_signal(number)
    process.wait(timeout=30)
    wait_for(lambda: all(gone(pid) for pid in pids), 10)


def test_killing_the_leash_ends_dvc(toy: Path, environment: dict[str, str]) -> None:
    process = flow_like(toy, environment)
    pids = sleepers(toy)
    holder = next(child for child in psutil.Process(process.pid).children() if "leash.py" in " ".join(child.cmdline()))
    below = holder.children()[0]
    holder.kill()
    wait_for(lambda: gone(below.pid), 10)
    for pid in pids:  # the stages of the real chain end with dvc; the toy does not
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=30) != 0


def test_a_stage_that_ignores_sigterm_is_killed() -> None:
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "deaf\n"
        leash.end_group(child.pid, grace_seconds=1)
        assert gone(child.pid)


def test_the_leash_passes_on_the_exit_code() -> None:
    command = leash.command_line([sys.executable, "-c", "raise SystemExit(7)"])
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait(timeout=30) == 7


def test_a_second_run_in_a_workspace_waits_then_goes_on(toy: Path) -> None:
    said: list[str] = []
    entered = threading.Event()

    def second() -> None:
        with clone.only_run(toy, "the second run", 30, said.append):
            entered.set()

    with clone.only_run(toy, "the first run", 0, said.append):
        thread = threading.Thread(target=second)
        thread.start()
        wait_for(lambda: bool(said), 10)
        assert not entered.is_set()
    thread.join(timeout=30)
    assert entered.is_set()
    assert len(said) == 1
    assert said[0].startswith("the first run")
    assert "waiting up to 30 s" in said[0]


def test_a_second_run_gives_up_with_one_sentence(toy: Path) -> None:
    with (
        clone.only_run(toy, "the first run", 0, print),
        pytest.raises(StageError, match=r"^the first run \(process \d+\) uses .* cancel it or try again later$"),
        clone.only_run(toy, "the second run", 0, print),
    ):
        pass


def test_the_workspace_stays_locked_until_the_last_process_of_a_killed_run_is_gone(
    toy: Path, environment: dict[str, str]
) -> None:
    process = flow_like(toy, environment)
    pids = sleepers(toy)
    process.kill()
    with clone.only_run(toy, "the second run", 30, print):
        assert all(gone(pid) for pid in pids)
    process.wait()


def test_a_stage_waits_for_a_person_who_runs_dvc(toy: Path, environment: dict[str, str], descriptor: int) -> None:
    person = subprocess.Popen(dvc.command("repro", "--single-item", "sleeper"), cwd=toy, env=environment)
    pids = sleepers(toy)
    with pytest.raises(StageError, match="another DVC command has kept"):
        run("sleeper", toy, environment, descriptor, wait=0)
    person.kill()
    person.wait()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def update(root: Path, name: str = "nightly", preset: str | None = None, overrides: tuple[str, ...] = ()) -> list[str]:
    said: list[str] = []
    folder = clone.folder(root, name)
    with clone.only_run(folder, "a test", 0, print):
        clone.update(root, folder, preset, overrides, said.append)
    return said


def test_a_clone_follows_commits_and_leaves_the_work_tree_alone(toy: Path) -> None:
    (toy / "source.txt").write_text("not committed")
    said = update(toy)
    there = clone.folder(toy, "nightly")
    assert (there / "source.txt").read_text() == "one"
    assert any("not committed, so not used: source.txt" in line for line in said)

    (there / "params.yaml").write_text("scribble of a run")
    git(toy, "commit", "--quiet", "--all", "-m", "next")
    update(toy)
    assert (there / "source.txt").read_text() == "not committed"
    assert (there / "params.yaml").read_text() == (toy / "params.yaml").read_text()
    assert git(toy, "status", "--porcelain") == ""


def test_a_work_tree_without_results_takes_them_from_the_remote(
    toy: Path, environment: dict[str, str], descriptor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a committed dvc.lock, of which `dvc pull --run-cache` would fetch no object."""
    add = ["remote", "add", "--quiet", "--default", "storage", str(tmp_path / "remote")]
    subprocess.run(dvc.command(*add), cwd=toy, check=True)
    git(toy, "commit", "--quiet", "--all", "-m", "a remote")
    assert run("first", toy, environment, descriptor)[0]
    subprocess.run(dvc.command("push", "--quiet", "--run-cache"), cwd=toy, check=True)
    other = tmp_path / "other"
    git(tmp_path, "clone", "--quiet", str(toy), str(other))
    monkeypatch.chdir(other)
    variables = environment | {repro.PULL: place.environment()[repro.PULL]}
    assert run("first", other, variables, descriptor)[0] is False
    assert (other / "first.txt").read_text() == "one"
    assert run("second", other, variables, descriptor)[0], "what no remote has is computed"
    assert repro.PULL not in place.environment(), "now it has results of its own"


def test_a_clone_finds_in_the_shared_cache_what_the_work_tree_computed(
    toy: Path, environment: dict[str, str], descriptor: int
) -> None:
    assert run("first", toy, environment, descriptor)[0] is True
    update(toy)
    there = clone.folder(toy, "nightly")
    assert run("first", there, environment, descriptor)[0] is False
    assert (there / "first.txt").read_text() == "one"


def test_a_stale_entry_of_a_killed_dvc_does_not_block_a_clone(
    toy: Path, environment: dict[str, str], descriptor: int
) -> None:
    update(toy)
    there = clone.folder(toy, "nightly")
    entry = {"write": {str(there / "first.txt"): {"pid": os.getpid(), "cmd": "dvc repro"}}}
    (there / ".dvc" / "tmp").mkdir(exist_ok=True)
    (there / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(entry))
    with pytest.raises(StageError, match="another DVC command"):
        run("first", there, environment, descriptor, wait=0)
    update(toy)
    assert run("first", there, environment, descriptor, wait=0)[0] is True


def test_overrides_without_a_preset_are_refused(toy: Path) -> None:
    with pytest.raises(StageError, match="name one as well"):
        update(toy, overrides=("train.steps=1",))


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp/x", "UPPER", "-x"])
def test_a_name_of_a_workspace_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(StageError, match="not a valid name"):
        clone.folder(tmp_path, name)


def test_a_tree_without_a_commit_is_one_sentence(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    with pytest.raises(StageError, match="a deployment runs the committed state"):
        update(tmp_path)


def test_a_source_that_is_not_committed_is_one_sentence(toy: Path) -> None:
    (toy / "my-images.zip").touch()
    text = (toy / "params.yaml").read_text()
    text = text.replace("source: digits", "source: folder").replace("path: tasks/presets/none", "path: my-images.zip")
    (toy / "params.yaml").write_text(text)
    git(toy, "commit", "--quiet", "-m", "own images", "params.yaml")
    with pytest.raises(StageError, match=r"'my-images\.zip' is not committed"):
        update(toy)


def test_the_stages_are_listed_compactly_with_what_they_read(real_order: list[str]) -> None:
    command = [sys.executable, "-m", "flows.dag"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == real_order
    assert "train      <- validate, codec, encode, prior" in lines
    assert max(map(len, lines)) < 80


def test_a_stage_that_reads_from_many_takes_several_lines() -> None:
    graph = {f"stage-with-a-long-name-{number}": [] for number in range(6)}
    lines = dag.rows(graph | {"last": list(graph)})
    assert len(lines) > 7
    assert max(map(len, lines)) < 80


def test_make_passes_the_port_and_the_preset_on() -> None:
    def prints(*arguments: str) -> str:
        return subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert "flows.serve --port 4300\n" in prints("serve", "PORT=4300")
    assert prints("serve").endswith("flows.serve \n")
    assert "infra.ui --port 4300\n" in prints("ui", "PORT=4300")
    assert "flows.on_demand digits train.steps=9\n" in prints("run", "PRESET=digits", "ARGS=train.steps=9")


def test_a_dead_server_in_the_environment_is_one_sentence() -> None:
    with socket.socket() as free:  # bound, and no process listens
        free.bind((server.HOST, 0))
        address = f"http://{server.HOST}:{free.getsockname()[1]}/api"
        environment = {**os.environ, "PREFECT_API_URL": address.replace("//", "//somebody:secret@")}
        command = [sys.executable, "-m", "flows.pipeline"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("pipeline: error: no Prefect server answers at http://***@127.0.0.1:")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stdout + done.stderr


def test_prefect_knows_the_settings_that_it_is_given(tmp_path: Path) -> None:
    """A misspelt variable would be ignored."""
    program = (
        "from prefect.settings import get_current_settings as get; s = get()\n"
        "print(s.server.concurrency.lease_storage, s.flows.heartbeat_frequency)"
    )
    command = [sys.executable, "-c", program]
    environment = server.environment(tmp_path, 4200)
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["prefect.server.concurrency.lease_storage.filesystem", "30"]


def test_stop_ends_the_server_last_whatever_started_first(tmp_path: Path) -> None:
    (tmp_path / server.PROCFILE).parent.mkdir()
    (tmp_path / server.PROCFILE).write_text("server: sleep 600\nworker: sleep 600\n")
    variables = {**os.environ, "PORT": "0"}
    started = [server.start(tmp_path, name, variables) for name in ("worker", "server")]  # as after a server's restart
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flows.stop"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert re.findall(r"stop: (\w+)", done.stdout) == ["worker", "server"], done.stderr
    assert not any(server.alive(process) for process in started)


def test_a_copied_work_tree_does_not_stop_the_server_of_the_original(tmp_path: Path) -> None:
    original, copy, moved = tmp_path / "original", tmp_path / "copy", tmp_path / "moved"
    (original / server.PROCFILE).parent.mkdir(parents=True)
    (original / server.PROCFILE).write_text("server: sleep 600\n")
    started = server.start(original, "server", {**os.environ, "PORT": "0"})
    try:
        shutil.copytree(original, copy)
        assert server.running(original) == {"server": started}
        assert server.running(copy) == {} and server.elsewhere(copy) == original.resolve()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "flows.stop"]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        assert f"was copied from {original.resolve()}, whose processes continue" in done.stdout, done.stderr
        assert server.alive(started)
        original.rename(moved)
        assert server.running(moved) == {"server": started}, "a moved work tree keeps its server"
    finally:
        server.stop(moved if moved.exists() else original, started)
    assert not server.alive(started)


def test_a_record_of_another_version_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / server.RECORD).parent.mkdir(parents=True)
    (tmp_path / server.RECORD).write_text("[]")
    with pytest.raises(StageError, match="is of another version; end the processes that it lists, then delete it"):
        server.running(tmp_path)


def test_a_process_that_got_the_number_of_ours_is_not_ours(tmp_path: Path) -> None:
    here = psutil.Process()
    ours = server.Process("server", here.pid, server._started(here), 4200)
    assert server.alive(ours)
    assert not server.alive(server.Process("server", here.pid, server._started(here) - 1000, 4200))


@pytest.mark.parametrize("module", ["flows.dag", "flows.on_demand", "flows.pipeline", "flows.serve", "flows.stop"])
def test_the_commands_answer_at_once_and_without_torch(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    with cpu.at_most(1):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m " + module)
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "prefect", "mlflow"}


def test_the_flow_imports_no_torch() -> None:
    program = "import sys, flows.chain; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
