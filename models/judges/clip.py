"""The judge's CLIP (Radford et al. 2021), a small one that scores how well an image matches a caption.

It is trained on the data set and never conditions a model. tokenizers is imported where it is used, because stages that
have no captions load this file.

Legend: B images, U distinct captions, L tokens of a caption, E dimensions of the shared embedding space.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.device import sent
from models.judges.classifier import Backbone, shift_and_flip, to_input
from models.judges.fit import Pixels, Recipe, fit, seeded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[BOS]", "[EOS]"
MAX_WORDS = 8192
MAX_TOKENS = 40
EMBED, TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 64, 64, 2, 4
FIRST_TEMPERATURE, MAX_SCALE = 0.07, 100.0


class TextTower(nn.Module):
    """Token ids, int64 [U, L], padded with 0 -> text features, float [U, width]."""

    def __init__(self, words: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(words, width, padding_idx=0)
        self.position = nn.Parameter(torch.randn(MAX_TOKENS, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        hidden = self.layers(self.token(ids) + self.position[: ids.shape[1]], src_key_padding_mask=padding)
        present = (~padding).unsqueeze(-1)
        return (self.norm(hidden) * present).sum(1) / present.sum(1)


class Clip(nn.Module):
    """An image tower and a text tower with a shared space of `EMBED` dimensions; embeddings have unit length."""

    def __init__(self, channels: int, size: int, words: int) -> None:
        super().__init__()
        self.image = Backbone(channels, size)
        self.image_projection = nn.Linear(self.image.features, EMBED, bias=False)
        self.text = TextTower(words, TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS)
        self.text_projection = nn.Linear(TEXT_WIDTH, EMBED, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images, float [B, C, H, W] in [-1, 1], as unit vectors [B, E]."""
        return F.normalize(self.image_projection(self.image(images)), dim=-1)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Embed token ids, int64 [U, L], as unit vectors [U, E]."""
        return F.normalize(self.text_projection(self.text(ids)), dim=-1)

    def logits(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the scaled cosine similarities [B, U] of images and captions."""
        scale = self.log_scale.exp().clamp(max=MAX_SCALE)
        return scale * self.embed_images(images) @ self.embed_text(ids).T


def make_tokenizer(captions: Sequence[str]) -> Tokenizer:
    """Build a word-level tokenizer of the most frequent words of `captions`.

    It converts text to lower case, splits it at spaces and punctuation, adds `[BOS]` and `[EOS]`, and truncates it to
    `MAX_TOKENS`. `[PAD]` has the id 0.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    normalizer, splitter = Lowercase(), Whitespace()
    counts = Counter(word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: MAX_WORDS - 4]
    vocabulary = {word: index for index, word in enumerate([PAD, UNKNOWN, BEGIN, END, *frequent])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(mark, vocabulary[mark]) for mark in (BEGIN, END)]
    )
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def tokenize(tokenizer: Tokenizer, captions: Sequence[str]) -> np.ndarray:
    """Tokenise captions to int64 [U, L], padded with 0 to the longest one."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(captions))]
    ids = np.zeros((len(encoded), max(map(len, encoded))), np.int64)
    for row, tokens in zip(ids, encoded, strict=True):
        row[: len(tokens)] = tokens
    return ids


def own_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """Return the distinct captions, sorted, and the indices of each image's captions, int64 [N, K], padded with -1."""
    distinct = sorted({text for texts in captions for text in texts})
    index = {text: number for number, text in enumerate(distinct)}
    own = np.full((len(captions), max(map(len, captions))), -1, np.int64)
    for row, texts in zip(own, captions, strict=True):
        row[: len(texts)] = [index[text] for text in texts]
    return distinct, own


def contrastive_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """Return the symmetric cross entropy with several correct captions per image, a scalar.

    logits: [B, U]; matches: bool [B, U], at least one true value in each row and column. With one match in each it is
    CLIP's loss (Radford et al. 2021, figure 3); images that share captions have several.
    """
    target = matches.float()
    to_text = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, (target / target.sum(0)).T)
    return (to_text + to_image) / 2


def train_clip(pixels: Pixels, captions: Sequence[Sequence[str]], recipe: Recipe) -> tuple[Clip, Tokenizer]:
    """Train on the uint8 images [N, C, S, S] that have captions; returns the model in evaluation mode."""
    distinct, own = own_captions(captions)
    tokenizer = make_tokenizer(distinct)
    ids = tokenize(tokenizer, distinct)
    words = tokenizer.get_vocab_size()
    network = seeded(lambda: Clip(pixels.shape[1], pixels.shape[2], words), recipe.seed).to(recipe.device)
    counts = torch.from_numpy((own >= 0).sum(1))
    captioned = counts.numpy().nonzero()[0]

    def loss(batch: np.ndarray, generator: torch.Generator) -> Tensor:
        rows = captioned[batch]
        images = sent(shift_and_flip(to_input(pixels[rows]), generator, recipe.flip), recipe.device)
        choice = (torch.rand(len(rows), generator=generator) * counts[rows]).long().numpy()
        drawn = np.unique(own[rows, choice])
        matches = (own[rows][:, :, None] == drawn).any(1)
        tokens = sent(torch.from_numpy(ids[drawn]), recipe.device)
        return contrastive_loss(network.logits(images, tokens), sent(torch.from_numpy(matches), recipe.device))

    fit(network, loss, len(captioned), recipe)
    return network, tokenizer


def choice_accuracy(images: np.ndarray, texts: np.ndarray, right: np.ndarray, others: np.ndarray) -> float:
    """Return the accuracy of choosing each image's caption among K by cosine similarity.

    images: [N, E] and texts: [U, E], unit vectors; right: int64 [N] and others: int64 [N, K - 1], indices into texts.
    """
    choices = np.concatenate([right[:, None], others], axis=1)
    similarity = np.einsum("ne,nke->nk", images, texts[choices])
    return float((similarity[:, 1:].max(1) < similarity[:, 0]).mean())
