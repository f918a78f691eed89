"""Write the reference of every parameter, from the types, defaults, limits and docstrings in `tasks/params`.

    python -m infra.reference [--out FILE]

`make docs` makes the page "Parameters" from it. A test requires that every key has a description.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from tasks import params
from tasks.params import Params

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥", "max_length": "length ≤"}
NAMES = {int: "integer", float: "number", str: "string", bool: "true or false", NoneType: "null"}
DEFAULTS = Path("params.yaml")
"""The parameters of the default preset, whose values stand beside those of the types."""

INTRODUCTION = """\
Every key of `params.yaml`, generated from `tasks/params`. A key without a default is required; presets set all of
these. The value of the default preset, `digits`, is given if it differs from the default.

Set a key with `python -m tasks.preset NAME KEY=VALUE`, with `dvc exp run -S KEY=VALUE`, or in the file. An unknown key,
a wrong type or a combination that cannot work is refused before the first stage runs."""


class Key(NamedTuple):
    """One parameter."""

    name: str
    """Dotted, such as `train.distil.after`."""
    kind: str
    """Type and limits, in words."""
    default: str | None
    """As it is written in YAML; None if the key is required."""
    description: str


class Part(NamedTuple):
    """A section, or a section inside one."""

    name: str
    description: str
    keys: list[Key]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.reference", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    out = parser.parse_args().out
    if out is None:
        print(page(), end="")
    else:
        out.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """Return the whole reference as a Markdown page."""
    values = params.read(DEFAULTS) if DEFAULTS.exists() else {}
    lines = ["# Parameters", "", INTRODUCTION]
    for part in parts(Params):
        lines += ["", f"## {part.name}", "", part.description, ""]
        lines += ["| key | meaning, type and default |", "|---|---|"]
        lines += [_row(key, part.name, values) for key in part.keys]
    return "\n".join(lines) + "\n"


def _row(key: Key, section: str, values: object) -> str:
    own = values
    for name in key.name.split("."):
        own = own.get(name) if isinstance(own, dict) else None
    facts = [key.kind, f"default `{key.default}`" if key.default is not None else "required"]
    if own is not None and (shown := _yaml(own)) != key.default:
        facts.append(f"`{shown}` in `digits`")
    name = key.name.removeprefix(f"{section}.")
    return f'| <span id="{key.name}"></span>`{name}` | {key.description}<br>*{"; ".join(facts)}* |'


def parts(model: type[BaseModel], prefix: str = "") -> Iterator[Part]:
    """Yield the sections of `model`, each followed by the sections inside it."""
    described = descriptions(model)
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        if section := section_of(field):
            said = described.get(name) or _plain(inspect.getdoc(section) or "")
            yield Part(key, said, list(keys(section, f"{key}.")))
            yield from parts(section, f"{key}.")


def keys(section: type[BaseModel], prefix: str) -> Iterator[Key]:
    """Yield the keys of a section that are no sections themselves."""
    described = descriptions(section)
    for name, field in section.model_fields.items():
        if section_of(field) is None:
            default = None if field.is_required() else _yaml(field.get_default(call_default_factory=True))
            yield Key(prefix + (field.alias or name), type_of(field), default, described.get(name, ""))


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field holds, or None for a value."""
    kinds = get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


@functools.cache
def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each field of a section, as one line of Markdown."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for field, below in itertools.pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = _plain(text)
    return found


def _plain(docstring: str) -> str:
    return " ".join(docstring.split()).replace("|", "\\|")


def type_of(field: FieldInfo) -> str:
    """Return type and limits of a field in words, such as `integer > 0`."""
    return " ".join([_words(field.annotation), *_limits(field.metadata)])


def _words(kind: Any) -> str:
    """Describe an annotation: any form of type that a parameter may have."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [found for entry in arguments[1:] for found in _limits(getattr(entry, "metadata", [entry]))]
        return " ".join([_words(arguments[0]), *limits])
    if origin is Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is tuple:
        inner = [_words(argument) for argument in arguments if argument is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    return NAMES.get(kind, str(kind))


def _limits(metadata: list[Any]) -> Iterator[str]:
    """Yield the limits of a type; `metadata` holds objects of pydantic and annotated-types with these attributes."""
    for entry in metadata:
        for name, sign in LIMITS.items():
            if (bound := getattr(entry, name, None)) is not None:
                yield f"{sign} {_number(bound)}"


def _number(value: float) -> str:
    return "2^32" if value == 2**32 else f"{value:g}"


def _yaml(value: object) -> str:
    """Return a value as it is written in `params.yaml`."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(_yaml(entry) for entry in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]+", value) else repr(value)
    return f"{value:,}".replace(",", "_") if isinstance(value, int) and value >= 100_000 else str(value)


if __name__ == "__main__":
    sys.exit(main())
