"""kill -9 of PostgreSQL, of the S3 server and of MLflow's server while a stage logs to them, then restart and finish.

Afterwards there is one run with every point, one version, and every file of it in S3 is whole. Only speed and memory of
the training are not replayed after the loss of a server.
"""

from __future__ import annotations

import getpass
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.support.stage_drill import LOGS_TO_MLFLOW, Drill, Entries, Repro, entries, wait_until

pytestmark = pytest.mark.slow  # servers and many stages
ROUNDS = int(os.environ.get("AFTERIMAGE_DRILL_SERVER_ROUNDS") or 1)
SEED = int(os.environ.get("AFTERIMAGE_DRILL_SEED") or 0)
HOST = "127.0.0.1"
START_SECONDS = 900.0
PORTS = ("mlflow", "s3", "s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc")
TABLES = ("runs", "registered_models", "logged_models")
SPEED = re.compile(r"'train/(img_per_s|model_flops_utilisation|peak_memory_mb)'")
"""Points of a training that no file has."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}


def postgres_programs() -> Path | None:
    """Folder of PostgreSQL's programs; Debian's is not on the PATH."""
    found = shutil.which("initdb") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    return Path(found).parent if found else None


class Stores:
    """PostgreSQL, SeaweedFS and MLflow's server on top of them, which may be killed."""

    NAMES = ("postgres", "storage", "mlflow")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with ExitStack() as bound:
            sockets = [bound.enter_context(socket.socket()) for _ in PORTS]
            for each in sockets:
                each.bind((HOST, 0))
            self._ports = dict(zip(PORTS, (each.getsockname()[1] for each in sockets), strict=True))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else getpass.getuser()
        programs = postgres_programs()
        assert programs
        self._programs = programs
        shutil.chown(folder, self._user)
        initdb = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "afterimage", "--auth=trust"]
        self._run([*initdb, "--encoding=UTF8", "--locale=C"])
        (folder / "objects").mkdir()

    @property
    def mlflow(self) -> str:
        return f"http://{HOST}:{self._ports['mlflow']}"

    @property
    def s3(self) -> str:
        return f"http://{HOST}:{self._ports['s3']}"

    def start(self, name: str) -> None:
        """Start a server and wait until it answers."""
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._command(name),
                env=self._environment(),
                user=self._user if name == "postgres" else None,
                cwd="/",
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._ready(name):
            assert time.monotonic() < deadline, (self._folder / f"{name}.log").read_text()[-3000:]
            assert self._processes[name].poll() is None, (self._folder / f"{name}.log").read_text()[-3000:]
            time.sleep(0.2)

    def kill(self, name: str) -> None:
        """Kill -9 of a server with all of its group."""
        os.killpg(self._processes[name].pid, signal.SIGKILL)
        self._processes[name].wait()

    def stop(self) -> None:
        for name in reversed(self._processes):
            if self._processes[name].poll() is None:
                self.kill(name)

    def empty(self) -> None:
        """Remove all runs, models and versions."""
        with closing(self._connect()) as database, database, database.cursor() as cursor:
            cursor.execute(f"TRUNCATE {', '.join(TABLES)} CASCADE")

    def stored(self) -> Entries:
        with closing(self._connect()) as database, database.cursor() as cursor:

            def ask(query: str) -> list[tuple[object, ...]]:
                cursor.execute(query)
                return cursor.fetchall()

            return entries(ask)

    def objects(self) -> dict[str, bytes]:
        """Key -> content of everything in S3."""
        client = self._client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
        keys = [stored["Key"] for page in pages for stored in page.get("Contents", ())]
        return {key: client.get_object(Bucket="mlflow", Key=key)["Body"].read() for key in keys}

    def _client(self):
        import boto3

        names = dict(zip(CREDENTIALS, ("aws_access_key_id", "aws_secret_access_key", "region_name"), strict=True))
        return boto3.client("s3", endpoint_url=self.s3, **{names[name]: value for name, value in CREDENTIALS.items()})

    def _connect(self, name: str = "mlflow"):
        import psycopg2

        return psycopg2.connect(host=str(self._folder), user="afterimage", dbname=name)

    def _command(self, name: str) -> list[str]:
        if name == "postgres":
            postgres = [str(self._programs / name), "-D", str(self._folder / "data")]
            return [*postgres, "-k", str(self._folder), "-c", "listen_addresses="]
        if name == "mlflow":
            database = f"postgresql://afterimage@/mlflow?host={self._folder}"
            server = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self._ports["mlflow"])]
            store = ["--backend-store-uri", database, "--serve-artifacts", "--artifacts-destination", "s3://mlflow"]
            return [*server, *store, "--workers", "1"]
        ports = {
            f"{server}.port{kind}": self._ports[f"{server}{kind}"]
            for server in ("s3", "master", "volume", "filer")
            for kind in ("", ".grpc")
        }
        settings = {"dir": self._folder / "objects", "ip": HOST, "ip.bind": HOST, "s3": "true", "volume.max": 0} | ports
        settings |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "master.telemetry": "false"}
        settings |= {"master.electionTimeout": "1s", "volume.preStopSeconds": 0, "master.volumeSizeLimitMB": 256}
        return ["weed", "server", *(f"-{option}={value}" for option, value in settings.items())]

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        settings = {"PATH": path, "AWS_ENDPOINT_URL": self.s3, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return kept | CREDENTIALS | settings | {"MLFLOW_DISABLE_TELEMETRY": "true"}

    def _ready(self, name: str) -> bool:
        if name == "postgres":
            import psycopg2

            try:
                with closing(self._connect("postgres")) as database:
                    database.autocommit = True
                    with database.cursor() as cursor:
                        cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")
                        if not cursor.fetchone():
                            cursor.execute("CREATE DATABASE mlflow")
            except psycopg2.OperationalError:
                return False
            return True
        if name == "mlflow":
            try:
                urllib.request.urlopen(f"{self.mlflow}/health", timeout=5).close()  # noqa: S310 - on this machine
            except (urllib.error.URLError, OSError):
                return False
            return True
        return self._keeps_objects()

    def _keeps_objects(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self._client()
        try:
            if "mlflow" not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket="mlflow")
            client.put_object(Bucket="mlflow", Key=".ready", Body=b"ready")
        except (BotoCoreError, ClientError):
            return False
        return True

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, user=self._user, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def stores() -> Iterator[Stores]:
    if postgres_programs() is None or shutil.which("weed", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("PostgreSQL or SeaweedFS is not installed")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    if os.geteuid() == 0 and "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres")
    folder = Path(tempfile.mkdtemp(prefix="afterimage-"))  # the user of PostgreSQL cannot enter pytest's folder
    running = Stores(folder)
    try:
        for name in Stores.NAMES:
            running.start(name)
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)


@pytest.mark.timeout(1800 + ROUNDS * 3600)
def test_a_killed_store_loses_and_repeats_nothing(tmp_path, migrated_database, stores: Stores, capsys):
    drill = Drill.make(tmp_path, migrated_database)
    chance = random.Random(SEED)
    faults = []
    rounds = [(stage, victim) for _ in range(ROUNDS) for stage in LOGS_TO_MLFLOW for victim in Stores.NAMES]
    for number, (stage, victim) in enumerate(rounds, 1):
        part, pause = chance.uniform(0.1, 1.0), chance.uniform(0.0, 10.0)
        outcome, found = play(drill, stores, stage, victim, part, pause)
        faults += found
        with capsys.disabled():
            moment = f"{victim} killed at {part:.2f} of {stage}, back after {pause:.0f} s"
            print(f"\nround {number}/{len(rounds)}: {moment}: {outcome}; {found or 'nothing lost'}", end="", flush=True)
    assert not faults


def play(drill: Drill, stores: Stores, stage: str, victim: str, part: float, pause: float) -> tuple[str, list[str]]:
    """Kill `victim` while `stage` runs, start it again after `pause` s, finish; returns the stage's end, and faults."""
    stores.empty()
    for each in reversed(LOGS_TO_MLFLOW):
        drill.undo(each)
    if stage == "register":
        _finish(drill, stores, "train")
    running = Repro(drill.tree, stage, MLFLOW_TRACKING_URI=stores.mlflow)
    wait_until(lambda: running.began, running)
    limit = running.cpu_seconds() + part * drill.cpu_seconds[stage]
    wait_until(lambda: running.cpu_seconds() >= limit, running)
    stores.kill(victim)
    time.sleep(pause)
    stores.start(victim)
    outcome, faults = "went on", []
    if running.wait() != 0:
        sentences = re.findall(rf"^{stage}: error: .*$", running.output, re.M)
        outcome = f"ended: {sentences[0] if sentences else running.output[-300:]}"
        if len(sentences) != 1 or "Traceback" in running.output:
            faults.append(f"no sentence: {running.output[-2000:]}")
    for each in LOGS_TO_MLFLOW[LOGS_TO_MLFLOW.index(stage) :]:
        faults += _finish(drill, stores, each)
    faults += drill.faults("train", drill.store["train"]) + drill.faults("register", _with_speed(drill, stores))
    return outcome, faults + _not_whole(drill, stores.objects())


def _finish(drill: Drill, stores: Stores, stage: str) -> list[str]:
    again = Repro(drill.tree, stage, MLFLOW_TRACKING_URI=stores.mlflow)
    return [f"{stage} failed: {again.output[-2000:]}"] if again.wait() != 0 else []


def _with_speed(drill: Drill, stores: Stores) -> Entries:
    """What the store holds, and the points of speed and memory that it lacks."""
    stored = stores.stored()
    lacking = [row for row in drill.store["register"] if row not in stored and SPEED.search(row)]
    return tuple(sorted([*stored, *lacking]))


def _not_whole(drill: Drill, objects: dict[str, bytes]) -> list[str]:
    """Files of the registered model that S3 does not hold as they are."""
    model = drill.tree / "outputs" / "model"
    contents = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    held = [(key, content) for key, content in objects.items() if "/models/" in f"/{key}"]
    return [
        f"{name} is not in S3, or is cut off"
        for name, content in contents.items()
        if not any(key.endswith(f"/{name}") and found == content for key, found in held)
    ]
