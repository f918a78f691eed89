"""The judge on disk and in memory: feature extractor, classifier (with labels) and CLIP (with captions).

outputs/judge/judge.json                    `JudgeInfo`: what there is, and its accuracy on held-out images
outputs/judge/{classifier,clip,self_supervised}.safetensors
outputs/judge/tokenizer.json                tokenizer of the CLIP
outputs/judge/{extractor,pretrained_clip}/  published networks that replace them, if any
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.device import placed
from models.hashing import files_sha256, folder_sha256
from models.json_files import Description, JsonObject
from models.judges.classifier import Classifier, apply
from models.judges.clip import Clip, tokenize
from models.judges.pretrained import load_clip, load_extractor
from models.judges.selfsupervised import Encoder

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from models.judges.classifier import Backbone
    from models.judges.pretrained import Extractor, PretrainedClip

EXTRACTOR, PRETRAINED_CLIP = "extractor", "pretrained_clip"
"""Folders of published networks."""
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class JudgeInfo(Description):
    """`judge.json`."""

    FORMAT = 1
    REMEDY = "train the judge again"

    classes: list[str]
    """Names of the labels; empty for data without labels."""
    prompts: list[str] | None
    """The caption of each class, if captions follow from the class."""
    image: dict[str, int]
    """`channels` and `size` (height and width in pixels) of the images."""
    train_images: int
    """Number of images of the training split, among which each training draws."""
    held_out_images: int = 0
    """Number of images that its accuracies were measured on."""
    features: str = ""
    """See `Judge.kind`; set by `save_judge`, as are the next three."""
    feature_dim: int = 0
    """D: number of features."""
    extractor: str | None = None
    """Name of the published feature extractor, if any."""
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each network's files, by which a measurement names its judge."""
    files: dict[str, str] = field(default_factory=dict)
    """Relative path -> SHA-256 of every other file of the folder; set by `save_judge`."""
    classifier_accuracy: float | None = None
    """Accuracies on held-out images; None for a network that the judge does not have."""
    clip_accuracy: float | None = None
    """Share of held-out images whose own caption is the nearest of `clip_choices`."""
    clip_choices: int | None = None
    """Captions among which `clip_accuracy` chooses."""
    self_supervised_accuracy: float | None = None

    def to_json(self) -> JsonObject:
        """Return the content of the file, without the accuracies that were not measured."""
        measured = {"classifier_accuracy", "clip_accuracy", "clip_choices", "self_supervised_accuracy"}
        return {key: value for key, value in super().to_json().items() if value is not None or key not in measured}


@dataclass(frozen=True)
class Judge:
    """Networks in evaluation mode. Images are uint8 [N, C, S, S] of the shape `info.image`."""

    info: JudgeInfo
    classifier: Classifier | None = None
    clip: Clip | None = None
    tokenizer: Tokenizer | None = None
    encoder: Encoder | None = None
    device: str = "cpu"
    """Name of the torch device that holds all networks; "cuda" measures with every GPU of the machine."""
    extractor: Extractor | None = None
    """Published; replaces the networks trained here as feature extractor."""
    pretrained_clip: PretrainedClip | None = None
    """Published; replaces `clip`."""

    @property
    def kind(self) -> str:
        """The feature extractor.

        "classifier", "clip" or "self_supervised" were trained here; "pretrained inception", "pretrained clip" and
        "pretrained dinov2" are published.
        """
        if self.extractor is not None:
            return f"pretrained {self.extractor.name}"
        return "classifier" if self.classifier else "clip" if self.clip else "self_supervised"

    @property
    def dimensions(self) -> int:
        """D of the features."""
        return self.extractor.dimensions if self.extractor is not None else self.backbone.features

    @property
    def reads_captions(self) -> bool:
        """Whether there is a CLIP, trained here or published."""
        return self.clip is not None or self.pretrained_clip is not None

    @property
    def backbone(self) -> Backbone:
        """The feature extractor trained here: of the classifier, else of the CLIP, else of the SimCLR encoder."""
        if self.classifier is not None:
            return self.classifier.backbone
        if self.clip is not None:
            return self.clip.image
        if self.encoder is not None:
            return self.encoder.backbone
        raise ValueError("this judge has no network to extract features with")

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Extract features for the distances, float32 [N, D]."""
        if self.extractor is not None:
            return self.extractor.features(pixels)
        return self._apply(self.backbone, pixels)

    def class_logits(self, pixels: np.ndarray) -> np.ndarray:
        """Classify images: logits, float32 [N, classes].

        Raises:
            ValueError: without a classifier.
        """
        if self.classifier is None:
            raise ValueError("this judge has no classifier: its data had no labels")
        return self._apply(self.classifier, pixels)

    def class_logits_of(self, features: np.ndarray) -> np.ndarray:
        """Classify images by their `features`, [N, D], of a judge of the kind "classifier": logits [N, classes].

        Equals `class_logits` up to rounding, without computing the features again.
        """
        assert self.kind == "classifier", "these are features of another network"
        assert self.classifier is not None, "it is the classifier's"
        with torch.inference_mode():
            return self.classifier.head(torch.from_numpy(features).to(self.device)).float().cpu().numpy()

    def clip_image_embeds(self, pixels: np.ndarray) -> np.ndarray:
        """Embed images as unit vectors, float32 [N, E].

        Raises:
            ValueError: without a CLIP.
        """
        if self.pretrained_clip is not None:
            return self.pretrained_clip.embed_images(pixels)
        return apply(lambda name: placed(self._clip(), name).embed_images, pixels, self.device)

    def clip_text_embeds(self, captions: Sequence[str]) -> np.ndarray:
        """Embed captions as unit vectors, float32 [N, E].

        Raises:
            ValueError: without a CLIP.
        """
        if self.pretrained_clip is not None:
            return self.pretrained_clip.embed_texts(captions)
        clip = self._clip()
        assert self.tokenizer is not None, "a CLIP comes with its tokenizer"
        with torch.inference_mode():
            ids = torch.from_numpy(tokenize(self.tokenizer, captions)).to(self.device)
            return clip.embed_text(ids).float().cpu().numpy()

    def _clip(self) -> Clip:
        if self.clip is None:
            raise ValueError("this judge has no CLIP: its data had no captions")
        return self.clip

    def _apply(self, network: nn.Module, pixels: np.ndarray) -> np.ndarray:
        return apply(lambda name: placed(network, name), pixels, self.device)


def save_judge(folder: Path, judge: Judge) -> None:
    """Write the judge into an existing `folder`, which holds at most the folders of published networks.

    Sets the fields of `judge.json` that describe the feature extractor, the hash of each network, and the SHA-256 of
    each file. The caller makes the folder appear atomically.
    """
    networks = {"classifier": judge.classifier, "clip": judge.clip, "self_supervised": judge.encoder}
    hashes = {}
    if judge.tokenizer is not None:
        (folder / "tokenizer.json").write_text(judge.tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    for name, network in networks.items():
        if network is not None:
            file = folder / f"{name}.safetensors"
            save_file({key: value.cpu().contiguous() for key, value in network.state_dict().items()}, file)
            content = hashlib.sha256(file.read_bytes())
            if name == "clip":
                content.update((folder / "tokenizer.json").read_bytes())
            hashes[name] = content.hexdigest()
    for name in (EXTRACTOR, PRETRAINED_CLIP):
        if (folder / name).is_dir():
            hashes[name] = folder_sha256(folder / name)
    extractor = judge.extractor.name if judge.extractor else None
    info = replace(judge.info, features=judge.kind, feature_dim=judge.dimensions, extractor=extractor, hashes=hashes)
    replace(info, files=files_sha256(folder)).write(folder / "judge.json")


def load_judge(folder: Path, device: str = "cpu") -> Judge:
    """Load what `save_judge` wrote.

    Raises:
        FileNotFoundError: if there is no judge.
        ValueError: for another format, or a published network of another kind; in one sentence.
    """
    info = JudgeInfo.read(folder / "judge.json")
    channels, size = info.image["channels"], info.image["size"]
    classifier = clip = tokenizer = encoder = None
    if "classifier" in info.hashes:
        classifier = _load(Classifier(channels, size, len(info.classes)), folder / "classifier.safetensors", device)
    if "clip" in info.hashes:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        clip = _load(Clip(channels, size, tokenizer.get_vocab_size()), folder / "clip.safetensors", device)
    if "self_supervised" in info.hashes:
        encoder = _load(Encoder(channels, size), folder / "self_supervised.safetensors", device)
    return Judge(info, classifier, clip, tokenizer, encoder, device, *load_published(folder, info.extractor, device))


def load_published(folder: Path, extractor: str | None, device: str) -> tuple[Extractor | None, PretrainedClip | None]:
    """Load the published networks in a judge's folder.

    Raises:
        ValueError: if one is a network of another kind, in one sentence.
    """
    return (
        load_extractor(extractor, folder / EXTRACTOR, device) if extractor else None,
        load_clip(folder / PRETRAINED_CLIP, device) if (folder / PRETRAINED_CLIP).is_dir() else None,
    )


def _load(network: Module, file: Path, device: str) -> Module:
    network.load_state_dict(load_file(file))
    return network.eval().requires_grad_(False).to(device)
