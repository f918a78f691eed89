"""The text encoder that conditions a model: captions -> token sequences. Trained on the data set's own captions, or
published; in either case transformers' `CLIPTextModel` and `CLIPTokenizer`, as Stable Diffusion has them.

It belongs to the model. The CLIP that scores samples (`models/judges/judge.py`) is another one with a seed of its
own, so that what draws and what measures never share weights.

Stable Diffusion XL has two encoders and is told more than tokens (Podell et al. 2023, section 2). All of it is packed
into one tensor, so that what samples, drops or stores a condition need not know what it is made of: after the L token
embeddings comes one more row, which holds the pooled embedding of the second encoder (P numbers), then the `SIZES`
numbers of size and crop, then zeros.

Legend: U captions, L tokens of each (padded), D width of a token's embedding (of both encoders together).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

APPLY_BATCH = 64
SIZES = 6
"""Height and width of the picture as it was, top and left of the crop, height and width of what is drawn."""
SUFFIXES = ("", "_2")
"""What diffusers appends to the names of each encoder's folders."""


@dataclass(frozen=True)
class TextEncoder:
    """A `CLIPTextModel` in evaluation mode and its tokenizer."""

    model: CLIPTextModel
    tokenizer: CLIPTokenizer

    pooled = None
    """P, which belongs to two encoders."""

    @property
    def towers(self) -> tuple[TextEncoder, ...]:
        return (self,)

    @property
    def length(self) -> int:
        """L: the tokens that every caption is padded or cut to."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @property
    def width(self) -> int:
        """D"""
        return self.model.config.hidden_size

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions -> int64 [U, L]."""
        padded = self.tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="np"
        )
        return torch.from_numpy(np.asarray(padded["input_ids"], np.int64))

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> float32 [U, L, D], as a Stable Diffusion pipeline does it; the empty text stands for none.

        A batch is always filled up to the same size, so that a caption's embedding does not depend on its company.
        """
        parts = []
        for start in range(0, len(captions), APPLY_BATCH):
            some = list(captions[start : start + APPLY_BATCH])
            ids = self.token_ids(some + [""] * (APPLY_BATCH - len(some)))
            with torch.inference_mode():
                hidden = self.model(ids.to(self.model.device)).last_hidden_state
            parts.append(hidden[: len(some)].float().cpu())
        return torch.cat(parts)


@dataclass(frozen=True)
class ProjectedEncoder(TextEncoder):
    """The second of two: a `CLIPTextModelWithProjection`, whose projection gives the pooled embedding."""

    model: CLIPTextModelWithProjection  # type: ignore[assignment]


@dataclass(frozen=True)
class PairedEncoder:
    """The two encoders of Stable Diffusion XL, which read the same captions."""

    first: TextEncoder
    second: ProjectedEncoder

    @property
    def towers(self) -> tuple[TextEncoder, ...]:
        return self.first, self.second

    @property
    def length(self) -> int:
        """L: both pad to the same."""
        return min(self.first.length, self.second.length)

    @property
    def width(self) -> int:
        """D: the embeddings of a token stand beside each other."""
        return self.first.width + self.second.width

    @property
    def pooled(self) -> int:
        """P: the width of the pooled embedding."""
        return self.second.model.config.projection_dim

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> float32 [U, L + 1, D], the last row without its sizes, as a Stable Diffusion XL pipeline does it:
        both encoders' last but one layer, and zeros for the empty text, which stands for none.
        """
        parts = []
        for start in range(0, len(captions), APPLY_BATCH):
            some = list(captions[start : start + APPLY_BATCH])
            filled = some + [""] * (APPLY_BATCH - len(some))  # see TextEncoder.encode
            ids = [tower.token_ids(filled).to(tower.model.device) for tower in self.towers]
            with torch.inference_mode():
                packed = pack(self.first.model, self.second.model, *ids)
            blank = torch.tensor([not caption for caption in some], device=packed.device)
            parts.append(packed[: len(some)].float().masked_fill(blank[:, None, None], 0).cpu())
        return torch.cat(parts)


AnyEncoder: TypeAlias = TextEncoder | PairedEncoder


def pack(first: CLIPTextModel, second: CLIPTextModelWithProjection, ids: Tensor, second_ids: Tensor) -> Tensor:
    """Token ids of both tokenizers, int64 [U, L] each -> [U, L + 1, D] without sizes (see the head of this file)."""
    one = first(input_ids=ids, output_hidden_states=True)
    two = second(input_ids=second_ids, output_hidden_states=True)
    tokens = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    last = F.pad(two.text_embeds, (0, tokens.shape[-1] - two.text_embeds.shape[-1]))
    return torch.cat([tokens, last[:, None]], dim=1)


def with_sizes(condition: Tensor, pooled: int, sizes: Tensor) -> Tensor:
    """A packed condition [B, L + 1, D] with `sizes` [B, SIZES] (or [SIZES], for all) in their place."""
    told = condition.clone()
    told[:, -1, pooled : pooled + SIZES] = sizes.to(told)
    return told


def save_text_encoder(folder: Path, encoder: AnyEncoder) -> None:
    """Write `text_encoder/` and `tokenizer/` in transformers' layout into an existing folder, and those of a second
    encoder with a "_2" at their end."""
    for tower, suffix in zip(encoder.towers, SUFFIXES, strict=False):
        tower.model.save_pretrained(folder / f"text_encoder{suffix}")
        tower.tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        for name in (f"text_encoder{suffix}/config.json", f"tokenizer{suffix}/tokenizer_config.json"):
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            for key in ("_name_or_path", "name_or_path", "local_files_only", "is_local"):
                config.pop(key, None)  # where it was loaded from is this machine's business
            (folder / name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_text_encoder(folder: Path, device: str = "cpu", paired: bool | None = None) -> AnyEncoder:
    """Read `text_encoder/` and `tokenizer/`, weights from safetensors alone, in float32; and a second encoder beside
    them, where there is one, or as `paired` says.

    Raises `FileNotFoundError` where one is missing.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def part(name: str) -> Path:
        if not (folder / name).is_dir():
            raise FileNotFoundError(folder / name)
        return folder / name

    def model(kind: Any, name: str) -> Any:
        network = kind.from_pretrained(part(name), use_safetensors=True, dtype=torch.float32)
        return network.eval().requires_grad_(False).to(device)

    first = TextEncoder(model(CLIPTextModel, "text_encoder"), CLIPTokenizer.from_pretrained(part("tokenizer")))
    second = SUFFIXES[1]
    if not ((folder / f"text_encoder{second}").is_dir() if paired is None else paired):
        return first
    tower = model(CLIPTextModelWithProjection, f"text_encoder{second}")
    return PairedEncoder(first, ProjectedEncoder(tower, CLIPTokenizer.from_pretrained(part(f"tokenizer{second}"))))
