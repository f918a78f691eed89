"""Find the commands in Markdown documents, and check that they would be accepted."""

from __future__ import annotations

import functools
import importlib.util
import re
import runpy
import shlex
import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest
import yaml

from tasks import params, preset
from tests.support.commands import call

ROOT = Path(__file__).parents[2]
PROGRAMS = "make|dvc|python|pytest|pip|cd|source|git|prefect|mlflow"
_BLOCK = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^ *```$", re.S | re.M)
"""Indentation, kind, attributes such as `{.slow}`, and content of a fenced block."""
_INLINE = re.compile(rf"`((?:[A-Z_]+=\S+ )?(?:{PROGRAMS}) [^`]+)`")
_NOT_CHECKED = ("cd", "cp", "source", "git", "docker", "prefect", "mlflow", "curl", ".venv/bin/pre-commit")


def blocks(text: str) -> list[tuple[str, str]]:
    """Kind and content of each fenced block."""
    return [(kind, content) for kind, _, content in marked_blocks(text)]


def marked_blocks(text: str) -> list[tuple[str, str, str]]:
    """Kind, attributes and content of each fenced block, also of those inside lists."""
    found = _BLOCK.findall(text)
    return [
        (kind, marks.strip(), re.sub(f"^{indent}", "", content, flags=re.M)) for indent, kind, marks, content in found
    ]


def without_blocks(text: str) -> str:
    """The text between the fenced blocks."""
    return _BLOCK.sub("", text)


def commands(text: str) -> list[str]:
    """Lines of the shell blocks without comments, then inline code that begins with one of `PROGRAMS`; each once."""
    lines = [
        line for kind, block in blocks(text) if kind in ("bash", "sh", "console", "") for line in block.splitlines()
    ]
    found = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    found += [" ".join(code.split()) for code in _INLINE.findall(_BLOCK.sub("", text))]
    return list(dict.fromkeys(line for line in found if line and not line.startswith("#")))


def require_form(command: str, folder: Path) -> None:
    """Fail if a program would reject its arguments; presets are composed in the empty `folder`."""
    for part in command.split(" && "):
        words = [word for word in shlex.split(part) if not re.match(r"[A-Z_]+=", word)]
        program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
        if program == "make":
            dry = ["make", "-n", "-o", "install", *shlex.split(part)[shlex.split(part).index("make") + 1 :]]
            done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif program == "dvc":
            from dvc.cli.parser import get_main_parser

            parsed = get_main_parser().parse_args(arguments)
            _require_params(getattr(parsed, "set_param", None) or [])
        elif program == "pytest" or words[1:3] == ["-m", "pytest"]:
            _require_tests(arguments[2:] if program == "python" else arguments)
        elif words[1:3] == ["-m", "tasks.preset"] and words[3] not in ("NAME", "--list"):
            _compose(words[3:], folder)
        elif program == "python":
            assert words[1] == "-m", command
            if words[2].startswith("afterimage_bundle"):
                continue
            assert _is_module(words[2]), command
            named = [word for word in words[3:4] if re.search(rf"^    {re.escape(word)}\b", _help(words[2]), re.M)]
            for option in (word for word in words[3:] if word.startswith("--")):
                assert re.search(rf"{option}\b", _help(words[2], *named)), f"{words[2]} has no option {option}"
        else:
            assert words[0] in _NOT_CHECKED, command


def _require_params(changes: list[str]) -> None:
    """Require that the default parameters are valid with the `section.key=value` of `dvc exp run -S`."""
    document = params.read(ROOT / "params.yaml")
    for change in changes:
        name, _, value = change.partition("=")
        section, key = name.split(".")
        document[section][key] = yaml.safe_load(value)
    params.parse(document)


def _is_module(name: str) -> bool:
    """Whether `name` is a module or a package; a folder without `__init__.py` is neither."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


@functools.cache
def _help(module: str, *named: str) -> str:
    """What a command of the project, or the part of it that is `named`, prints for --help.

    It runs in this process; `tests/infra/test_help.py` asks each command in a process of its own.
    """

    def main() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a test may have imported the module
            runpy.run_module(module, run_name="__main__", alter_sys=False)

    done = call(main, *named, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def _require_tests(arguments: list[str]) -> None:
    """Require that a marker or a file of tests exists."""
    if arguments[0] == "-m":
        configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
        assert arguments[1] in [marker.split(":")[0] for marker in configuration["markers"]]
    else:
        assert (ROOT / arguments[0]).is_file()


def _compose(arguments: list[str], folder: Path) -> None:
    """Write the parameters of a preset in `folder`, with links to the project and the documented sources."""
    for name in ("pictures", "base"):
        (folder / name).mkdir()
    (folder / "cifar10-jpeg.zip").touch()
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        done = call(preset.main, *arguments, "--params", "written.yaml")
    assert done.returncode == 0, done.stderr
