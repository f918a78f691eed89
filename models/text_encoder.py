"""The text encoder that conditions a model: captions -> token sequences. Trained on the data set's own captions, or
published; in either case transformers' `CLIPTextModel` and `CLIPTokenizer`, as Stable Diffusion has them.

It belongs to the model. The CLIP that scores samples (`models/judge.py`) is another one with a seed of its own, so
that what draws and what measures never share weights.

Legend: U captions, L tokens of each (padded), D width of a token's embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

APPLY_BATCH = 64


@dataclass(frozen=True)
class TextEncoder:
    """A `CLIPTextModel` in evaluation mode and its tokenizer."""

    model: CLIPTextModel
    tokenizer: CLIPTokenizer

    @property
    def length(self) -> int:
        """L: the tokens that every caption is padded or cut to."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

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


def save_text_encoder(folder: Path, encoder: TextEncoder) -> None:
    """Write `text_encoder/` and `tokenizer/` in transformers' layout into an existing folder."""
    encoder.model.save_pretrained(folder / "text_encoder")
    encoder.tokenizer.save_pretrained(folder / "tokenizer")
    for file in (folder / "text_encoder" / "config.json", folder / "tokenizer" / "tokenizer_config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "name_or_path", "local_files_only", "is_local"):
            config.pop(key, None)  # where it was loaded from is this machine's business
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_text_encoder(folder: Path, device: str = "cpu") -> TextEncoder:
    """Read `text_encoder/` and `tokenizer/`, weights from safetensors alone, in float32.

    Raises `FileNotFoundError` where one is missing.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(folder / part)
    model = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return TextEncoder(model.eval().requires_grad_(False).to(device), tokenizer)
