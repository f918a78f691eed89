"""`make lock`: pin the dependencies of pyproject.toml for every supported Python and platform.

Writes `requirements.lock` (exact pins with markers), `infra/EXTRA.lock` for each extra (what it needs beside it),
`infra/download-sizes.json` (bytes per package, which `infra/install.py` prints before it starts), and the
locks of img2dataset's environments, which are separate from the project's. The resolver is uv, in a temporary
environment: pip needs over ten minutes for this set, uv a few seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
EXTRAS = {extra: ROOT / "infra" / f"{extra}.lock" for extra in ("containers", "demo", "docs", "ray", "stack")}
"""The lock of each extra that is pinned."""
SIZES = ROOT / "infra" / "download-sizes.json"
SEPARATE = ("tasks/transfer/img2dataset.in", "tasks/transfer/img2dataset-cluster.in")
"""Requirements of the separate environments; each has its lock beside it."""
UV = "uv==0.13.9"
OLDEST_PYTHON = "3.11"
INDEX = "https://pypi.org/simple"
INDEX_JSON = "application/vnd.pypi.simple.v1+json"

# Packages that an extra restricts to older versions than the rest of the project needs. Gradio 6.31 excludes Pillow 13
# and tomlkit 0.15 in its metadata; it works with both, as the tests of the page show.
OVERRIDDEN = ("pillow", "tomlkit")

# PyTorch's default build for Linux brings CUDA as packages. Pinned here, pip would install gigabytes of them on
# a machine without a GPU too; unpinned, torch brings the right ones itself where its build needs them.
CUDA_PACKAGE = re.compile(r"(nvidia-|cuda-|triton\b)")

HEADER = """\
# Written by `make lock` from pyproject.toml; do not edit. Exact pins for Python 3.11, 3.12 and 3.13.
# CUDA's packages are left out: torch brings them where its build needs them.
"""
HEADER_EXTRAS = """\
# Written by `make lock` from pyproject.toml; do not edit. What the extra needs beside requirements.lock; installed
# without further dependencies, as {overridden} keep the versions of requirements.lock even where the extra
# excludes them.
"""
HEADER_SEPARATE = """\
# Written by `make lock` from {source}; do not edit.
# Exact pins for Python 3.11, 3.12 and 3.13, installed without further dependencies.
"""


def main() -> None:
    argparse.ArgumentParser(
        prog="python infra/lock.py",
        description="Resolve pyproject.toml and tasks/transfer/img2dataset*.in anew and write their lock files and "
        "infra/download-sizes.json; needs the network.",
    ).parse_args()
    with tempfile.TemporaryDirectory(prefix="afterimage-lock-") as folder:
        python = make_environment(Path(folder))
        print("lock: resolving pyproject.toml", flush=True)
        pins = resolve(python, "pyproject.toml", "--extra", "dev")
        print("lock: resolving the extras", flush=True)
        extras = {extra: resolve_extra(python, Path(folder), pins, extra) for extra in EXTRAS}
        separate = {source: resolve(python, source) for source in SEPARATE}
    kept = [pin for pin in pins if not CUDA_PACKAGE.match(pin)]
    cuda = [pin for pin in pins if CUDA_PACKAGE.match(pin)]
    print(f"lock: {len(kept)} packages; asking the index for their sizes", flush=True)
    every = sorted({*kept, *(pin for pinned in extras.values() for pin in pinned)})
    sizes = {"packages": download_sizes(every), "cuda": sum(download_sizes(cuda).values()), "torch_cpu": cpu_size(kept)}
    write_pins(LOCK, HEADER, kept)
    for extra, pinned in extras.items():
        write_pins(EXTRAS[extra], HEADER_EXTRAS.format(overridden=" and ".join(OVERRIDDEN)), pinned)
    SIZES.write_text(json.dumps(sizes, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for source, pinned in separate.items():
        write_pins((ROOT / source).with_suffix(".lock"), HEADER_SEPARATE.format(source=source), pinned)
    locks = [LOCK.name, *(f"infra/{extra}.lock" for extra in EXTRAS), str(SIZES.relative_to(ROOT))]
    print(f"lock: wrote {', '.join(locks)} and the locks of {' and '.join(SEPARATE)}")


def resolve(python: Path, source: str, *options: str) -> list[str]:
    """Pins of the requirements in `source`, one `name==version ; marker` each, sorted."""
    command = [str(python), "-m", "uv", "pip", "compile", source, *options, "--universal"]
    command += ["--fork-strategy", "fewest", "--python-version", OLDEST_PYTHON, "--default-index", INDEX]
    command += ["--no-header", "--no-annotate", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"lock: error: uv found no set of versions that fits {source}:\n{done.stderr}")
    # A pin never names a local build: `2.13.0+cpu` satisfies `torch==2.13.0` as well.
    return sorted(re.sub(r"\+\w+", "", line) for line in done.stdout.splitlines() if line.strip())


def resolve_extra(python: Path, folder: Path, pins: list[str], extra: str) -> list[str]:
    """Pins of the packages that the extra needs beside `pins`, which all keep their versions."""
    held, overrides = folder / "held.txt", folder / "overrides.txt"
    held.write_text("\n".join(pin for pin in pins if _name(pin) not in OVERRIDDEN), encoding="utf-8")
    overrides.write_text("\n".join(pin for pin in pins if _name(pin) in OVERRIDDEN), encoding="utf-8")
    options = ("--extra", "dev", "--extra", extra, "--constraint", str(held), "--override", str(overrides))
    known = {_name(pin) for pin in pins}
    found = resolve(python, "pyproject.toml", *options)
    return [pin for pin in found if _name(pin) not in known and not CUDA_PACKAGE.match(pin)]


def _name(pin: str) -> str:
    return pin.partition("==")[0]


def write_pins(lock: Path, header: str, pins: list[str]) -> None:
    lock.write_text(header + "".join(f"{pin}\n" for pin in pins), encoding="utf-8")


def make_environment(folder: Path) -> Path:
    """Create an environment with uv in `folder`; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "-q", UV], check=True, stderr=subprocess.DEVNULL)
    return python


def download_sizes(pins: list[str]) -> dict[str, int]:
    """Bytes per package on x86-64 Linux with the oldest supported Python; other machines differ by a few per cent."""
    here = [pin for pin in pins if not _elsewhere(pin)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip((pin.split("==")[0] for pin in here), pool.map(_size, here), strict=True))


def cpu_size(pins: list[str]) -> int:
    """Bytes of PyTorch's CPU build, from pip's own indices or else from PyTorch's."""
    version = next(pin.split("==")[1].split()[0] for pin in pins if pin.startswith("torch=="))
    with tempfile.TemporaryDirectory(prefix="afterimage-lock-") as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "-q", "--no-deps", "--dest", folder]
        command += ["--extra-index-url", "https://download.pytorch.org/whl/cpu", f"torch=={version}+cpu"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def _elsewhere(pin: str) -> bool:
    """Whether the marker excludes x86-64 Linux with CPython."""
    marker = pin.partition(";")[2]
    return bool(re.search(r"sys_platform == '(win32|darwin|emscripten)'", marker)) and "linux" not in marker


def _size(pin: str) -> int:
    """Bytes of the file that pip would choose: the best wheel for x86-64 Linux, or else the source archive."""
    name, version = re.match(r"([\w.-]+)==([\w.!+-]+)", pin).groups()  # type: ignore[union-attr]
    files = [file for file in _files(name) if _version_of(name, file["filename"]) == version and not file["yanked"]]
    ranked = sorted(files, key=lambda file: _preference(file["filename"]), reverse=True)
    return int(ranked[0]["size"]) if ranked else 0


class IndexFile(TypedDict):
    """The keys of a file in the JSON form of a package index that are used here."""

    filename: str
    size: int
    yanked: bool | str


def _files(name: str) -> list[IndexFile]:
    request = urllib.request.Request(f"{INDEX}/{name}/", headers={"Accept": INDEX_JSON})  # noqa: S310 - https above
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return list(json.load(answer)["files"])
    except urllib.error.URLError as error:
        sys.exit(f"lock: error: {INDEX} did not list {name} ({error}); check the network and run make lock again")


def _version_of(name: str, filename: str) -> str:
    stem = re.sub(r"\.tar\.gz$|\.zip$|\.whl$", "", filename)[len(name) + 1 :]
    return stem.split("-")[0]


def _preference(filename: str) -> int:
    tag = OLDEST_PYTHON.replace(".", "")
    if "x86_64" in filename and "linux" in filename and "musl" not in filename:
        if f"-cp{tag}-cp{tag}-" in filename:
            return 4
        return 3 if "abi3" in filename or "-none-" in filename else 0
    if filename.endswith("-any.whl"):
        return 2
    return 1 if filename.endswith(".tar.gz") else 0


if __name__ == "__main__":
    main()
