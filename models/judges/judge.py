"""What measures, on disk and in memory: a feature extractor, a classifier where there are labels, a CLIP where
there are captions.

    outputs/judge/judge.json                  what is there, and how good it is on held-out images
    outputs/judge/{classifier,clip,self_supervised}.safetensors
    outputs/judge/tokenizer.json              of the CLIP
    outputs/judge/{extractor,pretrained_clip}/  published networks in their place, where those were asked for
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from models.judges.classifier import Backbone, Classifier
    from models.judges.clip import Clip
    from models.judges.pretrained import Extractor, PretrainedClip
    from models.judges.selfsupervised import Encoder

FORMAT = 1
EXTRACTOR, PRETRAINED_CLIP = "extractor", "pretrained_clip"
"""Folders of published networks."""


@dataclass(frozen=True)
class Judge:
    """Networks in evaluation mode; `info` is `judge.json`. Images are uint8 [N, C, S, S] of `info["image"]`."""

    info: dict[str, Any]
    classifier: Classifier | None = None
    clip: Clip | None = None
    tokenizer: Tokenizer | None = None
    encoder: Encoder | None = None
    device: str = "cpu"
    extractor: Extractor | None = None
    """Published, in the place of the networks trained here."""
    pretrained_clip: PretrainedClip | None = None
    """Published, in the place of `clip`."""

    @property
    def classes(self) -> list[str]:
        return self.info["classes"]

    @property
    def prompts(self) -> list[str] | None:
        """One caption per class, where the captions follow from the class."""
        return self.info["prompts"]

    @property
    def kind(self) -> str:
        """What extracts the features: "classifier", "clip" or "self_supervised", which are trained here, or
        "pretrained inception", "pretrained clip" or "pretrained dinov2"."""
        if self.extractor is not None:
            return f"pretrained {self.extractor.name}"
        return "classifier" if self.classifier else "clip" if self.clip else "self_supervised"

    @property
    def dimensions(self) -> int:
        """D of the features."""
        return self.extractor.dimensions if self.extractor is not None else self.backbone.features

    @property
    def reads_captions(self) -> bool:
        """Whether there is a CLIP of either kind."""
        return self.clip is not None or self.pretrained_clip is not None

    @property
    def backbone(self) -> Backbone:
        """The extractor: of the classifier, without one the CLIP's image tower, else the self-supervised encoder's."""
        if self.classifier is not None:
            return self.classifier.backbone
        if self.clip is not None:
            return self.clip.image
        if self.encoder is not None:
            return self.encoder.backbone
        raise ValueError("this judge has no network to extract features with")

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 images -> float32 [N, D], what the distances compare."""
        if self.extractor is not None:
            return self.extractor.features(pixels)
        return self._apply(self.backbone, pixels)

    def class_logits(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 images -> float32 [N, classes]. Raises ValueError where no classifier was trained."""
        if self.classifier is None:
            raise ValueError("this judge has no classifier: its data had no labels")
        return self._apply(self.classifier, pixels)

    def clip_image_embeds(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 images -> float32 [N, E] of length 1. Raises ValueError where there is no CLIP."""
        if self.pretrained_clip is not None:
            return self.pretrained_clip.embed_images(pixels)
        return self._apply(self._clip().embed_images, pixels)

    def clip_text_embeds(self, captions: Sequence[str]) -> np.ndarray:
        """Captions -> float32 [N, E] of length 1. Raises ValueError where there is no CLIP."""
        if self.pretrained_clip is not None:
            return self.pretrained_clip.embed_texts(captions)
        import torch

        from models.judges.clip import tokenize

        clip = self._clip()
        assert self.tokenizer is not None, "a CLIP comes with its tokenizer"
        with torch.inference_mode():
            ids = torch.from_numpy(tokenize(self.tokenizer, captions)).to(self.device)
            return clip.embed_text(ids).float().cpu().numpy()

    def _clip(self) -> Clip:
        if self.clip is None:
            raise ValueError("this judge has no CLIP: its data had no captions")
        return self.clip

    def _apply(self, function: Any, pixels: np.ndarray) -> np.ndarray:
        from models.judges.classifier import apply

        return apply(function, pixels, self.device)


def best_device() -> str:
    """Where the judge computes: on the GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def save_judge(folder: Path, judge: Judge) -> None:
    """Write into an existing `folder` that holds nothing but the folders of published networks; the caller makes it
    appear atomically.

    Adds to `judge.json` what extracts the features, their dimension, and the sha256 of each network's files,
    by which a measurement names its judge.
    """
    from safetensors.torch import save_file

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
            hashes[name] = _content(folder / name)
    info = {
        **judge.info,
        "format": FORMAT,
        "features": judge.kind,
        "feature_dim": judge.dimensions,
        "extractor": judge.extractor.name if judge.extractor else None,
        "hashes": hashes,
    }
    (folder / "judge.json").write_text(json.dumps(info, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _content(folder: Path) -> str:
    """sha256 over the names and contents of a folder's files."""
    content = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        content.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return content.hexdigest()


def load_judge(folder: Path, device: str = "cpu") -> Judge:
    """Read what `save_judge` wrote. Raises FileNotFoundError when it is not one, ValueError for another format."""
    from tokenizers import Tokenizer

    from models.judges.classifier import Classifier
    from models.judges.clip import Clip
    from models.judges.selfsupervised import Encoder

    info = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
    if info["format"] != FORMAT:
        raise ValueError(f"{folder} has format {info['format']}, this version reads {FORMAT}; train the judge again")
    channels, size, names = info["image"]["channels"], info["image"]["size"], info["hashes"]
    classifier = clip = tokenizer = encoder = None
    if "classifier" in names:
        classifier = _load(Classifier(channels, size, len(info["classes"])), folder / "classifier.safetensors", device)
    if "clip" in names:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        clip = _load(Clip(channels, size, tokenizer.get_vocab_size()), folder / "clip.safetensors", device)
    if "self_supervised" in names:
        encoder = _load(Encoder(channels, size), folder / "self_supervised.safetensors", device)
    return Judge(info, classifier, clip, tokenizer, encoder, device, *load_published(folder, info["extractor"], device))


def load_published(folder: Path, extractor: str | None, device: str) -> tuple[Extractor | None, PretrainedClip | None]:
    """The published networks of a judge's folder. Raises ValueError in one sentence where one is another network."""
    from models.judges.pretrained import load_clip, load_extractor

    return (
        load_extractor(extractor, folder / EXTRACTOR, device) if extractor else None,
        load_clip(folder / PRETRAINED_CLIP, device) if (folder / PRETRAINED_CLIP).is_dir() else None,
    )


def _load(network: Any, file: Path, device: str) -> Any:
    from safetensors.torch import load_file

    network.load_state_dict(load_file(file))
    return network.eval().requires_grad_(False).to(device)
