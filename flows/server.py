"""The Prefect server and worker of this work tree: their files, environment, start and end.

All files are in `.prefect/` of the work tree, so the user's own Prefect profile is neither read nor written. Prefect
reads its settings when it is imported; this module is used before that and does not import it.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import pwd
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

import psutil

from tasks.runtime import atomic, loopback
from tasks.runtime.errors import StageError

HOST = "127.0.0.1"
DEFAULT_PORT = 4200
POOL = "afterimage"
SERVER, WORKER = "server", "worker"
"""Names of the lines of the process file."""
PROCFILE = Path("infra") / "serve.procfile"
RECORD = Path(".prefect") / "processes.json"
RECORD_FORMAT = 2
LOGS = Path(".prefect") / "logs"
STACK = Path(".prefect") / "stack"
"""Files of the servers of `make stack`; PostgreSQL works in a folder there."""
DATABASE = ("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")
"""Beginnings of the variables that name the database of Prefect's server, and its password."""
LOGIN = "PREFECT_API_AUTH_STRING"
"""Variable with the login NAME:PASSWORD that clients send, and that a server started with it demands."""
HEARTBEAT_SECONDS = 30
"""Seconds between two heartbeats of a flow run; Prefect's minimum."""
SILENCE_SECONDS = 90
"""A flow run without a heartbeat for this long is marked as crashed: three missed heartbeats."""
SILENT = "No heartbeat for"
"""Beginning of the message of such a run."""
GRACE_SECONDS = 30.0
ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Process:
    """A running line of the process file: the leader of a session of its own, with the work tree as its folder."""

    name: str
    pid: int
    started: float
    """Start in seconds after that of the machine, which setting the clock does not change (since 1970 on systems other
    than Linux); another process with the same id has another start."""
    port: int
    """Port of the server, also for the worker."""


def url(port: int) -> str:
    """Address of the server's pages."""
    return f"http://{HOST}:{port}"


def answers(api: str) -> bool:
    """Whether an HTTP server answers at the address of an API, with whatever status."""
    try:
        with _opener(api).open(f"{api.rstrip('/')}/health", timeout=ANSWER_SECONDS):
            return True
    except urllib.error.HTTPError:  # it may require a key
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False


def require_login(api: str) -> None:
    """Raise `StageError` if the server asks for a login that the environment does not have."""
    request = urllib.request.Request(f"{api}/admin/version")  # noqa: S310 - an address of this machine
    if login := os.environ.get(LOGIN):
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        _opener(api).open(request, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise StageError(
                f"Prefect's server asks for a login; set {LOGIN} to it (after make stack: source {STACK}/env)"
            ) from None
    except (OSError, http.client.HTTPException):
        return  # what asks next says what is wrong


def environment_of_running(root: Path) -> dict[str, str]:
    """Environment for Prefect's clients of the server that runs in the work tree `root`.

    Raises:
        StageError: if none runs, or if it asks for a login that the environment does not have.
    """
    process = running(root).get(SERVER)
    if process is None:
        raise StageError("no Prefect server of this work tree runs; start it: make serve")
    require_login(f"{url(process.port)}/api")
    return environment(root, process.port)


def _opener(address: str) -> urllib.request.OpenerDirector:
    """Opener for `address`; without a proxy if it is on this machine."""
    here = urllib.parse.urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))


def environment(root: Path, port: int | None) -> dict[str, str]:
    """Environment for Prefect in the work tree `root`: its server at `port`, or None for a temporary server."""
    inherited = {name: value for name, value in os.environ.items() if _is_passed_on(name)}
    home = root / ".prefect" / "home"
    home.mkdir(parents=True, exist_ok=True)  # Prefect creates only the last folder
    settings = {
        "PATH": search_path(),
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",  # its clients report their first steps
        # Leases of concurrency slots are kept in files. A killed server would lose leases in memory (the default) and
        # never free the slot of a run that was pending.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_WORKER_QUERY_SECONDS": "3",  # the server is local, so frequent polling is cheap
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # a temporary server on a busy machine
        "PREFECT_CLI_PROMPT": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if port is not None:
        settings |= {**client_settings(root, port), "PORT": str(port)}
        settings["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = url(port)  # by default pages of any site may call the API
    if LOGIN in inherited:
        settings["PREFECT_SERVER_API_AUTH_STRING"] = inherited[LOGIN]
    variables = inherited | settings
    loopback.exempt(variables)
    return variables


def search_path() -> str:
    """Folders in which programs are looked for: those of this environment first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _is_passed_on(name: str) -> bool:
    """Whether a variable of the caller applies here; of Prefect's only the login and those of the server's database."""
    return not name.startswith("PREFECT_") or name.startswith(DATABASE) or name == LOGIN


def client_settings(root: Path, port: int) -> dict[str, str]:
    """The variables with which Prefect's own commands find the server at `port` of the work tree `root`."""
    return {"PREFECT_HOME": str(root / ".prefect" / "home"), "PREFECT_API_URL": f"{url(port)}/api"}


def alive(process: Process) -> bool:
    """Whether this process still runs; False for another process that got the same id."""
    try:
        found = psutil.Process(process.pid)
        return _works(found) and abs(_started(found) - process.started) < 1.0
    except psutil.NoSuchProcess:
        return False


def _started(process: psutil.Process) -> float:
    """Start of a process, on the scale of `Process.started`. Raises `psutil.NoSuchProcess` if it has ended."""
    if sys.platform != "linux":
        return process.create_time()
    try:
        text = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(process.pid) from None
    # Field 22. psutil's `create_time` adds the time of boot, which the kernel moves when the clock is set.
    return int(text.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def running(root: Path) -> dict[str, Process]:
    """The recorded processes of the work tree `root` that run, by name.

    The record of a copied work tree names the processes of the original, which are left out: their working directory is
    the original. That of a work tree that was moved follows the move.
    """
    return {process.name: process for process in _recorded(root) if _folder_of(process) == root.resolve()}


def elsewhere(root: Path) -> Path | None:
    """The work tree that `root` was copied from, if recorded processes of it run; else None."""
    folders = {_folder_of(process) for process in _recorded(root)} - {None, root.resolve()}
    return next(iter(folders), None)


def _folder_of(process: Process) -> Path | None:
    """Work tree of a recorded process, from its working directory; None if it does not run."""
    try:
        folder = psutil.Process(process.pid).cwd() if alive(process) else None
    except psutil.Error:
        return None
    return Path(folder.partition(f"/{STACK}/")[0]).resolve() if folder else None


def _recorded(root: Path) -> list[Process]:
    """Every recorded process. Raises `StageError` for a record of another version."""
    try:
        record = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        raise StageError(f"{root / RECORD} is of another version; end the processes that it lists, then delete it")
    return [Process(**entry) for entry in record["processes"]]


def start(
    root: Path,
    name: str,
    variables: Mapping[str, str],
    procfile: Path = PROCFILE,
    user: pwd.struct_passwd | None = None,
) -> Process:
    """Start the line `name` of the process file in the background, as `user` if it is given, and record it."""
    command = [Template(word).substitute(variables) for word in shlex.split(lines(root, procfile)[name])]
    # Prefect's worker ends its runs with SIGINT, which a background process of a shell ignores, and so do its children;
    # with a handler in this process, the children get the default action.
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
            user=user.pw_uid if user else None,
            group=user.pw_gid if user else None,
            extra_groups=[] if user else None,
        )
    process = Process(name, child.pid, _started(psutil.Process(child.pid)), int(variables["PORT"]))
    _record(root, {**running(root), name: process})
    return process


def lines(root: Path, procfile: Path = PROCFILE) -> dict[str, str]:
    """The process file: name -> command, in the order of starting. Raises `StageError` if there is none."""
    try:
        text = (root / procfile).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StageError(f"{root} has no {procfile}; run this in the top folder of the work tree") from None
    kept = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {name.strip(): command.strip() for name, _, command in (line.partition(":") for line in kept)}


def stop(root: Path, process: Process) -> None:
    """End a process and all its descendants, also the training of a worker: SIGTERM, then SIGKILL after the grace.

    Only the process group gets SIGTERM: the other descendants notice its end and may need some seconds to save a
    checkpoint. Removes the process from the record.
    """
    if alive(process):
        leader = psutil.Process(process.pid)
        everything = [leader, *leader.children(recursive=True)]  # listed now: later they are orphans
        os.killpg(process.pid, signal.SIGTERM)
        if not _ended(everything):
            for one in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            _ended(everything)
    left = {name: other for name, other in running(root).items() if name != process.name}
    _record(root, left)


def _ended(processes: list[psutil.Process]) -> bool:
    """Wait until all of them have ended; False if they have not after the grace."""
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
    record = {"format": RECORD_FORMAT, "processes": [asdict(process) for process in processes.values()]}
    atomic.write_json(root / RECORD, record)
