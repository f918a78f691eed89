"""The Prefect server of this work tree: where its files are, what its processes see, how they start and end.

Everything lies in `.prefect/` of the work tree, so nothing of a user's own Prefect profile is read or written.
Prefect reads its settings when it is imported: what is here must come before that, and imports nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

import psutil

from tasks.runtime import atomic
from tasks.runtime.stage import StageError

HOST = "127.0.0.1"
DEFAULT_PORT = 4200
POOL = "afterimage"
PROCFILE = Path("infra") / "serve.procfile"
RECORD = Path(".prefect") / "processes.json"
LOGS = Path(".prefect") / "logs"
HEARTBEAT_SECONDS = 30
"""How often a flow says that it lives; the least that Prefect allows."""
GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class Process:
    """One line of the process file, running: the leader of a session of its own."""

    name: str
    pid: int
    started: float
    """Seconds since 1970, as the kernel tells: a process with this number and another start is not ours."""
    port: int
    """Of the server, for the server and for those who talk to it."""


def url(port: int) -> str:
    """Address of the server's pages."""
    return f"http://{HOST}:{port}"


def environment(root: Path, port: int | None) -> dict[str, str]:
    """Environment for Prefect in the work tree `root`: its server at `port`, or a passing one of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    home = root / ".prefect" / "home"
    home.mkdir(parents=True, exist_ok=True)  # Prefect makes the last folder of it alone
    settings = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_WORKER_QUERY_SECONDS": "3",  # the server is on this machine; a person who asks waits less
        "PREFECT_CLI_PROMPT": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if port is not None:
        settings |= {"PREFECT_API_URL": f"{url(port)}/api", "PORT": str(port)}
    return inherited | settings


def alive(process: Process) -> bool:
    """Whether it is this very process that runs now, not another one that got its number."""
    try:
        found = psutil.Process(process.pid)
        return _works(found) and abs(found.create_time() - process.started) < 1.0
    except psutil.NoSuchProcess:
        return False


def running(root: Path) -> dict[str, Process]:
    """Those processes of the work tree `root` that are recorded and alive, by name."""
    try:
        recorded = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    processes = [Process(**entry) for entry in recorded]
    return {process.name: process for process in processes if alive(process)}


def start(root: Path, name: str, variables: Mapping[str, str]) -> Process:
    """Start the line `name` of the process file in the background and record it."""
    command = [Template(word).substitute(variables) for word in shlex.split(lines(root)[name])]
    # Prefect's worker ends by a SIGINT of its own, which a shell has those ignore that it starts in the background, and
    # all below them; with a handler here, they have the default.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = root / LOGS / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            cwd=root,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process = Process(name, child.pid, psutil.Process(child.pid).create_time(), int(variables["PORT"]))
    _record(root, {**running(root), name: process})
    return process


def lines(root: Path) -> dict[str, str]:
    """The process file: name -> command, in the order in which they start."""
    try:
        text = (root / PROCFILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StageError(f"{root} holds no {PROCFILE}; run this in the top folder of the work tree") from None
    kept = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {name.strip(): command.strip() for name, _, command in (line.partition(":") for line in kept)}


def stop(root: Path, process: Process) -> None:
    """End a process and all below it, a worker's training, too: SIGTERM, and SIGKILL after the grace.

    SIGTERM goes to the session of the process alone: what runs below it notices its end, and may need some seconds to
    save its work. Forgets the process in the record.
    """
    if alive(process):
        leader = psutil.Process(process.pid)
        everything = [leader, *leader.children(recursive=True)]  # its end makes orphans of them
        os.killpg(process.pid, signal.SIGTERM)
        if not _ended(everything):
            for one in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            _ended(everything)
    left = {name: other for name, other in running(root).items() if name != process.name}
    _record(root, left)


def _ended(processes: list[psutil.Process]) -> bool:
    """Wait until all of them have ended; False if the grace is over before."""
    deadline = time.monotonic() + GRACE_SECONDS
    while any(map(_works, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _works(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _record(root: Path, processes: Mapping[str, Process]) -> None:
    atomic.write_json(root / RECORD, [asdict(process) for process in processes.values()])
