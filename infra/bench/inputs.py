"""Inputs of the measurements: a dataset prepared by the project's stages, and its training images as plain files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.hashing import file_sha256
from tasks.codec import codec
from tasks.download import download
from tasks.encode import encode
from tasks.ingest import ingest
from tasks.judge import judge as train_judge
from tasks.params import Demands, Params, parse
from tasks.params.composition import compose
from tasks.pictures.images import read_columns
from tasks.runtime import atomic
from tasks.validate import validate

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True)
class Inputs:
    """Output folders of the stages: `data` of one source, `model` with one format of model inputs, `judge`."""

    data: Path
    model: Path
    judge: Path

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def accepted(self) -> Path:
        return self.data / "accepted.json"

    @property
    def files(self) -> Path:
        """The training images as files, which the reference script reads."""
        return self.data / "files"

    @property
    def codec(self) -> Path:
        return self.model / "codec"

    @property
    def latents(self) -> Path:
        return self.model / "latents"


def parameters(preset: str, archive: Path | None, *overrides: str) -> Params:
    """Parameters of a preset.

    A CIFAR-10 preset reads `archive`, a zip of JPEGs in class folders. Without one it reads the digits, resized to
    32x32 RGB, which take as long to train on.
    """
    chosen = ["ingest.caption_templates=[]"]  # with captions, the judge would train a CLIP that is not used here
    chosen += ["evaluate.guidance_sweep=[]"]  # nothing is evaluated here, and an unconditional model has no guidance
    if preset.startswith("cifar10") and archive:
        chosen += ["download.source=folder", f"download.path={archive}"]
    elif preset.startswith("cifar10"):
        chosen += ["download.source=digits", "validate.min_side=8"]
        chosen += ["validate.min_images=1000", "validate.min_images_per_class=0"]
    return parse(compose(preset, [*chosen, *overrides]))


def prepare(work: Path, params: Params, judge: bool = False) -> Inputs:
    """Run the stages up to `encode` and, with `judge`, the judge; outputs that exist are kept."""
    source = Path(params.download.path)
    data = work / f"data-{_key(params.download, params.ingest, params.validation, file_sha256(source))}"
    model = data / f"model-{_key(params.image, params.codec, params.encode)}"
    made = Inputs(data, model, data / f"judge-{_key(params.image, params.judge)}")
    _once(data / "raw", lambda out: download(out, params.download))
    _once(made.images, lambda out: ingest(data / "raw", out, data / "quarantine", params.ingest))
    _once(
        made.accepted,
        lambda out: validate(
            made.images, data / "quarantine", out, data / "validation", params.validation, params.section(Demands)
        ),
    )
    _once(made.files, lambda out: _write_files(made.images, out))
    _once(made.codec, lambda out: codec(made.images, made.accepted, out, params.codec, params.image))
    _once(made.latents, lambda out: encode(made.images, made.accepted, made.codec, out, params.encode))
    if judge:
        _once(made.judge, lambda out: train_judge(made.images, made.accepted, out, params.judge, params.image))
    return made


def key(value: object) -> str:
    """Short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _key(*sections: BaseModel | str) -> str:
    return key([section if isinstance(section, str) else section.model_dump(mode="json") for section in sections])


def _once(out: Path, make: Callable[[Path], None]) -> None:
    """Run `make` unless its output exists: a stage writes its output completely or not at all."""
    if not out.exists():
        print(f"bench: {out.name}", flush=True)
        make(out)


def _write_files(images: Path, folder: Path) -> None:
    """Write the images of the training split with their published bytes."""
    with atomic.writing_folder(folder) as temporary:
        columns = read_columns(images, ["image", "split"]).to_pydict()
        training = [data for data, split in zip(columns["image"], columns["split"], strict=True) if split == "train"]
        for number, data in enumerate(training):
            suffix = "jpg" if data[:2] == b"\xff\xd8" else "png"
            (temporary / f"{number:06d}.{suffix}").write_bytes(data)
