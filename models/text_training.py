"""Contrastive training of a text encoder and its tokenizer on captions (Radford et al. 2021), and its measurement.

transformers and tokenizers are imported where they are used: models of pixels load neither.

Legend: B images, U captions, L tokens of each (padded), D width of a token embedding, E of the shared space.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.device import sent
from models.judges.classifier import Backbone, apply, shift_and_flip, to_input
from models.judges.clip import EMBED, FIRST_TEMPERATURE, MAX_SCALE, choice_accuracy, contrastive_loss, own_captions
from models.judges.fit import Pixels, Recipe, fit, seeded
from models.networks.text_encoder import APPLY_BATCH, ProjectedEncoder, TextEncoder

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
HEAD_DIM = 16
CHOICES = 10
"""Captions among which `retrieval_accuracy` chooses, the correct one included."""


@dataclass(frozen=True)
class TextConfig:
    """Architecture of the text encoder."""

    width: int
    """D, a multiple of `HEAD_DIM`."""
    layers: int
    """Transformer layers."""
    length: int
    """L."""
    words: int
    """Largest size of the vocabulary."""


class Towers(nn.Module):
    """An image tower and a text tower with a shared space of E dimensions (Radford et al. 2021)."""

    def __init__(self, channels: int, size: int, text: CLIPTextModel) -> None:
        super().__init__()
        self.image, self.text = Backbone(channels, size), text
        self.image_projection = nn.Linear(self.image.features, EMBED, bias=False)
        self.text_projection = nn.Linear(text.config.hidden_size, EMBED, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / FIRST_TEMPERATURE).log())

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images, float [B, C, S, S] in [-1, 1], as unit vectors [B, E]."""
        return F.normalize(self.image_projection(self.image(images)), dim=-1)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Embed token ids, int64 [U, L], as unit vectors [U, E]."""
        return F.normalize(self.text_projection(self.text(ids).pooler_output), dim=-1)


def train_text_encoder(
    pixels: Pixels, captions: Sequence[Sequence[str]], config: TextConfig, recipe: Recipe
) -> tuple[TextEncoder, Towers]:
    """Train on uint8 images [N, C, S, S] with at least one caption each; the result is reproducible.

    Returns the encoder and both towers, which `retrieval_accuracy` needs.
    """
    distinct, own = own_captions(captions)
    tokenizer = make_tokenizer(distinct, config)
    pair = seeded(lambda: Towers(pixels.shape[1], pixels.shape[2], text_tower(config, tokenizer)), recipe.seed)
    pair.to(recipe.device)
    ids = TextEncoder(pair.text, tokenizer).token_ids(distinct)
    counts = torch.from_numpy((own >= 0).sum(1))

    def loss(rows: np.ndarray, generator: torch.Generator) -> Tensor:
        images = sent(shift_and_flip(to_input(pixels[rows]), generator, recipe.flip), recipe.device)
        choice = (torch.rand(len(rows), generator=generator) * counts[rows]).long().numpy()
        drawn = np.unique(own[rows, choice])
        matches = sent(torch.from_numpy((own[rows][:, :, None] == drawn).any(1)), recipe.device)
        scale = pair.log_scale.exp().clamp(max=MAX_SCALE)
        similarity = pair.embed_images(images) @ pair.embed_text(sent(ids[drawn], recipe.device)).T
        return contrastive_loss(scale * similarity, matches)

    fit(pair, loss, pixels.shape[0], recipe)
    return TextEncoder(pair.text, tokenizer), pair


def projected(encoder: TextEncoder, pair: Towers) -> ProjectedEncoder:
    """Return the encoder with its projection into the shared space, which gives the pooled embedding [U, E]."""
    from transformers import CLIPTextModelWithProjection

    config = copy.deepcopy(encoder.model.config)
    config.projection_dim = EMBED
    model = CLIPTextModelWithProjection(config).to(encoder.model.device)
    model.text_model.load_state_dict(encoder.model.state_dict())
    model.text_projection.load_state_dict(pair.text_projection.state_dict())
    return ProjectedEncoder(model.eval().requires_grad_(False), encoder.tokenizer)


def text_tower(config: TextConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build an untrained text encoder with the vocabulary of `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.width // HEAD_DIM,
            max_position_embeddings=config.length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_tokenizer(captions: Sequence[str], config: TextConfig) -> CLIPTokenizer:
    """Learn CLIP's byte-pair encoding (Radford et al. 2021, section 2.4) from `captions`.

    The vocabulary contains every byte, inside a word and at its end, so any text can be encoded.
    """
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=config.words,
        # The trainer would number the word-final bytes in another order each time, so they are listed here.
        special_tokens=[BEGIN, END, *(f"{byte}</w>" for byte in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner = Tokenizer.from_str(CLIPTokenizer().backend_tokenizer.to_str())
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=config.length)


def retrieval_accuracy(
    pair: Towers, encoder: TextEncoder, pixels: np.ndarray, captions: Sequence[Sequence[str]], seed: int
) -> tuple[float, int]:
    """Return the accuracy of choosing each image's first caption among `CHOICES`, and the number of choices.

    pixels: uint8 [N, C, S, S]. The other captions are drawn from those of other images; with few distinct captions
    there are fewer choices.

    Raises:
        ValueError: if all images have the same captions.
    """
    distinct, own = own_captions(captions)
    choices = min(CHOICES, len(distinct) - max(map(len, captions)) + 1)
    if choices < 2:
        raise ValueError("all images have the same captions, so retrieval cannot be measured")
    random = np.random.default_rng(seed)
    others = np.stack(
        [random.choice(np.setdiff1d(np.arange(len(distinct)), row), choices - 1, replace=False) for row in own]
    )
    images = apply(lambda _: pair.embed_images, pixels, str(encoder.model.device))
    with torch.inference_mode():
        ids = encoder.token_ids(distinct).to(encoder.model.device)
        texts = torch.cat([pair.embed_text(batch) for batch in ids.split(APPLY_BATCH)]).cpu().numpy()
    return choice_accuracy(images, texts, own[:, 0], others), choices
