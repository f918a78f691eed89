"""Published networks that measure: features of Inception, CLIP and DINOv2, and a CLIP that scores captions.

A folder holds each as safetensors: `inception.safetensors`, or what transformers saves (`config.json`,
`model.safetensors`, `preprocessor_config.json`, and for text the tokenizer's files). Nothing is fetched here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

INCEPTION_FILE, WEIGHTS_FILE = "inception.safetensors", "model.safetensors"
BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet: what an image processor that names none means."""


@dataclass(frozen=True)
class Extractor:
    """Images, uint8 [N, 1 or 3, S, S] -> features, float32 [N, dimensions]."""

    name: str
    """ "inception", "clip" or "dinov2"."""
    dimensions: int
    features: Callable[[np.ndarray], np.ndarray]
    class_logits: Callable[[np.ndarray], np.ndarray] | None = None
    """Features float32 [N, 2048] -> logits float32 [N, 1008], over which the published Inception score is taken."""


@dataclass(frozen=True)
class PretrainedClip:
    """A published CLIP: what it says of an image and of a text, float32 [N, E] of length 1."""

    model: Any
    tokenizer: Any
    to_input: Callable[[np.ndarray], Tensor]

    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 images [N, 1 or 3, S, S] -> float32 [N, E]."""
        parts = [self.to_input(batch) for batch in _batches(pixels)]
        return _lengthless([self._of(self.model.get_image_features(pixel_values=part)) for part in parts])

    def embed_texts(self, captions: Sequence[str]) -> np.ndarray:
        """Captions -> float32 [N, E]; what is longer than the model reads is cut."""
        parts = [list(captions[start : start + BATCH]) for start in range(0, len(captions), BATCH)]
        limit = self.model.config.text_config.max_position_embeddings
        tokens = [
            self.tokenizer(part, padding=True, truncation=True, max_length=limit, return_tensors="pt") for part in parts
        ]
        device = self.model.device
        return _lengthless([self._of(self.model.get_text_features(**each.to(device))) for each in tokens])

    def token_embeddings(self) -> Tensor:
        """The table of the text tower, float [vocabulary, width]: what a text encoder of the same weights shares."""
        return self.model.text_model.get_input_embeddings().weight

    @staticmethod
    def _of(output: Any) -> Tensor:
        return output.pooler_output if hasattr(output, "pooler_output") else output


def load_extractor(name: str, folder: Path, device: str = "cpu") -> Extractor:
    """The network `name` from a folder of the form above. Raises `ValueError` in one sentence where it is another."""
    if name == "inception":
        return _inception(folder, device)
    model = _from_pretrained(folder, {"clip": "CLIPModel", "dinov2": "Dinov2Model"}[name], device)
    to_input = _preprocessing(folder, model, device)

    def features(pixels: np.ndarray) -> np.ndarray:
        import torch

        found = []
        with torch.inference_mode():
            for batch in _batches(pixels):
                if name == "clip":
                    seen = PretrainedClip._of(model.get_image_features(pixel_values=to_input(batch)))
                else:
                    seen = model(pixel_values=to_input(batch)).pooler_output  # the class token, normalised
                found.append(seen.float().cpu().numpy())
        return np.concatenate(found)

    dimensions = model.config.projection_dim if name == "clip" else model.config.hidden_size
    return Extractor(name, dimensions, features)


def load_clip(folder: Path, device: str = "cpu") -> PretrainedClip:
    """A CLIP with its tokenizer. Raises `ValueError` in one sentence where the folder holds another network."""
    from transformers import AutoTokenizer

    model = _from_pretrained(folder, "CLIPModel", device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer ({_first_line(error)})") from None
    return PretrainedClip(model, tokenizer, _preprocessing(folder, model, device))


def read_inception(file: Path) -> dict[str, Tensor]:
    """The weights of Inception from the published PyTorch file, or from one in safetensors.

    The former is a pickle; it is read by torch's reader of plain tensors, which runs no code. Raises `ValueError`
    in one sentence where the file holds something else.
    """
    import pickle

    import torch
    from safetensors.torch import load_file

    from models.judges.inception import Inception

    try:
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            expected = Inception().state_dict()
        wanted = {key: tensor.shape for key, tensor in expected.items() if not key.endswith("num_batches_tracked")}
        found = {key: weights[key].shape for key in wanted if key in weights}
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file.name} holds no weights that can be read ({_first_line(error)})") from None
    if found != wanted:
        different = sorted(key for key, shape in wanted.items() if found.get(key) != shape)
        raise ValueError(f"{file.name} is not the Inception of the published FID: {different[0]} is not as expected")
    return {key: weights[key].contiguous() for key in wanted}


def _inception(folder: Path, device: str) -> Extractor:
    from models.judges import inception

    network = inception.Inception()
    network.load_state_dict(read_inception(folder / INCEPTION_FILE), strict=False)  # without the batches' counts
    network.eval().requires_grad_(False).to(device)
    head = network.fc.weight.cpu().numpy().T
    return Extractor(
        "inception",
        inception.FEATURES,
        lambda pixels: inception.extract(network, pixels, device),
        lambda features: features @ head,  # without the bias, as published
    )


def _from_pretrained(folder: Path, kind: str, device: str) -> Any:
    import transformers

    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures", [kind])
        if kind not in named:
            raise ValueError(f"{folder} holds {', '.join(named)} and not {kind}")
        model = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no {kind} in safetensors ({_first_line(error)})") from None
    return model.eval().requires_grad_(False).to(device)


def _preprocessing(folder: Path, model: Any, device: str) -> Callable[[np.ndarray], Tensor]:
    """uint8 [N, 1 or 3, S, S] -> what the network reads, by the folder's `preprocessor_config.json`: resized
    bicubically with antialiasing to the side it names (our images are square already), normalised."""
    import torch
    from torch.nn import functional as F

    file = folder / "preprocessor_config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    vision = getattr(model.config, "vision_config", model.config)
    side = _side(told.get("crop_size") or told.get("size")) or vision.image_size
    mean, std = (torch.tensor(told.get(key, default)) for key, default in (("image_mean", MEAN), ("image_std", STD)))

    def to_input(pixels: np.ndarray) -> Tensor:
        images = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).float().expand(-1, 3, -1, -1)
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 255)
        return (images / 255 - mean.to(device)[:, None, None]) / std.to(device)[:, None, None]

    return to_input


def _side(told: Any) -> int | None:
    """The side that an image processor's size means: a number, or one of several forms of a mapping."""
    if isinstance(told, dict):
        told = next((told[key] for key in ("height", "shortest_edge") if key in told), None)
    return int(told) if told else None


def _batches(pixels: np.ndarray) -> list[np.ndarray]:
    return [pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)]


def _lengthless(parts: list[Tensor]) -> np.ndarray:
    """Parts of embeddings -> one array float32 [N, E], each of length 1."""
    import torch

    embeds = torch.cat([part.float().cpu() for part in parts])
    return (embeds / embeds.norm(dim=1, keepdim=True)).numpy()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
