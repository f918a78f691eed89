"""Presets: parameters composed by Hydra from the YAML files of `tasks/presets`."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml

from models.json_files import JsonObject
from tasks.params import Params, parse

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "tasks" / "presets"
BASE = "base"
FILES = {
    "download.path": "a folder, zip or tar of images",
    "train.init_from": "a folder with a trained pipeline, such as a copy of outputs/pipeline",
    "validate.baseline": "a copy of an earlier data/accepted.json, or of a file that holds {}",
}
"""Parameters that are local paths, which DVC reads before a stage runs -> what the path should name."""


class PresetError(ValueError):
    """A preset or an override that cannot be used; the message is one sentence with the remedy."""


def names() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if path.stem != BASE)


def parts() -> dict[str, list[str]]:
    """Hydra config groups of which an override can choose another option: group -> options."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(PRESETS.iterdir())
        if folder.is_dir()
    }


def compose(name: str, overrides: list[str]) -> JsonObject:
    """Return the parameters of preset `name` after `overrides`: complete, validated, as plain values.

    Args:
        name: A preset.
        overrides: `section.key=value` changes a parameter, `group=option` chooses another option of a config group.

    Raises:
        PresetError: for an unknown preset or option, or a path that does not exist.
        ParamsError: for parameters that are not valid.
    """
    if name not in names():
        raise PresetError(f"there is no preset '{name}'; {_alternative(name, names())}")
    values = {}
    for override in overrides:
        if "=" not in override.strip("="):
            raise PresetError(f"'{override}' is not an override; write section.key=value, such as train.steps=1000")
        key, _, value = override.partition("=")
        values[key] = value
    groups = parts()
    for key in values:
        if "." not in key and key not in {*groups, *Params.model_fields} and (close := _close(key, list(groups))):
            raise PresetError(f"unknown part '{key}'; did you mean '{close}'?")
    chosen = {key: value for key, value in values.items() if key in groups}
    for group, option in chosen.items():
        if option not in groups[group]:
            raise PresetError(f"there is no {group} '{option}'; {_alternative(option, groups[group])}")
    paths = {key: value for key, value in values.items() if key in FILES}
    merged = _merged(name, chosen, [text for text in overrides if text.partition("=")[0] not in chosen | paths])
    for key, path in paths.items():
        section, field = key.split(".")
        merged[section][field] = _path(key, path)
    document = parse(merged).model_dump(mode="json", by_alias=True)
    _require_files(document, typed=paths)
    return document


def _require_files(document: JsonObject, typed: Container[str]) -> None:
    """Raise `PresetError` for a path that does not exist; a path of a preset is relative to the root of the project."""
    for key, content in FILES.items():
        section, field = key.split(".")
        path = document[section][field]
        if not (Path() if key in typed else ROOT).joinpath(path).exists():
            raise PresetError(f"{key} '{path}' does not exist; give the path of {content}")


def _path(key: str, typed: str) -> str:
    """Return a path as it was typed, which YAML could read as another type; "~" at its start is the home folder.

    Raises `PresetError` for a path that cannot be used.
    """
    path = typed
    if typed.startswith("~") and not Path(typed).exists():
        try:
            path = str(Path(typed).expanduser())
        except RuntimeError:
            raise PresetError(f"{key} '{typed}' is in the home folder of an unknown user; correct it") from None
    if "${" in path:
        raise PresetError(f"{key} '{path}' contains '${{', which 'dvc exp run' reads as a reference; rename it")
    return path


def _merged(name: str, chosen: dict[str, str], overrides: list[str]) -> JsonObject:
    # Hydra takes 0.3 s to import, and not every command that imports this module composes a preset.
    from hydra.errors import ConfigCompositionException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = _configuration(name, tuple(f"{group}={option}" for group, option in chosen.items()))
    except ConfigCompositionException:
        raise PresetError(f"preset '{name}' does not support overriding {' or '.join(chosen)}; remove it") from None
    try:
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
        missing = sorted(OmegaConf.missing_keys(merged))
        document = OmegaConf.to_container(merged)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise PresetError(f"the overrides cannot be read: {str(error).splitlines()[0]}") from None
    if missing:
        raise PresetError(f"preset '{name}' needs {missing[0]}; add {missing[0]}=... to the command")
    return cast("JsonObject", document)


@functools.cache  # Hydra takes 0.2 s, and a process may name several runs after their preset
def _configuration(name: str, chosen: tuple[str, ...]) -> DictConfig:
    """The configuration of a preset with options of config groups, such as `source=folder`; not to be changed."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(PRESETS), version_base="1.3"):
        config = compose(name, list(chosen))
    OmegaConf.set_struct(config, False)  # so that tasks.params reports an unknown key, with similar ones
    return config


def _alternative(word: str, known: list[str]) -> str:
    close = _close(word, known)
    return f"did you mean '{close}'?" if close else f"there are {', '.join(known)}"


def _close(word: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)


def flatten(document: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key and value of every parameter in nested sections."""
    if not isinstance(document, dict):
        return
    for key, value in document.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
