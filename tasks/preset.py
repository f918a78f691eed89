"""Write `params.yaml` from a preset.

    python -m tasks.preset NAME [key=value ...]     python -m tasks.preset --list

A preset is a file of `tasks/presets`, composed by Hydra: it names what it builds on and says what differs.
`key=value` changes one parameter (`train.steps=1000`) or picks another part (`conditioning=label`).
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
from pathlib import Path
from typing import Any, cast

import yaml

from tasks.params import ParamsError, parse
from tasks.runtime import atomic

PRESETS = Path(__file__).with_name("presets")
BASE = "base"
HEADER = (
    "# Written by `python -m tasks.preset {command}`. Edit freely, or change one value with "
    "`dvc exp run -S section.key=value`.\n"
)


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
    chosen = {key: value for key, value in (item.split("=", 1) for item in overrides) if key in parts()}
    for part, choice in chosen.items():
        if choice not in parts()[part]:
            raise PresetError(f"there is no {part} '{choice}'; {_instead(choice, parts()[part])}")
    document = _merged(name, chosen, [item for item in overrides if item.split("=", 1)[0] not in chosen])
    path = document["download"]["path"]
    document["download"]["path"] = str(Path(path).expanduser())
    if not Path(document["download"]["path"]).exists():
        raise PresetError(f"download.path '{path}' does not exist; give the path of a folder, zip or tar of images")
    return parse(document).model_dump(mode="json", by_alias=True)


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
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known)}"


class _Dumper(yaml.SafeDumper):
    """Lists of numbers on one line, lists of words below each other."""


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    words = any(isinstance(item, str) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=not words)


_Dumper.add_representer(list, _represent_list)


def dump(document: dict[str, Any], command: str) -> str:
    """Text of `params.yaml` for a composed preset; `command` is how it was asked for."""
    return HEADER.format(command=" ".join(command.split())) + yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
    )


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
    atomic.write_text(arguments.params, dump(document, shlex.join([arguments.name, *arguments.overrides])))
    print(f"preset: wrote {arguments.params} from '{arguments.name}'; 'dvc repro' brings the chain up to it")


if __name__ == "__main__":
    main()
