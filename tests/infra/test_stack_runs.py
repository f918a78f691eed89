"""`make stack` for real: PostgreSQL, SeaweedFS, MLflow and Prefect with logins, a run of the chain, and a restart.

The tests share one stack and run in their order.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from flows import server
from infra import stack_database, stack_storage
from tests.infra.test_local_stack import TESTS_OWN, command, free_port, free_ports
from tests.support import postgres, secret_search, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}
HOOK = secrets.token_hex(16)
PLANTED = {
    "MLFLOW_TRACKING_USERNAME": "somebody",
    "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(16),
    "PREFECT_API_AUTH_STRING": f"somebody:{secrets.token_hex(16)}",
    "HF_TOKEN": f"hf_{secrets.token_hex(17)}",
    "AFTERIMAGE_WEBHOOK_URL": f"http://127.0.0.1:9/hooks/{HOOK}",
}
"""Variables with secrets, which the stack and its runs have; they are made anew, as the work tree holds this file."""
SECRET = ("MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING", "HF_TOKEN", "AFTERIMAGE_WEBHOOK_URL")
PRIVATE = {".prefect/stack/env", ".prefect/stack/s3.json", ".prefect/mlflow-login.ini"}
"""Files for secrets, which only their owner may read."""
LOGGED = "SELECT message FROM log"
MARKER = secrets.token_hex(16)
"""Put into every store on purpose: the search that finds no secret there must find this."""
LARGE = 3 << 30
"""Bytes of a large model."""


@dataclass
class Stack:
    """A work tree whose stack runs."""

    root: Path
    ports: dict[str, str]
    output: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    """What `source .prefect/stack/env` sets."""

    def places(self) -> dict[str, str]:
        """Variables that keep beside the work tree what processes write outside of it."""
        folders = {name: self.root.parent / name.lower() for name in ("HOME", "TMPDIR")}
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
        return {name: str(folder) for name, folder in folders.items()}

    def start(self) -> str:
        more = PLANTED | self.places()
        done = command(self.root, *(word for pair in self.ports.items() for word in pair), more=more)
        assert done.returncode == 0, done.stderr + self.logs()
        found = re.findall(r"^export (\w+)='?(.*?)'?$", (self.root / server.STACK / "env").read_text(), re.M)
        self.variables = dict(found)
        self.output = done.stdout
        return done.stdout

    def logs(self) -> str:
        return "\n".join(path.read_text()[-1500:] for path in sorted((self.root / server.LOGS).glob("*.log")))

    def python(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Python in the work tree, in a shell that has sourced the file of the stack."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(TESTS_OWN)}
        kept |= self.places() | self.variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        call = [sys.executable, *arguments]
        return subprocess.run(call, cwd=self.root, env=kept, capture_output=True, text=True, timeout=timeout)

    def s3(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.variables["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.variables["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def prefect(self, path: str, body: object = None) -> Any:
        return json.loads(
            answer(f"{self.variables['PREFECT_API_URL']}/{path}", PLANTED["PREFECT_API_AUTH_STRING"], body)[1]
        )

    def query(self, database: str, text: str) -> list[str]:
        programs = stack_database._programs(None)
        call = ["psql", f"--host={self.root / server.STACK / 'postgres'}", "-U", stack_database.USER, "-At", "-c", text]
        done = stack_database._run(programs, [*call, database])
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


def answer(address: str, login: str = "", body: object = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an answer."""
    data = None if body is None else json.dumps(body).encode()
    headers |= {"Content-Type": "application/json"} if data else {}
    request = urllib.request.Request(address, data, headers)  # noqa: S310 - on this machine
    if login:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=60) as got:  # noqa: S310
            return got.status, got.read(), dict(got.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    found = (stack_database._programs(None), shutil.which(stack_storage.PROGRAM, path=server.search_path()))
    if None in found or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs PostgreSQL and the extra stack")
    with postgres.open_folder() as folder:
        root = tiny.tree(folder / "tree")
        ports = {"--port": str(free_port()), "--mlflow-port": str(free_port()), "--storage-port": str(free_ports())}
        running = Stack(root, ports)
        try:
            running.start()
            yield running
        finally:
            done = command(root, "--down")
        assert done.returncode == 0 and server.running(root) == {}


def test_databases_are_in_postgresql_and_artifacts_in_s3(stack):
    assert set(server.running(stack.root)) == {"postgres", "storage", "mlflow", "server", "worker"}
    for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        assert stack.variables[name] in stack.output
    client = (
        "from tasks.runtime import tracking; c = tracking.connect(); r = c.create_run(tracking.experiment_id(c)).info"
    )
    done = stack.python("-c", f"{client}; c.log_text(r.run_id, 'words', 'notes.txt'); print(r.run_id, r.artifact_uri)")
    assert done.returncode == 0, done.stderr
    run, uri = done.stdout.split()
    assert uri.startswith("mlflow-artifacts:/")
    assert run in stack.query("mlflow", "SELECT run_uuid FROM runs")
    assert stack.query("prefect", "SELECT name FROM work_pool") == [server.POOL]
    stored = [one["Key"] for one in stack.s3().list_objects_v2(Bucket=stack_storage.ARTIFACTS)["Contents"]]
    assert any(key.endswith(f"{run}/artifacts/notes.txt") for key in stored)
    assert not list(stack.root.glob("mlflow.db*")) and not list((stack.root / ".prefect" / "home").glob("*.db"))


def test_a_second_start_says_so_and_keeps_the_processes(stack):
    before = server.running(stack.root)
    assert "stack: all of it runs already\n" in stack.start()
    assert server.running(stack.root) == before


def test_clients_without_the_login_are_refused(stack):
    experiments = f"{stack.variables['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=1"
    login = f"{PLANTED['MLFLOW_TRACKING_USERNAME']}:{PLANTED['MLFLOW_TRACKING_PASSWORD']}"
    assert answer(experiments, login)[0] == 200
    for wrong in ("", "somebody:wrong-password-1", "admin:password1234"):
        assert answer(experiments, wrong)[0] == 401, wrong
    assert answer(experiments, login, Host="evil.example")[0] == 403
    flows = f"{stack.variables['PREFECT_API_URL']}/flows/count"
    assert answer(flows, PLANTED["PREFECT_API_AUTH_STRING"], {})[0] == 200
    for wrong in ("", "somebody:wrong", "admin:admin"):
        assert answer(flows, wrong, {})[0] == 401, wrong
    page = answer(flows, PLANTED["PREFECT_API_AUTH_STRING"], {}, Origin="http://evil.example")[2]
    assert "evil" not in page.get("access-control-allow-origin", "") and page.get("access-control-allow-origin") != "*"
    bad = boto3.client(
        "s3", endpoint_url=stack.variables["AWS_ENDPOINT_URL"], aws_access_key_id="a", aws_secret_access_key="b"
    )
    with pytest.raises(Exception, match="InvalidAccessKeyId"):
        bad.list_buckets()
    del stack.variables["MLFLOW_TRACKING_PASSWORD"]
    try:
        done = stack.python("-c", "from tasks.runtime import tracking; tracking.connect()")
        assert "MLFLOW_TRACKING_USERNAME" in done.stderr.splitlines()[-1]
    finally:
        stack.variables["MLFLOW_TRACKING_PASSWORD"] = PLANTED["MLFLOW_TRACKING_PASSWORD"]


def _peak(process: int) -> int:
    """Bytes of memory that a process and its children had at most."""
    every = [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]
    status = (Path(f"/proc/{pid}/status").read_text() for pid in every)
    return sum(int(re.search(r"VmHWM:\s+(\d+)", text)[1]) << 10 for text in status)


def test_a_model_of_3_gb_goes_through_in_parts(stack):
    """The client sends parts to S3 itself, at addresses that the server signs."""
    file = stack.root.parent / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.truncate(LARGE)
        sparse.seek(LARGE // 2)
        sparse.write(b"middle")
    client = (
        "from tasks.runtime import tracking; c = tracking.connect(); r = c.create_run(tracking.experiment_id(c)).info"
    )
    then = (
        f"c.log_artifact(r.run_id, {str(file)!r}, 'model'); print(r.run_id); "
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)"
    )
    started = time.monotonic()
    done = stack.python("-c", f"{client}; {then}", timeout=1800)
    seconds = time.monotonic() - started
    file.unlink()
    assert done.returncode == 0, done.stderr
    run, megabytes = done.stdout.split()
    peak = _peak(server.running(stack.root)["mlflow"].pid) >> 20
    print(f"3 GiB up: {seconds:.0f} s; most memory of the client {megabytes} MiB, of the server {peak} MiB")
    (stored,) = (
        one
        for one in stack.s3().list_objects_v2(Bucket=stack_storage.ARTIFACTS)["Contents"]
        if one["Key"].endswith(f"{run}/artifacts/model/{file.name}")
    )
    assert stored["Size"] == LARGE and "-" in stored["ETag"], "in several parts"
    middle = {"Bucket": stack_storage.ARTIFACTS, "Key": stored["Key"], "Range": f"bytes={LARGE // 2}-{LARGE // 2 + 5}"}
    assert stack.s3().get_object(**middle)["Body"].read() == b"middle"
    assert int(megabytes) < 1500 and peak < 1500
    stack.s3().delete_object(Bucket=stack_storage.ARTIFACTS, Key=stored["Key"])


def test_our_commands_without_the_login_say_so_in_one_sentence(stack):
    for module in ("infra.stack", "flows.on_demand"):
        arguments = [word for pair in stack.ports.items() for word in pair] if module == "infra.stack" else []
        done = command(stack.root, *arguments, module=module)
        assert done.returncode == 1 and "asks for a login; set PREFECT_API_AUTH_STRING" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


def test_the_chain_runs_on_the_worker_and_pushes_its_results(stack):
    done = stack.python("-m", "infra.remote", "s3://dvc/afterimage")
    assert done.returncode == 0, done.stderr
    tiny.git(stack.root, "commit", "--quiet", "--all", "-m", "a remote")
    started = time.monotonic()
    done = stack.python("-m", "flows.on_demand")
    assert done.returncode == 0, done.stderr
    identity = re.search(r"flow-run/(\S+)", done.stdout)[1]
    while (run := stack.prefect(f"flow_runs/{identity}"))["state_type"] not in FINAL:
        assert time.monotonic() < started + 2400, stack.logs()
        time.sleep(2)
    print(f"the chain on the stack: {time.monotonic() - started:.0f} s")
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert stack.query("mlflow", "SELECT count(*) FROM model_versions") == ["1"]
    pages = stack.s3().get_paginator("list_objects_v2").paginate(Bucket="dvc", Prefix="afterimage/")
    keys = [one["Key"] for page in pages for one in page.get("Contents", ())]
    assert any("/files/md5/" in key for key in keys) and any("/runs/" in key for key in keys)
    for log in ((stack.root / server.LOGS / "worker.log").read_text(), "\n".join(stack.query("prefect", LOGGED))):
        assert "Running stage 'register'" in log, "the search for secrets has the output of the last stage"


def test_no_store_holds_a_planted_secret(stack):
    planted = {name: PLANTED[name] for name in SECRET} | {"hook": HOOK}
    planted |= {"S3": stack.variables["AWS_SECRET_ACCESS_KEY"], "Prefect": PLANTED["PREFECT_API_AUTH_STRING"][9:]}
    _mark(stack)
    looked, marked, found, at_home = Counter[str](), Counter[str](), [], set()
    for store, place, body in _everything(stack):
        looked[store] += 1
        if store == "home":
            at_home.add(Path(place).name)
        for name in secret_search.found_in(body, planted | {"marker": MARKER}):
            if name == "marker":
                marked[store] += 1
            else:
                found.append(f"{store}: {place}: {name}")
    print(f"looked into {dict(looked)}; the marker was found in {dict(marked)}")
    assert found == []
    assert {".dvc", "mlflow dump", "prefect dump", "s3://mlflow", "s3://dvc", "Git's objects"} <= set(marked)
    assert {".git", ".prefect/home", ".prefect/logs", ".prefect/workspaces", "command lines"} <= set(looked)
    assert marked["names in s3://dvc"] == 1 and marked["s3://dvc"] == 2, "one of them compressed and in base64"
    assert looked["tmpdir"] == 0, "nothing is left in the folder for temporary files"
    assert {re.sub(r"-v[\d.]+", "", name) for name in at_home} <= {"fontlist.json"}, "no identifier for usage reports"
    for name in PRIVATE:
        assert (stack.root / name).stat().st_mode & 0o077 == 0, name


def _mark(stack: Stack) -> None:
    """Put the marker into every store: MLflow's and Prefect's databases, S3, DVC's cache and remote, Git."""
    client = (
        "from tasks.runtime import tracking; c = tracking.connect(); r = c.create_run(tracking.experiment_id(c)).info"
    )
    done = stack.python("-c", f"{client}; c.set_tag(r.run_id, 'm', {MARKER!r}); c.log_text(r.run_id, {MARKER!r}, 'm')")
    assert done.returncode == 0, done.stderr
    stack.prefect("variables/", {"name": "marker", "value": MARKER})
    (stack.root / "marker.txt").write_text(MARKER)
    for arguments in (("add", "--quiet", "marker.txt"), ("push", "--quiet", "marker.txt.dvc")):
        done = stack.python("-m", "dvc", *arguments)
        assert done.returncode == 0, done.stderr
    (stack.root / "marker.txt").unlink()
    hidden = gzip.compress(base64.b64encode(f"somebody:{MARKER}".encode()))
    for key, body in ((f"names/{MARKER}", b"-"), ("hidden", hidden)):
        stack.s3().put_object(Bucket=stack_storage.DVC, Key=key, Body=body)
    tiny.git(stack.root, "commit", "--quiet", "--allow-empty", "-m", MARKER)


def _everything(stack: Stack) -> Iterator[tuple[str, str, bytes]]:
    """Store, place and content of what any process of the stack has written or shows to other users."""
    beside = [stack.root, *map(Path, stack.places().values())]
    for folder in beside:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and not path.is_symlink() and str(name) not in PRIVATE and path.suffix != ".pyc":
                deep = 2 if name.parts[0] == ".prefect" else 1
                with suppress(FileNotFoundError):  # the servers work
                    store = "/".join(name.parts[:deep]) if folder == stack.root else folder.name
                    yield store, str(path), path.read_bytes()
    for bucket in (stack_storage.ARTIFACTS, stack_storage.DVC):
        for page in stack.s3().get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for one in page.get("Contents", ()):
                body = stack.s3().get_object(Bucket=bucket, Key=one["Key"])["Body"].read()
                yield f"s3://{bucket}", one["Key"], body
                yield f"names in s3://{bucket}", one["Key"], one["Key"].encode()
    programs, host = stack_database._programs(None), f"--host={stack.root / server.STACK / 'postgres'}"
    for database in (stack_database.MLFLOW, stack_database.PREFECT):
        dump = stack_database._run(programs, ["pg_dump", host, "-U", stack_database.USER, database])
        table = {stack_database.MLFLOW: "model_versions", stack_database.PREFECT: "flow_run"}[database]
        assert dump.returncode == 0 and f"COPY public.{table}" in dump.stdout, dump.stderr
        yield f"{database} dump", "", dump.stdout.encode()
    git = ["git", "cat-file", "--batch-all-objects", "--batch"]
    yield "Git's objects", "", subprocess.run(git, cwd=stack.root, capture_output=True, check=True).stdout
    for process in server.running(stack.root).values():
        leader = psutil.Process(process.pid)
        for one in [leader, *leader.children(recursive=True)]:
            with suppress(psutil.Error):  # it has ended
                yield "command lines", process.name, " ".join(one.cmdline()).encode()


def test_a_restart_keeps_everything(stack):
    def contents() -> tuple[object, ...]:
        runs = stack.query("mlflow", "SELECT run_uuid, status FROM runs ORDER BY 1")
        flow_runs = stack.query(
            "prefect", "SELECT id, state_type FROM flow_run WHERE state_type = 'COMPLETED' ORDER BY 1"
        )
        pages = stack.s3().get_paginator("list_objects_v2").paginate(Bucket="dvc")
        return runs, flow_runs, [one["Key"] for page in pages for one in page.get("Contents", ())]

    before = contents()
    done = command(stack.root, "--down")
    assert done.returncode == 0 and server.running(stack.root) == {}
    log = (stack.root / server.LOGS / "postgres.log").read_text()
    assert log.rstrip().endswith("database system is shut down"), "a regular end"
    stack.start()
    assert contents() == before
