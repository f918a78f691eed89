"""What a stage reads against what `params.yaml` asks for.

DVC decides by hashes whether an output is up to date. Where it is wrong (a cache shared with another version, files
copied by hand), a stage would go on with images of another resolution, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.params import Params
from tasks.runtime import integrity
from tasks.runtime.stage import StageError

Facts = dict[str, Any]
"""Parameter, as `section.key` -> its value."""


@dataclass(frozen=True)
class Artefact:
    """An output folder that says what it was made for."""

    made_by: str
    """The stage that writes it."""
    description: str
    """JSON file in the folder."""
    facts: Callable[[dict[str, Any]], Facts]


def _codec(its: dict[str, Any]) -> Facts:
    return _image(its) | {"codec.conditioning": its["conditioning"], "codec.kind": its["kind"]}


def _latents(its: dict[str, Any]) -> Facts:
    return _image(its["image"]) | {"codec.conditioning": its["conditioning"], "codec.kind": its["codec"]}


def _model(its: dict[str, Any]) -> Facts:
    kind = "autoencoder" if its["latent"] else "identity"
    return _image(its) | {"codec.conditioning": its["conditioning"], "codec.kind": kind}


def _image(its: dict[str, Any]) -> Facts:
    return {"image.resolution": its["size"], "image.channels": its["channels"]}


CODEC = Artefact("codec", "codec.json", _codec)
LATENTS = Artefact("encode", "index.json", _latents)
PIPELINE = Artefact("train", "afterimage.json", _model)
JUDGE = Artefact("judge", "judge.json", lambda its: _image(its["image"]))
BUNDLE = Artefact("export", "bundle.json", _model)
MODEL = Artefact("package", "pipeline/afterimage.json", _model)

READ: dict[str, dict[str, Artefact]] = {
    "encode": {"codec": CODEC},
    "train": {"codec": CODEC, "data": LATENTS},
    "evaluate": {"pipeline": PIPELINE, "judge": JUDGE},
    "visualize": {"pipeline": PIPELINE},
    "export": {"pipeline": PIPELINE},
    "package": {"pipeline": PIPELINE, "onnx": BUNDLE},
    "register": {"model": MODEL, "judge": JUDGE},
}
"""Stage -> its arguments that were made for some parameters."""


def require(stage: str, paths: Mapping[str, Path], params: Params) -> None:
    """Raise `StageError` where an input of `stage` was made for another resolution, other channels, another
    conditioning or another kind of codec than `params` ask for. What is missing, the stage itself reports."""
    asked = {
        "image.resolution": params.image.resolution,
        "image.channels": params.image.channels,
        "codec.conditioning": params.codec.conditioning,
        "codec.kind": params.codec.kind,
    }
    for argument, artefact in READ.get(stage, {}).items():
        folder = paths[argument]
        if not (folder / artefact.description).is_file():
            continue
        try:
            found = artefact.facts(integrity.read_json(folder / artefact.description, artefact.made_by))
        except (KeyError, TypeError):
            raise StageError(
                f"{folder / artefact.description} is of another version; {integrity.remedy(artefact.made_by)}"
            ) from None
        other = [f"{key} {value} and not {asked[key]}" for key, value in found.items() if value != asked[key]]
        if other:
            raise StageError(f"{folder} was made for {', '.join(other)}; {integrity.remedy(artefact.made_by)}")
