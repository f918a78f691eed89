"""The text encoders that condition a model: captions to token embeddings, with one encoder or with SDXL's two.

They are transformers' `CLIPTextModel` and `CLIPTokenizer`, as in Stable Diffusion, trained on the data set's own
captions or published. They belong to the model; the CLIP that scores samples (`models/judges/judge.py`) is another one
with its own seed and shares no weights with them. transformers is imported where it is used, because models of pixels
load this file and not it.

Stable Diffusion XL has two encoders and further conditioning (Podell et al. 2023, section 2). All of it is packed into
one tensor, so that sampling, condition dropout and storage are the same for every model: after the L token embeddings
comes one more row with the pooled embedding of the second encoder (P values), the `SIZES` values of size and crop, then
zeros.

Legend: U captions, L tokens of each (padded), D width of a token embedding (of both encoders together).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.device import placed
from models.json_files import read_json, write_json

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

APPLY_BATCH = 64
SIZES = 6
"""Original height and width, top and left of the crop, target height and width, in pixels."""
SUFFIXES = ("", "_2")
"""Suffix of each encoder's folders in diffusers' layout."""


@dataclass(frozen=True)
class TextEncoder:
    """A `CLIPTextModel` in evaluation mode and its tokenizer."""

    model: CLIPTextModel
    tokenizer: CLIPTokenizer

    pooled: ClassVar[None] = None
    """A single encoder gives no pooled embedding."""

    def on(self, device: str) -> Self:
        """Return the encoder with a copy of its network on another device."""
        return replace(self, model=placed(self.model, device))

    @property
    def towers(self) -> tuple[TextEncoder, ...]:
        """The encoders, one after the other."""
        return (self,)

    @property
    def length(self) -> int:
        """L: number of tokens that every caption is padded or truncated to."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    @property
    def width(self) -> int:
        """D: width of a token embedding."""
        return int(self.model.config.hidden_size)

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Tokenise captions to int64 [U, L]."""
        padded = self.tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="np"
        )
        return torch.from_numpy(np.asarray(padded["input_ids"], np.int64))

    def encode(self, captions: Sequence[str], precision: str = "no") -> Tensor:
        """Encode captions to float32 [U, L, D] as in a Stable Diffusion pipeline; "" is the null condition.

        Batches are padded to a constant size, so that an embedding does not depend on the other captions. In the
        `precision` "bf16" matrix products are computed in bfloat16; "no" is float32.
        """
        parts = []
        for start in range(0, len(captions), APPLY_BATCH):
            batch = list(captions[start : start + APPLY_BATCH])
            ids = self.token_ids(batch + [""] * (APPLY_BATCH - len(batch)))
            parts.append(self.encode_ids(ids, precision)[: len(batch)].cpu())
        return torch.cat(parts)

    def encode_ids(self, ids: Tensor, precision: str = "no") -> Tensor:
        """Encode token ids int64 [B, L] to float32 [B, L, D] on the encoder's device, as `encode` does in one batch."""
        with torch.inference_mode(), _lower(self.model.device, precision):
            return self.model(ids.to(self.model.device)).last_hidden_state.float()


@dataclass(frozen=True)
class ProjectedEncoder(TextEncoder):
    """The second encoder of SDXL: a `CLIPTextModelWithProjection`, whose projection is the pooled embedding."""

    model: CLIPTextModelWithProjection


@dataclass(frozen=True)
class PairedEncoder:
    """The two encoders of Stable Diffusion XL, which encode the same captions."""

    first: TextEncoder
    second: ProjectedEncoder

    def on(self, device: str) -> PairedEncoder:
        """Return the encoders with copies of their networks on another device."""
        return PairedEncoder(self.first.on(device), self.second.on(device))

    @property
    def towers(self) -> tuple[TextEncoder, ...]:
        """The encoders, one after the other."""
        return self.first, self.second

    @property
    def length(self) -> int:
        """L: number of tokens that every caption is padded or truncated to."""
        return min(self.first.length, self.second.length)

    @property
    def width(self) -> int:
        """D: the embeddings of both encoders are concatenated."""
        return self.first.width + self.second.width

    @property
    def pooled(self) -> int:
        """P: width of the pooled embedding."""
        return int(self.second.model.config.projection_dim)

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Tokenise captions to int64 [U, 2, L], by both tokenizers."""
        return torch.stack([tower.token_ids(captions)[:, : self.length] for tower in self.towers], dim=1)

    def encode(self, captions: Sequence[str], precision: str = "no") -> Tensor:
        """Encode captions to float32 [U, L + 1, D] as in a Stable Diffusion XL pipeline; the sizes are left 0.

        The token embeddings are the penultimate hidden states of both encoders. "" gives zeros, the null condition.
        `precision` is as for one encoder.
        """
        parts = []
        for start in range(0, len(captions), APPLY_BATCH):
            batch = list(captions[start : start + APPLY_BATCH])
            ids = self.token_ids(batch + [""] * (APPLY_BATCH - len(batch)))  # see TextEncoder.encode
            packed = self._packed(ids.to(self.first.model.device), precision)
            empty = torch.tensor([not caption for caption in batch], device=packed.device)
            parts.append(packed[: len(batch)].masked_fill(empty[:, None, None], 0).cpu())
        return torch.cat(parts)

    def encode_ids(self, ids: Tensor, precision: str = "no") -> Tensor:
        """Encode token ids int64 [B, 2, L] to float32 [B, L + 1, D]; captions without a token count as ""."""
        ids = ids.to(self._empty.device)
        empty = (ids == self._empty).all(2).all(1)
        return self._packed(ids, precision).masked_fill(empty[:, None, None], 0)

    @functools.cached_property
    def _empty(self) -> Tensor:
        """The token ids of "", int64 [1, 2, L], on the encoders' device, so that no batch waits for their copy."""
        return self.token_ids([""]).to(self.first.model.device)

    def _packed(self, ids: Tensor, precision: str) -> Tensor:
        with torch.inference_mode(), _lower(ids.device, precision):
            return pack(self.first.model, self.second.model, ids[:, 0], ids[:, 1]).float()


def _lower(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


AnyEncoder: TypeAlias = TextEncoder | PairedEncoder


def pack(first: CLIPTextModel, second: CLIPTextModelWithProjection, ids: Tensor, second_ids: Tensor) -> Tensor:
    """Encode token ids of both tokenizers, int64 [U, L] each, to the packed condition [U, L + 1, D] without sizes."""
    one = first(input_ids=ids, output_hidden_states=True)
    two = second(input_ids=second_ids, output_hidden_states=True)
    tokens = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    last = F.pad(two.text_embeds, (0, tokens.shape[-1] - two.text_embeds.shape[-1]))
    return torch.cat([tokens, last[:, None]], dim=1)


def with_sizes(condition: Tensor, pooled: int, sizes: Tensor) -> Tensor:
    """Return a packed condition [B, L + 1, D] with the sizes [B, SIZES], or [SIZES] for all, set."""
    complete = condition.clone()
    complete[:, -1, pooled : pooled + SIZES] = sizes.to(complete)
    return complete


def save_text_encoder(folder: Path, encoder: AnyEncoder) -> None:
    """Write `text_encoder/` and `tokenizer/` in transformers' layout into an existing folder.

    Those of a second encoder are `text_encoder_2/` and `tokenizer_2/`.
    """
    for tower, suffix in zip(encoder.towers, SUFFIXES, strict=False):
        tower.model.save_pretrained(folder / f"text_encoder{suffix}")
        tower.tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        for name in (f"text_encoder{suffix}/config.json", f"tokenizer{suffix}/tokenizer_config.json"):
            config = read_json(folder / name)
            for key in ("_name_or_path", "name_or_path", "local_files_only", "is_local"):
                config.pop(key, None)  # the path it was loaded from differs between machines
            write_json(folder / name, config)


def load_text_encoder(folder: Path, device: str = "cpu", paired: bool | None = None) -> AnyEncoder:
    """Load `text_encoder/` and `tokenizer/` in float32, from safetensors, in evaluation mode.

    `paired` says whether to load a second encoder; None loads it if its folder exists.

    Raises:
        FileNotFoundError: if a folder is missing.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def part(name: str) -> Path:
        if not (folder / name).is_dir():
            raise FileNotFoundError(folder / name)
        return folder / name

    def model(kind: Any, name: str) -> Any:  # a class of transformers, and its instance
        network = kind.from_pretrained(part(name), use_safetensors=True, dtype=torch.float32)
        return network.eval().requires_grad_(False).to(device)

    first = TextEncoder(model(CLIPTextModel, "text_encoder"), CLIPTokenizer.from_pretrained(part("tokenizer")))
    second = SUFFIXES[1]
    if not ((folder / f"text_encoder{second}").is_dir() if paired is None else paired):
        return first
    tower = model(CLIPTextModelWithProjection, f"text_encoder{second}")
    return PairedEncoder(first, ProjectedEncoder(tower, CLIPTokenizer.from_pretrained(part(f"tokenizer{second}"))))
