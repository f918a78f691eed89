"""The databases of `make stack`: PostgreSQL if it is installed and may run here, else SQLite files.

PostgreSQL listens on a socket in its own folder, which only its user may enter, and on no port; so it needs no
password. It refuses to run as root; root starts it as the user `postgres`, which Debian's package creates.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flows import server
from tasks.runtime.errors import StageError

POSTGRES = "postgres"
"""Name of the line of the process file, of the program, of its folder, and of the user that root starts it as."""
USER = "afterimage"
MLFLOW, PREFECT = "mlflow", "prefect"
"""Names of the databases."""
DEBIAN = Path("/usr/lib/postgresql")
"""Debian keeps the programs here, in a folder for each version, and not on the PATH."""
LONGEST_SOCKET = 90
"""Characters of the socket's folder; the system allows 107 with the file name."""
START_SECONDS = 60.0


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL cluster of the stack."""

    programs: Path
    """Folder of `postgres`, `initdb` and `createdb`."""
    folder: Path
    """Its files, and the socket."""

    def variables(self) -> dict[str, str]:
        """What the line of the process file needs."""
        return {"POSTGRES_PROGRAM": str(self.programs / POSTGRES), "POSTGRES_FOLDER": str(self.folder)}

    def mlflow(self) -> str:
        return f"postgresql://{USER}@/{MLFLOW}?host={self.folder}"

    def prefect(self) -> str:
        return f"postgresql+asyncpg://{USER}@/{PREFECT}?host={self.folder}"


def choose(folder: Path) -> Postgres | str:
    """Return the PostgreSQL cluster in `folder`, which the first call creates, or why there is none.

    A database that is there already is kept.
    """
    if (folder / "mlflow.db").exists():
        return f"{folder / 'mlflow.db'} exists already"
    cluster = folder / POSTGRES
    programs = _programs(_version(cluster))
    if (cluster / "PG_VERSION").exists():
        if programs is None:
            raise StageError(f"{cluster} was made by PostgreSQL {_version(cluster)}, which is not installed any more")
        return Postgres(programs, cluster)
    if programs is None:
        return "PostgreSQL is not installed (on Debian or Ubuntu: apt install postgresql)"
    return _create(programs, cluster) or Postgres(programs, cluster)


def _version(cluster: Path) -> str | None:
    """Major version of an existing cluster."""
    file = cluster / "PG_VERSION"
    return file.read_text(encoding="ascii").strip() if file.exists() else None


def _programs(version: str | None) -> Path | None:
    """Folder with PostgreSQL's programs, of the given major version or else the newest; None if there is none."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).resolve().parent] if on_path else []
    found += sorted(DEBIAN.glob("[0-9]*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    whole = (path for path in found if all((path / name).exists() for name in (POSTGRES, "initdb", "createdb")))
    fitting = (path for path in whole if version in (None, _major(path)))
    return next(fitting, None)


def _major(programs: Path) -> str:
    command = [str(programs / POSTGRES), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return said.split()[2].split(".")[0] if len(said.split()) > 2 else ""


def user() -> pwd.struct_passwd | None:
    """The user that PostgreSQL runs as if this is not the present one: root may not run it."""
    return pwd.getpwnam(POSTGRES) if os.geteuid() == 0 else None


def _create(programs: Path, cluster: Path) -> str | None:
    """Create the files of PostgreSQL; returns why that is not possible, or None."""
    if importlib.util.find_spec("psycopg2") is None:
        return "its driver is missing (make install EXTRA=stack)"
    try:
        owner = user()
    except KeyError:
        return f"root may not run it, and there is no user {POSTGRES}"
    if owner and (closed := _closed(cluster.parent, owner)):
        return f"root may not run it, and the user {POSTGRES} may not enter {closed}"
    if len(str(cluster)) > LONGEST_SOCKET:
        return "the path of the work tree is too long for its socket"
    cluster.mkdir(mode=0o700)
    if owner:
        cluster.parent.chmod(0o711)
        shutil.chown(cluster, owner.pw_uid, owner.pw_gid)
    command = ["initdb", "-D", str(cluster), "-U", USER, "--auth=trust", "--encoding=UTF8", "--locale=C"]
    done = _run(programs, command)
    if done.returncode == 0:
        return None
    shutil.rmtree(cluster, ignore_errors=True)
    return (done.stderr.strip().splitlines() or ["initdb failed"])[0]


def _closed(folder: Path, owner: pwd.struct_passwd) -> Path | None:
    """The first of the folders above `folder` that `owner` may not enter."""
    for above in reversed(folder.resolve().parents):
        found = above.stat()
        shift = 6 if found.st_uid == owner.pw_uid else 3 if found.st_gid == owner.pw_gid else 0
        if not found.st_mode >> shift & 1:
            return above
    return None


def _run(programs: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program of PostgreSQL as the user that its server runs as."""
    owner = user()
    ids = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}
    return subprocess.run(  # type: ignore[call-overload]  # the three are arguments of Popen
        [str(programs / command[0]), *command[1:]], cwd="/", capture_output=True, text=True, check=False, **ids
    )


def start(root: Path, cluster: Postgres, variables: Mapping[str, str], procfile: Path) -> None:
    """Start PostgreSQL, and create the databases that are missing. Raises `StageError` if it does not start."""
    process = server.start(root, POSTGRES, variables, procfile, user())
    deadline = time.monotonic() + START_SECONDS
    for name in (MLFLOW, PREFECT):
        while not _created(cluster, name):
            if not server.alive(process) or time.monotonic() > deadline:
                server.stop(root, process)
                raise StageError(f"PostgreSQL did not start; {root / server.LOGS / f'{POSTGRES}.log'} says why")
            time.sleep(0.3)


def _created(cluster: Postgres, name: str) -> bool:
    done = _run(cluster.programs, ["createdb", f"--host={cluster.folder}", f"--username={USER}", name])
    return done.returncode == 0 or "already exists" in done.stderr
