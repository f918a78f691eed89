"""Write `params.yaml` from a preset.

    python -m tasks.preset NAME [key=value ...]     python -m tasks.preset --list

A preset is a file of `tasks/presets`, composed by Hydra: it names the presets that it extends, and the parameters that
differ. `key=value` overrides a parameter (`train.steps=1000`) or chooses another config group (`conditioning=label`).
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from models.json_files import JsonObject
from tasks.params import ParamsError, read
from tasks.params.composition import PRESETS, PresetError, compose, flatten, names, parts
from tasks.runtime import atomic

HEADER = (
    "# Written by `python -m tasks.preset {command}`. Edit freely, or change one value with "
    "`dvc exp run -S section.key=value`.\n"
)
COMMAND = re.compile(re.escape(HEADER).replace(re.escape("{command}"), "(.*)"))
SHOWN_CHANGES = 12


def dump(document: JsonObject, command: str) -> str:
    """Return the text of `params.yaml` for a composed preset; `command` goes into its header.

    Formatted as DVC formats the file (`dvc/utils/serialize/_yaml.py`), so that `dvc exp run -S` changes one line.
    """
    from ruamel.yaml import YAML

    text = io.StringIO()
    YAML().dump(document, text)
    return HEADER.format(command=" ".join(command.split())) + text.getvalue()


def write(path: Path, text: str) -> Iterator[str]:
    """Write `text` to `path` and yield the changes: one line per value, and one for the backup of an edited file."""
    before = path.read_text(encoding="utf-8") if path.exists() else None
    if before is not None and before != text and _is_edited(before):
        yield f"{path} had been edited; the old one is kept as {_back_up(path, before)}"
    changes = _changes(path, text) if before is not None else []
    atomic.write_text(path, text)
    yield from changes[:SHOWN_CHANGES]
    if len(changes) > SHOWN_CHANGES:
        yield f"and {len(changes) - SHOWN_CHANGES} more"


def _is_edited(text: str) -> bool:
    """Whether a parameter file differs from what the command in its header writes."""
    header = COMMAND.match(text)
    try:
        name, *overrides = shlex.split(header[1]) if header else [""]
        return text != dump(compose(name, overrides), header[1] if header else "")
    except ValueError:  # a preset of another version, or a source that has moved
        return True


def _back_up(path: Path, text: str) -> Path:
    """Write `text` beside `path`, under the first name that is free or has the same content."""
    number = 1
    while True:
        backup = path.with_name(f"{path.name}.bak{number if number > 1 else ''}")
        if not backup.exists():
            atomic.write_text(backup, text)
        if backup.read_text(encoding="utf-8") == text:
            return backup
        number += 1


def _changes(path: Path, text: str) -> list[str]:
    """`key: old -> new` for each value in which the file at `path` differs from `text`."""
    from ruamel.yaml import YAML

    try:
        before = dict(flatten(read(path)))
    except ParamsError:
        return []
    after = dict(flatten(YAML(typ="safe", pure=True).load(text)))
    return [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in dict.fromkeys([*after, *before])
        if (key in before, before.get(key)) != (key in after, after.get(key))
    ]


def _shown(values: dict[str, object], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False, default=str) if key in values else "(none)"


def main() -> None:
    """Run the command line."""
    choices = "; ".join(f"{group}={'|'.join(options)}" for group, options in parts().items())
    parser = argparse.ArgumentParser(
        prog="python -m tasks.preset",
        description="Write params.yaml from a preset.",
        epilog=f"presets: {', '.join(names())}. parts: {choices}",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="parameters that differ from the preset")
    parser.add_argument("--list", action="store_true", help="list the presets")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="file to write")
    arguments = parser.parse_args()
    if arguments.list:
        widest = max(map(len, names()))
        for name in names():
            purpose = (PRESETS / name).with_suffix(".yaml").read_text(encoding="utf-8").splitlines()[0][2:]
            print(f"{name:<{widest}}  {purpose}")
        return
    if arguments.name is None:
        parser.error("name a preset; --list shows them")
    try:
        document = compose(arguments.name, arguments.overrides)
    except (PresetError, ParamsError) as error:
        sys.exit(f"preset: error: {error}")
    text = dump(document, shlex.join([arguments.name, *arguments.overrides]))
    for line in write(arguments.params, text):
        print(f"preset: {line}")
    print(f"preset: wrote {arguments.params} from '{arguments.name}'; 'make repro' runs the chain with it")


if __name__ == "__main__":
    main()
