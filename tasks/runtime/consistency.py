"""Comparison of a stage's inputs with `params.yaml`: both must name the same resolution, conditioning and codec.

A pipeline that is to be drawn from with autoguidance must contain a guide.

DVC decides by hashes whether an output is up to date. If it is wrong (a cache shared with another version, files copied
by hand), a stage would compute with, for example, images of another resolution, without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from models.json_files import JsonObject
from tasks.runtime import integrity
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.params import Params

Values: TypeAlias = dict[str, object]
"""Dotted name of a parameter -> value."""


@dataclass(frozen=True)
class Artefact:
    """An output folder whose description names the parameters that it was made with."""

    made_by: str
    """The stage that writes it."""
    description: str
    """JSON file in the folder."""
    values: Callable[[JsonObject], Values]
    """Reads the parameters from the content of that file."""


def _codec(description: JsonObject) -> Values:
    return _image(description) | {
        "codec.conditioning": description["conditioning"],
        "codec.kind": description["kind"],
    }


def _latents(description: JsonObject) -> Values:
    return _image(description["image"]) | {
        "codec.conditioning": description["conditioning"],
        "codec.kind": description["codec"],
    }


def _model(description: JsonObject) -> Values:
    return _image(description) | {
        "codec.conditioning": description["conditioning"],
        "codec.kind": "autoencoder" if description["latent"] else "identity",
    }


def _judge(description: JsonObject) -> Values:
    return _image(description["image"])


def _image(description: JsonObject) -> Values:
    return {"image.resolution": description["size"], "image.channels": description["channels"]}


CODEC = Artefact("codec", "codec.json", _codec)
LATENTS = Artefact("encode", "index.json", _latents)
PIPELINE = Artefact("train", "afterimage.json", _model)
JUDGE = Artefact("judge", "judge.json", _judge)
BUNDLE = Artefact("export", "bundle.json", _model)
MODEL = Artefact("package", "pipeline/afterimage.json", _model)

INPUTS: dict[str, dict[str, Artefact]] = {
    "encode": {"codec": CODEC},
    "prior": {"codec": CODEC},
    "train": {"codec": CODEC, "data": LATENTS},
    "evaluate": {"pipeline": PIPELINE, "judge": JUDGE},
    "edit": {"pipeline": PIPELINE, "judge": JUDGE},
    "visualize": {"pipeline": PIPELINE},
    "export": {"pipeline": PIPELINE},
    "package": {"pipeline": PIPELINE, "onnx": BUNDLE},
    "register": {"model": MODEL, "judge": JUDGE},
}
"""Stage -> argument of its function -> the input that is compared."""


def require(stage: str, paths: Mapping[str, Path], params: Params) -> None:
    """Raise `StageError` if an input of `stage` was made with parameters that differ from `params`.

    A missing input is left to the stage, which reports it.
    """
    asked = {
        "image.resolution": params.image.resolution,
        "image.channels": params.image.channels,
        "codec.conditioning": params.codec.conditioning,
        "codec.kind": params.codec.kind,
    }
    for argument, artefact in INPUTS.get(stage, {}).items():
        folder = paths[argument]
        description = folder / artefact.description
        if not description.is_file():
            continue
        try:
            found = artefact.values(integrity.read_json(description, artefact.made_by))
        except (KeyError, TypeError):
            raise StageError(f"{description} is of another version; {integrity.remedy(artefact.made_by)}") from None
        other = [f"{key} {value} and not {asked[key]}" for key, value in found.items() if value != asked[key]]
        if other:
            raise StageError(f"{folder} was made for {', '.join(other)}; {integrity.remedy(artefact.made_by)}")
        if artefact is PIPELINE:
            _require_guide(stage, folder, description, params)


def _require_guide(stage: str, folder: Path, description: Path, params: Params) -> None:
    """Raise `StageError` if `stage` draws with autoguidance and the pipeline in `folder` has no guide."""
    kinds = {"evaluate": params.evaluate.guidance, "visualize": params.visualize.guidance}
    if kinds.get(stage) != "auto":
        return
    if not any(name.startswith("guide/") for name in integrity.read_json(description, PIPELINE.made_by)["files"]):
        raise StageError(f"{folder} has no guide for {stage}.guidance 'auto'; {integrity.remedy(PIPELINE.made_by)}")
