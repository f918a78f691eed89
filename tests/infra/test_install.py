"""Installation from the lock, with a few small wheels in place of the real ones; and the lock itself."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import cpu

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
PINS = [Requirement(line) for line in LOCK if not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def make_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel of one package of which only `__version__` is there."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n")
        needs = "Requires-Dist: nowhere-to-be-found\n" if name == "page" else ""
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


class House:
    """A work tree of its own with an installation script, a lock and an index of small wheels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = folder / "wheels"
        (folder / "infra").mkdir(parents=True)
        for file in ("infra/install.py", "infra/download-sizes.json", "pyproject.toml"):
            shutil.copy(ROOT / file, folder / file)
        for name in ("mlflow", "torch", "onnxruntime", "extra", "page"):
            version = "2.0+cpu" if name == "torch" else "1.0"
            make_wheel(self.wheels, name, version)

    def lock(self, *pins: str) -> None:
        (self.folder / "requirements.lock").write_text("\n".join(pins) + "\n", encoding="utf-8")

    def install(self, *options: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1"}  # as in many images of containers
        command = [sys.executable, str(self.folder / "infra" / "install.py"), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> House:
    house = House(tmp_path_factory.mktemp("house") / "tree")
    house.lock("mlflow==1.0", "torch==2.0", "onnxruntime==1.0")
    first = house.install()
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].startswith("install: Python 3.")
    assert any(re.search(r"3 packages, about [\d,]+ MB to download", line) for line in lines)
    assert lines[-1] == "install: ready: torch 2.0+cpu, onnxruntime 1.0"
    return house


def test_the_bytecode_of_what_the_stages_import_is_stored(house):
    """Otherwise each process would compile it again where PYTHONDONTWRITEBYTECODE is set."""
    packages = next((house.folder / ".venv").glob("lib/python*/site-packages"))
    stored = {file.parent.parent.name for file in packages.glob("*/__pycache__/__init__.*.pyc")}
    assert {"mlflow", "torch"} <= stored


def test_a_second_call_says_nothing_and_takes_no_time(house):
    with cpu.at_most(1):
        again = house.install()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_a_changed_lock_installs_what_is_missing(house):
    house.lock("mlflow==1.0", "torch==2.0", "onnxruntime==1.0", "extra==1.0")
    done = house.install()
    assert done.returncode == 0, done.stderr
    assert "install: 1 package," in done.stdout
    assert list((house.folder / ".venv").glob("lib/python*/site-packages/extra"))


def test_extras_come_from_their_locks_and_stay_installed(house):
    """`page` would need a package that no index has: its lock is installed without further dependencies."""
    (house.folder / "infra" / "demo.lock").write_text("page==1.0\n", encoding="utf-8")
    (house.folder / "infra" / "docs.lock").write_text("extra==1.0\n", encoding="utf-8")
    for extra in ("demo", "docs"):
        done = house.install("--extra", extra)
        assert done.returncode == 0 and f"install: extra '{extra}'" in done.stdout, done.stderr
    assert list((house.folder / ".venv").glob("lib/python*/site-packages/page"))
    for options in ((), ("--extra", "demo"), ("--extra", "docs")):
        assert house.install(*options).stdout == ""


@pytest.mark.slow
def test_a_changed_lock_of_an_extra_is_installed(house):
    (house.folder / "infra" / "demo.lock").write_text("page==1.0\nextra==1.0\n", encoding="utf-8")
    assert "install: extra 'demo'" in house.install("--extra", "demo").stdout
    assert house.install("--extra", "demo").stdout == ""


def test_a_link_to_an_environment_is_used_and_never_deleted(house, tmp_path):
    other = House(tmp_path / "tree")
    other.lock("mlflow==1.0", "torch==2.0", "onnxruntime==1.0")
    (other.folder / ".venv").symlink_to(house.folder / ".venv")
    done = other.install()
    assert done.returncode == 0, done.stderr
    assert other.install().stdout == "" and (house.folder / ".venv" / "bin" / "pip").exists()
    (house.folder / ".venv" / "pyvenv.cfg").rename(house.folder / "pyvenv.cfg")
    (house.folder / ".venv" / "afterimage-stamp").unlink()
    assert "is a link to" in other.install().stderr
    (house.folder / "pyvenv.cfg").rename(house.folder / ".venv" / "pyvenv.cfg")
    assert (house.folder / ".venv" / "bin" / "pip").exists()


def test_an_unknown_extra_is_refused(house):
    done = house.install("--extra", "games")
    assert (
        done.returncode == 1
        and "has no extra 'games'; it has containers, demo, dev, docs, ray, stack, tensorrt" in done.stderr
    )


def test_what_pip_cannot_find_ends_in_a_sentence_and_is_tried_again(house):
    house.lock("mlflow==1.0", "torch==2.0", "onnxruntime==1.0", "nowhere==1.0")
    for _ in range(2):
        done = house.install()
        assert done.returncode == 1
        assert "nowhere==1.0" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("install: error: pip did not finish")


@pytest.mark.slow
def test_an_environment_without_mlflow_is_refused(tmp_path):
    """The project's folder `mlflow/` makes `import mlflow` succeed without the package."""
    house = House(tmp_path / "tree")
    (house.folder / "mlflow").mkdir()
    house.lock("torch==2.0", "onnxruntime==1.0")
    done = house.install()
    assert done.returncode == 1
    assert "the package mlflow is not installed" in done.stderr


def test_an_old_python_gets_the_supported_versions():
    old = next((path for path in map(shutil.which, ("python3.10", "python3.9", "python3.8")) if works(path)), None)
    if old is None:
        pytest.skip("no Python older than 3.11 on this machine")
    done = subprocess.run([old, str(ROOT / "infra" / "install.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "name one of 3.11 to 3.13" in done.stderr and "Traceback" not in done.stderr


def works(python: str | None) -> bool:
    return python is not None and not subprocess.run([python, "-V"], capture_output=True, check=False).returncode


def test_the_download_is_larger_with_cuda():
    spec = importlib.util.spec_from_file_location("install", ROOT / "infra" / "install.py")
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    sizes = json.loads((ROOT / "infra" / "download-sizes.json").read_text(encoding="utf-8"))

    def megabytes(names, **build):
        return int(
            install.download_note(names, install.Build(first=[], **build))
            .split("about ")[1]
            .split(" MB")[0]
            .replace(",", "")
        )

    names = list(sizes["packages"])
    assert 300 < megabytes(names, cuda=False) < 1200
    assert megabytes(names, cuda=True) > megabytes(names, cuda=False) + 2000
    assert megabytes(["six"], cuda=True) == 0


def test_lock_is_exact_and_of_no_machine():
    for pin in PINS:
        assert len(pin.specifier) == 1 and next(iter(pin.specifier)).operator == "==", pin
        assert "*" not in str(pin.specifier) and "+" not in str(pin.specifier) and pin.url is None, pin
    assert not [line for line in LOCK if re.search(r"file:|https?:|--|(^|\s)/", line)]
    names = {pin.name for pin in PINS}
    assert not {"torchvision", "triton"} & names and not [name for name in names if name.startswith("nvidia-")]


def assert_meets(pins: list[Requirement], asked: list[str], lock: str) -> None:
    pinned: dict[str, list[Requirement]] = {}
    for pin in pins:
        pinned.setdefault(pin.name, []).append(pin)
    for text in asked:
        wanted = Requirement(text)
        candidates = pinned.get(canonicalize_name(wanted.name), [])
        assert candidates, f"{wanted.name} is not in {lock}; run make lock"
        for pin in candidates:
            version = next(iter(pin.specifier)).version
            assert wanted.specifier.contains(version), f"{lock} has {pin}; run make lock"


def test_lock_meets_what_pyproject_asks_for():
    assert_meets(PINS, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]], "requirements.lock")


@pytest.mark.parametrize("extra", ["containers", "demo", "docs", "stack"])
def test_the_lock_of_an_extra_meets_what_it_asks_for(extra):
    lines = (ROOT / "infra" / f"{extra}.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert_meets([*PINS, *pins], PROJECT["optional-dependencies"][extra], f"infra/{extra}.lock")
    assert not {pin.name for pin in PINS} & {pin.name for pin in pins}


@pytest.mark.parametrize("name", ["img2dataset", "img2dataset-cluster"])
def test_the_lock_of_another_environment_meets_what_that_asks_for(name):
    asked, pins = (
        [
            line
            for line in (ROOT / "tasks" / "transfer" / f"{name}.{kind}").read_text(encoding="utf-8").splitlines()
            if line[0] != "#"
        ]
        for kind in ("in", "lock")
    )
    assert_meets([Requirement(pin) for pin in pins], asked, f"tasks/{name}.lock")
    assert pins == sorted(pins), "as `make lock` writes it"


def test_make_help_lists_each_command():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"repro", "test", "drills", "ui", "serve", "stop", "clean", "help", "lock"} <= set(targets)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [target for target in targets if not re.search(rf"^  make {target}  +\S", listed, re.MULTILINE)] == []
