"""The declared protocol of an evaluation, and its fingerprint.

`evaluate` declares a protocol and stores it as `protocol.json`; `register` measures a champion by the same one. A
`Measurement` holds what two numbers must have in common to be comparable, and its SHA-256 is the fingerprint. Sampler,
steps, eta, kind and scale of the guidance, precision and compilation are not part of it: numbers drawn with different
settings may be compared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from models.noise.samplers import DEFAULT_SAMPLING, Sampling
from tasks.pictures import samples
from tasks.pictures.index import ImageIndex, read_index
from tasks.runtime import atomic, integrity
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.json_files import JsonObject
    from models.judges.judge import Judge
    from models.networks.compilation import Setting
    from models.pipeline import Pipeline
    from tasks.params import EvaluateParams, Headline

FILE = "protocol.json"
FLOOR = {"split": "train", "images": "as many, of the classes asked for, as far as there are"}
QUANTISATION = "uint8"
"""These two are part of the fingerprint: numbers measured before and after a change of them do not compare."""
UNGUIDED = 1.0
"""Guidance scale that disables guidance."""


class NotComparableError(StageError):
    """A pipeline, judge or data set does not fit the protocol; the message says why in one sentence."""


@dataclass(frozen=True)
class Reference:
    """The held-out images that samples are compared with."""

    images: int
    """Their number: all, or `samples.HELD_OUT` of them, chosen by `samples.held_out_rows`."""
    sha256: str
    """Content hash of the data set."""
    split: str = "test"

    @classmethod
    def of(cls, index: ImageIndex) -> Reference:
        """Return the reference of a data set."""
        return cls(min(index.splits["test"], samples.HELD_OUT), index.sha256)


@dataclass(frozen=True)
class Measurement:
    """What two numbers must have in common to be comparable."""

    FORMAT: ClassVar[int] = 1
    """Part of the fingerprint."""

    n_distance: int
    """Unguided samples in each seed block, for the distances."""
    n_accuracy: int
    """Guided samples in each seed block, for label accuracy and CLIP score."""
    seed: int
    seed_blocks: int
    reference: Reference
    judge: dict[str, str]
    """SHA-256 of each of the judge's networks."""
    extractor: str
    """See `Judge.kind`."""
    feature_dim: int
    image: dict[str, int]
    """`channels` and `size` (height and width in pixels) of the images."""
    labels: list[str] | None
    """Names of the classes; None for an unconditional model."""
    prompts: list[str] | None
    """The caption of each class, if captions follow from the class."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the measurement as canonical JSON."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> JsonObject:
        """Return the section `measurement` of `protocol.json`."""
        return {"format": self.FORMAT, **asdict(self), "floor": FLOOR, "quantisation": QUANTISATION}

    @classmethod
    def from_json(cls, values: JsonObject) -> Measurement:
        """Build the measurement from its section; the inverse of `to_json`."""
        fixed = {"format": cls.FORMAT, "floor": FLOOR, "quantisation": QUANTISATION}
        if {name: values.get(name) for name in fixed} != fixed:
            raise ValueError("another kind of measurement")
        fields = {name: value for name, value in values.items() if name not in fixed}
        return cls(**{**fields, "reference": Reference(**fields["reference"])})


@dataclass(frozen=True)
class Protocol:
    """`protocol.json`: the measurement, and the settings with which it draws samples."""

    FORMAT: ClassVar[int] = 1

    measurement: Measurement
    headline: Headline
    """The distance that gates and reports lead with. Not part of the fingerprint: every distance is measured alike."""
    space: str
    """"pixels" or "latents": where the model denoises."""
    conditioning: str
    """"none", "label" or "text"."""
    clip_is_condition: bool
    """Whether the CLIP that scores also conditions the model."""
    unguided: Sampling
    """For the distances."""
    guided: Sampling | None
    """For label accuracy and CLIP score; None for a model without guidance."""
    batch_size: int
    precision: str = "no"
    """Precision of the network that draws, see `models/networks/precision.py`; written unless it is "no"."""
    compile: Setting = False
    """Whether that network is compiled, see `models/networks/compilation.py`; written unless it is false."""

    @property
    def fingerprint(self) -> str:
        """See `Measurement.fingerprint`."""
        return self.measurement.fingerprint

    def to_json(self) -> JsonObject:
        """Return the content of the file, without the format number."""
        sampling, interval = self.unguided, self.unguided.guidance_interval
        return {
            "measurement": self.measurement.to_json(),
            "fingerprint": self.fingerprint,
            "headline": self.headline,
            "space": self.space,
            "conditioning": self.conditioning,
            "clip_is_condition": self.clip_is_condition,
            "sampler": sampling.sampler,
            "steps": sampling.steps,
            "eta": sampling.eta,
            "guidance_scales": {
                "unguided": sampling.guidance_scale,
                "guided": self.guided.guidance_scale if self.guided else None,
            },
            "guidance_interval": interval and list(interval),
            "guidance": self.guided.guidance if self.guided else None,
            "batch_size": self.batch_size,
            **({"precision": self.precision} if self.precision != "no" else {}),
            **({"compile": self.compile} if self.compile else {}),
        }

    @classmethod
    def from_json(cls, values: JsonObject) -> Protocol:
        """Build the protocol from the content of its file; the inverse of `to_json`."""
        scales, interval = values["guidance_scales"], values["guidance_interval"]
        unguided = Sampling(
            values["sampler"], values["steps"], values["eta"], scales["unguided"], interval and tuple(interval)
        )
        return cls(
            measurement=Measurement.from_json(values["measurement"]),
            headline=values["headline"],
            space=values["space"],
            conditioning=values["conditioning"],
            clip_is_condition=values["clip_is_condition"],
            unguided=unguided,
            guided=None
            if scales["guided"] is None
            else replace(unguided, guidance_scale=scales["guided"], guidance=values["guidance"]),
            batch_size=values["batch_size"],
            precision=values.get("precision", "no"),
            compile=values.get("compile", False),
        )

    def write(self, file: Path) -> None:
        """Write the protocol with its format number; equal protocols give equal bytes."""
        atomic.write_json(file, {"format": self.FORMAT, **self.to_json()})

    @classmethod
    def read(cls, file: Path) -> Protocol:
        """Read a protocol.

        Raises:
            StageError: if the file is missing, damaged, or of another format.
        """
        values = integrity.read_json(file, "evaluate")
        try:
            if values.get("format") == cls.FORMAT:
                return cls.from_json(values)
        except (KeyError, TypeError, ValueError):
            pass
        raise StageError(f"{file} was written by another version of this project; run 'dvc repro evaluate'")


def declare(pipeline: Pipeline, images: Path, judge: Judge, params: EvaluateParams) -> Protocol:
    """Return the protocol by which `params` has this pipeline measured; `images` is the folder of the data set."""
    index, info = read_index(images), pipeline.info
    conditional = info.conditioning != "none"
    measurement = Measurement(
        n_distance=params.n_distance,
        n_accuracy=params.n_accuracy,
        seed=params.seed,
        seed_blocks=params.seed_blocks,
        reference=Reference.of(index),
        judge=judge.info.hashes,
        extractor=judge.kind,
        feature_dim=judge.info.feature_dim,
        image=judge.info.image,
        labels=info.classes if conditional else None,
        prompts=info.prompts or judge.info.prompts,
    )
    return Protocol(
        measurement=measurement,
        headline=params.headline,
        space="pixels" if info.latent is None else "latents",
        conditioning=info.conditioning,
        clip_is_condition=_share_text_weights(pipeline, judge),
        unguided=replace(params.sampling, guidance_scale=UNGUIDED, guidance=DEFAULT_SAMPLING.guidance),
        guided=params.sampling if conditional or params.guidance_scale != UNGUIDED else None,
        batch_size=params.batch_size,
        precision=params.precision,
        compile=params.compile,
    )


def _share_text_weights(pipeline: Pipeline, judge: Judge) -> bool:
    """Return whether the published CLIP that scores also conditions the model, which biases the score upwards."""
    if pipeline.text is None or judge.pretrained_clip is None:
        return False
    scoring = judge.pretrained_clip.token_embeddings().float().cpu()
    conditioning = [tower.model.get_input_embeddings().weight.float().cpu() for tower in pipeline.text.towers]
    return any(weights.shape == scoring.shape and bool((weights == scoring).all()) for weights in conditioning)


def require_pipeline(pipeline: Pipeline, measurement: Measurement) -> None:
    """Check that the pipeline draws images of the protocol's classes and shape.

    Raises:
        NotComparableError: if it does not.
    """
    info, image = pipeline.info, measurement.image
    labels = info.classes if info.conditioning != "none" else None
    if labels != measurement.labels:
        raise NotComparableError("the model and the protocol have different classes; evaluate it by its own protocol")
    if {"size": info.size, "channels": info.channels} != image:
        raise NotComparableError(
            f"the model draws {info.channels} x {info.size} x {info.size} images and the protocol measures "
            f"{image['channels']} x {image['size']} x {image['size']}; evaluate it by its own protocol"
        )


def require_judge(images: Path, judge: Judge, measurement: Measurement) -> None:
    """Check that judge and data set are those of the protocol.

    Raises:
        NotComparableError: if one of them is not.
    """
    if judge.info.hashes != measurement.judge:
        raise NotComparableError("the judge is not the one of the protocol; run 'dvc repro judge evaluate'")
    if Reference.of(read_index(images)) != measurement.reference:
        raise NotComparableError("the images are not those of the protocol; run 'dvc repro evaluate'")
