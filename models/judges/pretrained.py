"""Published networks that measure: features of Inception, CLIP and DINOv2, and CLIP scores of captions.

Each lies in a folder of its own as safetensors: `inception.safetensors`, or what transformers saves (`config.json`,
`model.safetensors`, `preprocessor_config.json`, and for text the tokenizer's files). Nothing is downloaded here.
transformers is imported where it is used, because every judge loads this file and most do not need it.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from models.device import placed
from models.json_files import read_json
from models.judges import inception
from models.parallel import shared_out

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedModel, PreTrainedTokenizerBase

INCEPTION_FILE = "inception.safetensors"
BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Statistics of ImageNet, the default of image processors."""
Preprocess: TypeAlias = Callable[[np.ndarray, str], Tensor]
"""uint8 images [N, 1 or 3, S, S] and a device -> the network's input there, float32 [N, 3, side, side]."""


@dataclass(frozen=True)
class Extractor:
    """A feature extractor: images, uint8 [N, 1 or 3, S, S] -> features, float32 [N, dimensions]."""

    name: str
    """ "inception", "clip" or "dinov2"."""
    dimensions: int
    features: Callable[[np.ndarray], np.ndarray]
    class_logits: Callable[[np.ndarray], np.ndarray] | None = None
    """Inception only: features float32 [N, 2048] -> logits float32 [N, 1008], for the Inception score."""


@dataclass(frozen=True)
class PretrainedClip:
    """A published CLIP; embeddings are unit vectors."""

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    preprocess: Preprocess
    device: str = "cpu"

    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """Embed uint8 images [N, 1 or 3, S, S] as float32 [N, E]."""
        return _normalized(_image_embeddings(self.model, _clip_features, self.preprocess, pixels, self.device))

    def embed_texts(self, captions: Sequence[str]) -> np.ndarray:
        """Embed captions as float32 [N, E]; they are truncated to the model's context length."""
        parts = [list(captions[start : start + BATCH]) for start in range(0, len(captions), BATCH)]
        limit = self.model.config.text_config.max_position_embeddings
        tokens = [
            self.tokenizer(part, padding=True, truncation=True, max_length=limit, return_tensors="pt") for part in parts
        ]
        device = self.model.device
        return _normalized([_embedding(self.model.get_text_features(**each.to(device))) for each in tokens])

    def token_embeddings(self) -> Tensor:
        """Return the token embeddings of the text tower, float [vocabulary, width].

        A text encoder with the same weights has the same ones.
        """
        return self.model.text_model.get_input_embeddings().weight


def load_extractor(name: str, folder: Path, device: str = "cpu") -> Extractor:
    """Load the extractor `name` ("inception", "clip" or "dinov2") from its folder.

    Raises:
        ValueError: if the folder holds another network, in one sentence.
    """
    if name == "inception":
        return _inception(folder, device)
    model = _from_pretrained(folder, {"clip": "CLIPModel", "dinov2": "Dinov2Model"}[name], device)
    preprocess = _preprocessing(folder, model)
    # DINOv2's pooled output is its class token after layer normalisation.
    extract = _clip_features if name == "clip" else _pooled

    def features(pixels: np.ndarray) -> np.ndarray:
        return torch.cat(_image_embeddings(model, extract, preprocess, pixels, device)).numpy()

    dimensions = model.config.projection_dim if name == "clip" else model.config.hidden_size
    return Extractor(name, dimensions, features)


def load_clip(folder: Path, device: str = "cpu") -> PretrainedClip:
    """Load a CLIP with its tokenizer.

    Raises:
        ValueError: if the folder holds another network or no tokenizer, in one sentence.
    """
    from transformers import AutoTokenizer

    model = _from_pretrained(folder, "CLIPModel", device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer ({_first_line(error)})") from None
    return PretrainedClip(model, tokenizer, _preprocessing(folder, model), device)


def read_inception(file: Path) -> dict[str, Tensor]:
    """Read the weights of Inception from the published PyTorch file, or from safetensors.

    The PyTorch file is a pickle; `weights_only` reads it without running code.

    Raises:
        ValueError: if the file holds something else, in one sentence.
    """
    try:
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            expected = inception.Inception().state_dict()
        wanted = {key: tensor.shape for key, tensor in expected.items() if not key.endswith("num_batches_tracked")}
        found = {key: weights[key].shape for key in wanted if key in weights}
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file.name} holds no weights that can be read ({_first_line(error)})") from None
    if found != wanted:
        different = sorted(key for key, shape in wanted.items() if found.get(key) != shape)
        raise ValueError(f"{file.name} is not the Inception of the published FID: {different[0]} is not as expected")
    return {key: weights[key].contiguous() for key in wanted}


def _inception(folder: Path, device: str) -> Extractor:
    network = inception.Inception()
    # Not strict: the file lacks the batch counters of batch normalisation, which inference does not use.
    network.load_state_dict(read_inception(folder / INCEPTION_FILE), strict=False)
    network.eval().requires_grad_(False).to(device)
    head = network.fc.weight.cpu().numpy().T
    return Extractor(
        "inception",
        inception.FEATURES,
        lambda pixels: np.concatenate(
            shared_out(
                lambda name: functools.partial(inception.extract, placed(network, name), device=name),
                _batches(pixels, inception.BATCH),
                device,
            )
        ),
        lambda features: features @ head,  # the published Inception score leaves out the bias
    )


def _from_pretrained(folder: Path, kind: str, device: str) -> Any:  # an instance of the transformers class `kind`
    import transformers

    try:
        named = read_json(folder / "config.json").get("architectures", [kind])
        if kind not in named:
            raise ValueError(f"{folder} holds {', '.join(named)} and not {kind}")
        model = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no {kind} in safetensors ({_first_line(error)})") from None
    return model.eval().requires_grad_(False).to(device)


def _preprocessing(folder: Path, model: PreTrainedModel) -> Preprocess:
    """Build the preprocessing that the folder's `preprocessor_config.json` describes.

    Images are resized to its side, bicubically with antialiasing, and normalised. There is no crop, because our images
    are square.
    """
    file = folder / "preprocessor_config.json"
    config = read_json(file) if file.exists() else {}
    vision = getattr(model.config, "vision_config", model.config)
    side = _side(config.get("crop_size") or config.get("size")) or vision.image_size
    mean, std = (torch.tensor(config.get(key, default)) for key, default in (("image_mean", MEAN), ("image_std", STD)))

    def preprocess(pixels: np.ndarray, device: str) -> Tensor:
        images = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).float().expand(-1, 3, -1, -1)
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 255)
        return (images / 255 - mean.to(device)[:, None, None]) / std.to(device)[:, None, None]

    return preprocess


def _side(size: Any) -> int | None:  # JSON: an integer or one of several mappings
    """Return the side in pixels that an image processor's `size` stands for."""
    if isinstance(size, dict):
        size = next((size[key] for key in ("height", "shortest_edge") if key in size), None)
    return int(size) if size else None


def _clip_features(model: Any, images: Tensor) -> Tensor:  # `CLIPModel`, whose call has no annotated result
    return _embedding(model.get_image_features(pixel_values=images))


def _pooled(model: Any, images: Tensor) -> Tensor:
    return _embedding(model(pixel_values=images))


def _image_embeddings(
    model: PreTrainedModel,
    extract: Callable[[Any, Tensor], Tensor],
    preprocess: Preprocess,
    pixels: np.ndarray,
    device: str,
) -> list[Tensor]:
    """Return `extract` of batches of uint8 images [N, 1 or 3, S, S], float32 [n, D] each, on the CPU."""

    def worker(name: str) -> Callable[[np.ndarray], Tensor]:
        network = placed(model, name)

        @torch.inference_mode()
        def embedded(batch: np.ndarray) -> Tensor:
            return extract(network, preprocess(batch, name)).float().cpu()

        return embedded

    return shared_out(worker, _batches(pixels), device)


def _embedding(output: Any) -> Tensor:  # transformers 5 returns an output object, earlier versions a tensor
    return getattr(output, "pooler_output", output)


def _batches(pixels: np.ndarray, size: int = BATCH) -> list[np.ndarray]:
    return [pixels[start : start + size] for start in range(0, len(pixels), size)]


def _normalized(parts: list[Tensor]) -> np.ndarray:
    """Concatenate embeddings and scale each to unit length: float32 [N, E]."""
    embeds = torch.cat([part.float().cpu() for part in parts])
    return (embeds / embeds.norm(dim=1, keepdim=True)).numpy()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
