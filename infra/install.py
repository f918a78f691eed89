"""Create `.venv` and install the locked dependencies; a second call returns in milliseconds.

    python3.11 infra/install.py [--extra NAME]

Runs on a bare Python, so it imports only the standard library. pip installs, with the user's own pip configuration.
A stamp in `.venv` names the lock, the Python and the folder of the last installation; packages are installed only if
it differs.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "afterimage-stamp"
LOG = VENV / "install.log"
LOCK = ROOT / "requirements.lock"
SIZES = ROOT / "infra" / "download-sizes.json"
SUPPORTED = ((3, 11), (3, 13))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 3
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]

# Run by the new environment, whose pip can read markers: prints the pins of the lock that are not installed there.
MISSING = """
import sys
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement
for line in open(sys.argv[1], encoding="utf-8"):
    if not line.startswith("#") and line.strip():
        pin = Requirement(line.strip())
        try:
            found = version(pin.name)
        except PackageNotFoundError:
            found = None
        wanted = pin.marker is None or pin.marker.evaluate()
        if wanted and (found is None or not pin.specifier.contains(found, prereleases=True)):
            print(pin.name)
"""

# Run by the new environment. Without the package, `import mlflow` would import the project's folder of that name;
# torchvision's default wheel together with PyTorch's CPU build breaks diffusers and transformers.
CHECK = """
import os
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
from importlib.util import find_spec
origin = getattr(find_spec("mlflow"), "origin", None)
if not origin or not origin.endswith("__init__.py"):
    raise SystemExit("the package mlflow is not installed: only the project's folder of that name is found")
import torch, onnxruntime
if "+cpu" in torch.__version__ and find_spec("torchvision"):
    raise SystemExit("torchvision beside PyTorch's CPU build breaks diffusers; pip uninstall torchvision")
print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
"""

# Run by the new environment, once for COMPUTING and once for RECORDING: imports the modules that the arguments name.
IMPORT = """
import sys
from contextlib import suppress
from importlib import import_module
for name in sys.argv[1:]:
    with suppress(ImportError):
        import_module(name)
"""
COMPUTING = (
    "torch._dynamo",
    "torch.onnx",
    "onnxscript",
    "torchmetrics",
    "accelerate",
    "matplotlib.pyplot",
    "diffusers.models.unets.unet_2d_condition",
)
RECORDING = (
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.server",
    "great_expectations",
    "dvc.repo",
    "prefect.server.api.server",
)
"""Together most of what the stages and the servers import, in two parts that take about equally long."""


class Build(NamedTuple):
    """A build of PyTorch, and the arguments of the `pip install` that selects it before the lock is installed."""

    cuda: bool
    first: list[str]


DEFAULT_BUILD = Build(cuda=True, first=[])


def main() -> None:
    parser = argparse.ArgumentParser(description="Create .venv and install the locked dependencies.")
    parser.add_argument("--extra", help="also install this optional extra of pyproject.toml, such as tensorrt")
    extra = parser.parse_args().extra
    version = sys.version_info[:2]
    if not SUPPORTED[0] <= version <= SUPPORTED[1]:
        fail(
            f"Python {version[0]}.{version[1]} is not supported; use 3.11 to 3.13, as in: make repro PYTHON=python3.11"
        )
    wanted = stamp() | ({extra: digest(extra)} if extra else {})
    if wanted.items() <= installed().items():
        return
    with one_at_a_time():
        before = installed()
        if not wanted.items() <= before.items():
            install(extra)
            # The same lock: the extras that are installed already stay.
            kept = before if stamp().items() <= before.items() else {}
            STAMP.write_text(json.dumps(kept | wanted, indent=1) + "\n", encoding="utf-8")


def extra_requirements(extra: str) -> list[str]:
    import tomllib  # not at the top: a Python without it must reach the sentence that it is too old

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    if extra not in extras:
        fail(f"pyproject.toml has no extra '{extra}'; it has {', '.join(sorted(extras))}")
    return list(extras[extra])


def pins_of(extra: str) -> list[str]:
    """Arguments of the `pip install` of the extra: its lock if it has one, else its requirements."""
    lock = ROOT / "infra" / f"{extra}.lock"
    return ["--no-deps", "-r", str(lock)] if lock.exists() else ["-c", str(LOCK), *extra_requirements(extra)]


def digest(extra: str) -> str:
    """Identity of what the extra installs; ends the program if pyproject.toml has no such extra."""
    lock = ROOT / "infra" / f"{extra}.lock"
    content = [*extra_requirements(extra), lock.read_text(encoding="utf-8") if lock.exists() else ""]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def stamp() -> dict[str, str]:
    """What identifies an installation without extras; the folder belongs to it as scripts contain absolute paths."""
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    return {"requirements.lock": lock, "python": platform.python_version(), "folder": str(VENV.resolve())}


def installed() -> dict[str, str]:
    """The stamp of the environment with its extras; empty if there is none or it cannot be read."""
    try:
        found = json.loads(STAMP.read_text(encoding="utf-8")) if PYTHON.exists() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the lock of the work tree; the kernel releases it when this process ends or is killed."""
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another installation runs in this work tree; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def install(extra: str | None) -> None:
    say(f"Python {platform.python_version()}, into {VENV.relative_to(ROOT)}")
    STAMP.unlink(missing_ok=True)
    make_environment()
    missing = missing_packages()
    build = choose_torch() if "torch" in missing else DEFAULT_BUILD
    say(download_note(missing, build))
    if build.first:
        run_pip(build.first, total=1)
    if missing:
        run_pip(["-r", str(LOCK)], total=len(missing))
    if extra:
        say(f"extra '{extra}'")
        run_pip(pins_of(extra), total=len(missing_packages(ROOT / "infra" / f"{extra}.lock")))
    if missing:
        store_bytecode()
    checked = subprocess.run([str(PYTHON), "-c", CHECK], cwd=ROOT, capture_output=True, text=True, check=False)
    if checked.returncode:
        fail(f"the environment does not work: {checked.stderr.strip().splitlines()[-1]}")
    say(f"ready: {checked.stdout.strip()}")


def make_environment() -> None:
    """Create the environment with this Python and pip; one of another Python or another folder is replaced."""
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    if VENV.exists() and environment_version() == platform.python_version() and pip_works():
        return
    if VENV.is_symlink():
        fail(f"{VENV.name} is a link to {VENV.resolve()}, which is no environment of this Python; remove the link")
    shutil.rmtree(VENV, ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        package = f"python3.{sys.version_info[1]}-venv"
        fail(f"{sys.executable} cannot create environments; install its venv module (on Debian or Ubuntu: {package})")


def environment_version() -> str:
    """Version of the Python in `.venv` if it was created in this folder, else an empty string."""
    try:
        settings = (VENV / "pyvenv.cfg").read_text(encoding="utf-8")
        scripts = (VENV / "bin" / "pip").read_text(encoding="utf-8")
    except OSError:
        return ""
    version = re.search(r"^version(?:_info)? = (\S+)", settings, re.MULTILINE)
    return version.group(1) if version and str(VENV.resolve()) in scripts else ""


def pip_works() -> bool:
    return subprocess.run([*PIP, "--version"], capture_output=True, check=False).returncode == 0


def missing_packages(lock: Path = LOCK) -> list[str]:
    """Names of the pins in `lock` that apply to this machine and are not installed; none without that file."""
    if not lock.exists():
        return []
    done = subprocess.run([str(PYTHON), "-c", MISSING, str(lock)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def installed_count() -> int:
    return sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))


def choose_torch() -> Build:
    """PyTorch's CPU build if it can be reached and the machine has no NVIDIA driver; else the default build."""
    pin = next(line for line in LOCK.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    if sys.platform != "linux":
        return Build(cuda=False, first=[])
    if has_nvidia_driver():
        say("NVIDIA driver found: PyTorch's default build with CUDA")
        return DEFAULT_BUILD
    if f"{pin.partition('==')[2]}+cpu" in versions_that_pip_finds("torch"):
        say("no NVIDIA driver: PyTorch's CPU build, from pip's own index")
        return Build(cuda=False, first=[])
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=PROBE_SECONDS):  # noqa: S310 - https above
            say(f"no NVIDIA driver: PyTorch's CPU build from {CPU_INDEX}")
            return Build(cuda=False, first=["--no-deps", "--index-url", CPU_INDEX, pin])
    except (urllib.error.URLError, TimeoutError):
        say(f"no NVIDIA driver, but {CPU_INDEX} cannot be reached; PyTorch's default build runs on a CPU too")
        return DEFAULT_BUILD


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def versions_that_pip_finds(package: str) -> list[str]:
    done = subprocess.run([*PIP, "index", "versions", package], capture_output=True, text=True, check=False)
    available = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    return available.group(1).split(", ") if available else []


def download_note(names: list[str], build: Build) -> str:
    """One line: the largest number of bytes to download; pip's cache may contain some of them."""
    sizes = json.loads(SIZES.read_text(encoding="utf-8"))
    total = sum(size for name, size in sizes["packages"].items() if name in names)
    if "torch" in names:
        total += sizes["cuda"] if build.cuda else sizes["torch_cpu"] - sizes["packages"]["torch"]
    noun = "package" if len(names) == 1 else "packages"
    return f"{len(names)} {noun}, about {total / 1e6:,.0f} MB to download (less what pip has cached)"


def run_pip(arguments: list[str], total: int) -> None:
    """Run `pip install` with one line of progress; its output goes to `.venv/install.log`.

    pip would compile every module, for a minute or two, and most are never imported; see `store_bytecode`.
    """
    command = [*PIP, "install", "--no-compile", "--progress-bar", "off", *arguments]
    with LOG.open("w", encoding="utf-8") as log:
        pip = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            show_progress(pip, total, before=installed_count())
        except BaseException:  # also for Ctrl-C: pip must not continue in the background
            pip.terminate()
            pip.wait()
            raise
    if pip.returncode:
        lines = [line for line in LOG.read_text(encoding="utf-8").splitlines() if "is ignored" not in line]
        print("\n".join(lines[-15:]), file=sys.stderr)
        fail(
            f"pip did not finish; its whole output is in {LOG.relative_to(ROOT)}; the same command continues from here"
        )


def store_bytecode() -> None:
    """Import most of what stages and servers import, so that Python compiles it once and stores the result in `.venv`.

    With PYTHONDONTWRITEBYTECODE, which many images of containers set, Python stores nothing at an import: each process
    of a chain would compile its packages again, and start twice as slowly. The variable is left out here.
    """
    say("compiling what the stages and the servers import, about 30 s")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {
        "ORT_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GX_ANALYTICS_ENABLED": "False",
        "PREFECT_HOME": str(VENV / "prefect"),  # which the import creates, by default in the user's home
    }
    processes = [
        # not in the project, whose folder `mlflow` would be found first
        subprocess.Popen([str(PYTHON), "-c", IMPORT, *names], cwd=VENV, env=environment, stderr=subprocess.DEVNULL)
        for names in (COMPUTING, RECORDING)
    ]
    for process in processes:
        process.wait()


def show_progress(pip: subprocess.Popen[bytes], total: int, before: int) -> None:
    """Report the progress of pip until it ends: on a terminal in one line, else a line every 20 s."""
    terminal = sys.stdout.isatty()
    started = reported = time.monotonic()
    while pip.poll() is None:
        time.sleep(0.3)
        now = time.monotonic()
        if now - reported < (1 if terminal else 20):
            continue
        reported = now
        found = LOG.read_text(encoding="utf-8", errors="replace").count("\nCollecting ")
        done = installed_count() - before
        state = f"installed {done} of {total}" if done > 0 else f"fetched {min(found, total)} of {total}"
        line = f"install: {state}, {now - started:.0f} s"
        print(f"\r{line:<60}" if terminal else line, end="" if terminal else "\n", flush=True)
    if terminal:
        print("\r" + " " * 60 + "\r", end="", flush=True)


def say(line: str) -> None:
    print(f"install: {line}", flush=True)


def fail(sentence: str) -> NoReturn:
    print(f"install: error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command continues from here")
