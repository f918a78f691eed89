"""Every parameter of the chain, typed and validated.

`params.yaml` has one section per stage, and `image`, `model` and `diffusion`, which several stages read. `load()`
validates the whole file, so that an error in any section stops the first stage. Importing this package loads no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ValidationError

from tasks.params.chain import BaseWeights, Demands, Params, names_of
from tasks.params.codec import AutoencoderParams, CodecParams, TextParams
from tasks.params.control import ControlParams
from tasks.params.data import (
    ColumnsParams,
    DownloadParams,
    EncodeParams,
    HubParams,
    ImageParams,
    IngestParams,
    LaionParams,
    S3Params,
    ValidateParams,
)
from tasks.params.distil import DistilParams
from tasks.params.editing import EditParams
from tasks.params.model import DiffusionParams, DitParams, ModelParams, TrainParams
from tasks.params.prior import PriorParams
from tasks.params.redaction import redacted, secret_in_address
from tasks.params.results import (
    IMAGES_PER_DIMENSION,
    EvaluateParams,
    ExportParams,
    ExtractorParams,
    Headline,
    JudgeParams,
    RegisterParams,
    ScoringClipParams,
    VisualizeParams,
)
from tasks.params.section import LOCAL, NO_PATH, ParamsError, Section

__all__ = [
    "IMAGES_PER_DIMENSION", "LOCAL", "NO_PATH", "AutoencoderParams", "BaseWeights", "CodecParams", "ColumnsParams",
    "ControlParams", "Demands", "DiffusionParams", "DistilParams", "DitParams", "DownloadParams", "EditParams",
    "EncodeParams", "EvaluateParams", "ExportParams", "ExtractorParams", "Headline", "HubParams", "ImageParams",
    "IngestParams", "JudgeParams", "LaionParams", "ModelParams", "Params", "ParamsError", "PriorParams",
    "RegisterParams", "S3Params", "ScoringClipParams", "Section", "TextParams", "TrainParams", "ValidateParams",
    "VisualizeParams", "load", "names_of", "parse", "read",
]  # fmt: skip

RENAMED = {"image.size": "image.resolution", "evaluate.n_ddpm": "evaluate.n_slowest"}
"""Keys of earlier versions -> their present names."""
MAX_SUGGESTIONS = 3
"""Most keys that are suggested for an unknown one."""


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and validate `path`.

    Raises:
        ParamsError: with one sentence that names the key and the remedy.
    """
    return parse(read(path))


def read(path: Path = Path("params.yaml")) -> object:
    """Return the YAML document at `path` without validating it.

    The file is YAML 1.2, as DVC reads and writes it: `no` is a string and 1e-05 a number.

    Raises:
        ParamsError: if there is no such file, or if it is not valid YAML in UTF-8.
    """
    # Only a process that reads a parameter file needs this package.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        document: object = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist; write it with 'python -m tasks.preset digits'") from None
    except UnicodeDecodeError:
        raise ParamsError(f"{path} is not UTF-8; save it as UTF-8, or write it anew with tasks.preset") from None
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        where = f" at line {mark.line + 1}" if mark else ""
        raise ParamsError(f"{path} is not valid YAML{where}; correct it, or write it anew with tasks.preset") from None
    return document


def parse(document: object) -> Params:
    """Validate the document of a parameter file.

    Raises:
        ParamsError: with one sentence that names the key and the remedy.
    """
    if not isinstance(document, dict):
        raise ParamsError("params.yaml holds no sections; write it with 'python -m tasks.preset digits'")
    _refuse_secrets(document, ())
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise ParamsError(redacted(_sentence(error))) from None


def _refuse_secrets(value: object, keys: tuple[str, ...]) -> None:
    """Raise `ParamsError` for an address with a password or a token: parameters are copied to dvc.lock and MLflow.

    Every string at any depth is checked, so that a new address parameter cannot be forgotten.
    """
    if isinstance(value, dict):
        for name, entry in value.items():
            _refuse_secrets(entry, (*keys, str(name)))
    elif isinstance(value, list | tuple):
        for entry in value:
            _refuse_secrets(entry, keys)
    elif isinstance(value, str) and (found := secret_in_address(value)):
        raise ParamsError(
            f"{'.'.join(keys)} holds {found}, which would be recorded in dvc.lock and MLflow; {_remedy(keys, value)}"
        )


def _remedy(keys: tuple[str, ...], address: str) -> str:
    if not address.startswith(("http://", "https://")) or keys[-1] == "endpoint_url":
        return "remove it, and put credentials into the environment or the AWS profile"
    return (
        "remove it, and put user and password into ~/.netrc, or the whole address into an environment variable, such "
        f"as AFTERIMAGE_URL, and write {keys[-1]}: env:AFTERIMAGE_URL"
    )


def _sentence(error: ValidationError) -> str:
    """The first error of pydantic as one sentence that names the key and the remedy.

    An unknown key comes first: a misspelled or renamed one also counts as missing.
    """
    errors = error.errors()
    first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
    location = first["loc"]
    key = ".".join(str(part) for part in location)
    if key in RENAMED:
        return f"parameter '{key}' is now called '{RENAMED[key]}'; rename it"
    if first["type"] == "extra_forbidden":
        return f"unknown parameter '{key}'; {_suggestion(location)}"
    if first["type"] == "missing":
        return f"parameter '{key}' is missing; add it, or write the file anew with 'python -m tasks.preset NAME'"
    if first["type"] == "model_type":
        return f"'{key}' is a section and not a value; set one of its keys, such as {key}.{_keys_in(key)[0]}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    message = first["msg"].replace("a valid tuple", "a list").replace("Tuple", "List").replace(" after validation", "")
    return f"parameter '{key}' is {first['input']!r}: {message[0].lower()}{message[1:]}"


def _suggestion(location: tuple[int | str, ...]) -> str:
    """Similar keys of the same section, else similar keys of other sections, else all keys of the section."""
    *parents, name = map(str, location)
    known, own = list(_keys(Params)), _keys_in(".".join(parents))
    if close := difflib.get_close_matches(name, own, n=1):
        return f"did you mean '{close[0]}'?"
    if close := difflib.get_close_matches(name, {key.rpartition(".")[2]: key for key in known}, n=1):
        similar = [key for key in known if key.rpartition(".")[2] == close[0]]
        shortest = sorted(similar, key=lambda key: key.count("."))[:MAX_SUGGESTIONS]
        return f"did you mean {' or '.join(shortest)}?"
    return f"known keys: {', '.join(own)}"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys that a section may hold, at any depth."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        for kind in get_args(field.annotation) or (field.annotation,):  # a section, or a section and None
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{key}.")


def _keys_in(section: str) -> list[str]:
    """Keys of one section, or of the whole file for ''."""
    parted = (key.rpartition(".") for key in _keys(Params))
    return [name for parent, _, name in parted if parent == section]
