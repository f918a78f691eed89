"""The text encoder that conditions a model: caption -> embedding. It is trained on the data set's own captions.

It belongs to the model. The CLIP that scores samples (`models/judge.py`) is another one with a seed of its own, so
that what draws and what measures never share weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.clip import EMBED, TEXT_HEADS, TEXT_LAYERS, TEXT_WIDTH, TextTower, tokenize, train_clip
from models.fit import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WEIGHTS, TOKENIZER = "text_encoder.safetensors", "tokenizer.json"
ENCODE_BATCH = 1024


class TextEncoder(nn.Module):
    """Token ids, int64 [U, L], padded with 0 -> conditions, float [U, width], each number of variance about 1.

    The embedding of length 1 that contrastive training made passes through a fixed random map to the model's width.
    """

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.text = TextTower(words, TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS)
        self.text_projection = nn.Linear(TEXT_WIDTH, EMBED, bias=False)
        self.register_buffer("widen", torch.zeros(EMBED, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.text_projection(self.text(ids)), dim=-1) @ self.widen


def train_text_encoder(
    pixels: np.ndarray, captions: Sequence[Sequence[str]], width: int, recipe: Recipe
) -> tuple[TextEncoder, Tokenizer]:
    """Train on uint8 images [N, C, S, S] with at least one caption each; the same recipe gives the same weights."""
    clip, tokenizer = train_clip(pixels, captions, recipe)
    encoder = TextEncoder(tokenizer.get_vocab_size(), width)
    encoder.text.load_state_dict(clip.text.state_dict())
    encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    encoder.widen.copy_(torch.randn(EMBED, width, generator=torch.Generator().manual_seed(recipe.seed)))
    return encoder.eval(), tokenizer


def encode_captions(encoder: TextEncoder, tokenizer: Tokenizer, captions: Sequence[str]) -> np.ndarray:
    """Captions -> conditions, float32 [U, width]; the empty text stands for none."""
    parts = []
    for start in range(0, len(captions), ENCODE_BATCH):
        ids = torch.from_numpy(tokenize(tokenizer, captions[start : start + ENCODE_BATCH]))
        with torch.inference_mode():
            parts.append(encoder(ids).numpy())
    return np.concatenate(parts)


def save_text_encoder(folder: Path, encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    """Write weights and tokenizer into an existing folder."""
    from safetensors.torch import save_file

    save_file(encoder.state_dict(), folder / WEIGHTS)
    tokenizer.save(str(folder / TOKENIZER))


def load_text_encoder(folder: Path) -> tuple[TextEncoder, Tokenizer]:
    """Read what `save_text_encoder` wrote. Raises `FileNotFoundError` where there is none."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(folder / WEIGHTS)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    state = load_file(folder / WEIGHTS)
    encoder = TextEncoder(tokenizer.get_vocab_size(), state["widen"].shape[1])
    encoder.load_state_dict(state)
    return encoder.eval(), tokenizer
