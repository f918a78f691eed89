"""Write `params.yaml` from a preset.

    python -m tasks.preset NAME [key=value ...]     python -m tasks.preset --list

A preset is a file of `tasks/presets`, composed by Hydra: it names what it builds on and says what differs.
`key=value` changes one parameter (`train.steps=1000`) or picks another part (`conditioning=label`).
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from tasks.params import Params, ParamsError, parse, read
from tasks.runtime import atomic

PRESETS = Path(__file__).with_name("presets")
BASE = "base"
HEADER = (
    "# Written by `python -m tasks.preset {command}`. Edit freely, or change one value with "
    "`dvc exp run -S section.key=value`.\n"
)
COMMAND = re.compile(re.escape(HEADER).replace(re.escape("{command}"), "(.*)"))
SHOWN_CHANGES = 12
FILES = {
    "download.path": "a folder, zip or tar of images",
    "train.init_from": "a folder with a trained pipeline, such as a copy of outputs/pipeline",
    "validate.baseline": "a copy of an earlier data/accepted.json, or of a file that holds {}",
}
"""Parameters that are local paths, which DVC reads before a stage runs -> what should lie there."""


class PresetError(ValueError):
    """A preset or an override that cannot be used; the message is one sentence with the remedy."""


def names() -> list[str]:
    """The presets that can be asked for."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if path.stem != BASE)


def parts() -> dict[str, list[str]]:
    """Parts of which a preset can have another choice: name -> choices."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(PRESETS.iterdir())
        if folder.is_dir()
    }


def compose(name: str, overrides: list[str]) -> dict[str, Any]:
    """The parameters of preset `name` after `overrides`, complete and validated, as plain values.

    Raises `PresetError` or `ParamsError` with one sentence.
    """
    if name not in names():
        raise PresetError(f"there is no preset '{name}'; {_instead(name, names())}")
    for override in overrides:
        if "=" not in override.strip("="):
            raise PresetError(f"'{override}' is no override; write section.key=value, such as train.steps=1000")
    for key in (item.split("=", 1)[0] for item in overrides):
        if "." not in key and key not in {*parts(), *Params.model_fields} and (close := _close(key, list(parts()))):
            raise PresetError(f"unknown part '{key}'; did you mean '{close}'?")
    chosen = {key: value for key, value in (item.split("=", 1) for item in overrides) if key in parts()}
    for part, choice in chosen.items():
        if choice not in parts()[part]:
            raise PresetError(f"there is no {part} '{choice}'; {_instead(choice, parts()[part])}")
    paths = {key: value for key, value in (item.split("=", 1) for item in overrides) if key in FILES}
    merged = _merged(name, chosen, [item for item in overrides if item.split("=", 1)[0] not in chosen | paths])
    for key, typed in paths.items():
        section, field = key.split(".")
        merged[section][field] = _path(key, typed)
    document = parse(merged).model_dump(mode="json", by_alias=True)
    for key, what in FILES.items():
        section, field = key.split(".")
        path = document[section][field]
        if not Path(path).exists():
            raise PresetError(f"{key} '{path}' does not exist; give the path of {what}")
    return document


def _path(key: str, typed: str) -> str:
    """A path as it was typed, not as YAML would read it; "~" at its start is the home folder where no file is called
    so. Raises `PresetError` for a path that cannot be used."""
    path = typed
    if typed.startswith("~") and not Path(typed).exists():
        try:
            path = str(Path(typed).expanduser())
        except RuntimeError:
            raise PresetError(f"{key} '{typed}' names the home of a user whom this machine does not know") from None
    if "${" in path:
        raise PresetError(f"{key} '{path}' has '${{' in it, which 'dvc exp run' takes for a parameter; rename it")
    return path


def _merged(name: str, chosen: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import ConfigCompositionException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(PRESETS), version_base="1.3"):
            config = hydra_compose(name, [f"{part}={choice}" for part, choice in chosen.items()])
    except ConfigCompositionException:
        raise PresetError(f"preset '{name}' lets nobody choose its {' or '.join(chosen)}; leave that out") from None
    OmegaConf.set_struct(config, False)  # an unknown key is for tasks.params to refuse, which knows what was meant
    try:
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
        missing = sorted(OmegaConf.missing_keys(merged))
        document = OmegaConf.to_container(merged)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise PresetError(f"the overrides cannot be read: {str(error).splitlines()[0]}") from None
    if missing:
        raise PresetError(f"preset '{name}' needs {missing[0]}; add {missing[0]}=... to the command")
    return cast("dict[str, Any]", document)


def _instead(word: str, known: list[str]) -> str:
    close = _close(word, known)
    return f"did you mean '{close}'?" if close else f"there are {', '.join(known)}"


def _close(word: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)


def dump(document: dict[str, Any], command: str) -> str:
    """Text of `params.yaml` for a composed preset; `command` is how it was asked for.

    Written as DVC rewrites the file (`dvc/utils/serialize/_yaml.py`), so that `dvc exp run -S` changes one line.
    """
    from ruamel.yaml import YAML

    text = io.StringIO()
    YAML().dump(document, text)
    return HEADER.format(command=" ".join(command.split())) + text.getvalue()


def write(path: Path, text: str) -> Iterator[str]:
    """Write `text` to `path`. Yields a line for a copy of a file that was edited by hand, and one per changed value."""
    before = path.read_text(encoding="utf-8") if path.exists() else None
    if before is not None and before != text and _edited(before):
        kept = _keep(path, before)
        yield f"{path} had been edited; the old one is kept as {kept}"
    changes = _changes(path, text) if before is not None else []
    atomic.write_text(path, text)
    yield from changes[:SHOWN_CHANGES]
    if len(changes) > SHOWN_CHANGES:
        yield f"and {len(changes) - SHOWN_CHANGES} more"


def _edited(text: str) -> bool:
    """Whether a parameter file is not what the command in its header writes."""
    header = COMMAND.match(text)
    try:
        name, *overrides = shlex.split(header[1]) if header else [""]
        return text != dump(compose(name, overrides), header[1] if header else "")
    except ValueError:  # a preset of another version, or a source that has moved
        return True


def _keep(path: Path, text: str) -> Path:
    """Save `text` beside `path` under the first name that is free, or that holds the same."""
    number = 1
    while True:
        kept = path.with_name(f"{path.name}.bak{number if number > 1 else ''}")
        if not kept.exists():
            atomic.write_text(kept, text)
        if kept.read_text(encoding="utf-8") == text:
            return kept
        number += 1


def _changes(path: Path, text: str) -> list[str]:
    """`key: old -> new` for each value in which the file at `path` differs from `text`."""
    from ruamel.yaml import YAML

    try:
        before = dict(_flat(read(path)))
    except ParamsError:
        return []
    after = dict(_flat(YAML(typ="safe", pure=True).load(text)))
    return [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in dict.fromkeys([*after, *before])
        if (key in before, before.get(key)) != (key in after, after.get(key))
    ]


def _flat(document: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested sections."""
    if not isinstance(document, dict):
        return
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False, default=str) if key in values else "(none)"


def main() -> None:
    choices = "; ".join(f"{part}={'|'.join(known)}" for part, known in parts().items())
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
    print(f"preset: wrote {arguments.params} from '{arguments.name}'; 'make repro' brings the chain up to it")


if __name__ == "__main__":
    main()
