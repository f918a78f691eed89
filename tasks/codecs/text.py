"""The text encoders of the codec: downloaded or trained on the captions, measured, and saved."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from models.device import best_device
from models.judges.fit import Recipe
from models.networks.autoencoder import seal
from models.networks.text_encoder import (
    SIZES,
    SUFFIXES,
    AnyEncoder,
    PairedEncoder,
    TextEncoder,
    load_text_encoder,
    save_text_encoder,
)
from models.text_training import TextConfig, Towers, projected, retrieval_accuracy, train_text_encoder
from tasks.codecs.autoencoder import rounded
from tasks.formats.codec_info import TextInfo
from tasks.pictures.samples import held_out_rows
from tasks.pretrained import weights
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from tasks.params import CodecParams
    from tasks.pictures.samples import Samples

PROMPTS = 64
"""Captions of held-out images that serve as sample prompts of a data set without classes."""


def make_text_encoder(
    train: Samples, held_out: Samples, folder: Path, params: CodecParams
) -> tuple[TextInfo, dict[str, float]]:
    """Write the text encoders and their tokenizers to `folder`.

    Returns:
        The description for `codec.json`, and the measurements on held-out images by name.

    Raises:
        StageError: if published weights do not fit the parameters.
    """
    quality: dict[str, float] = {}
    encoder = _download(params) if params.text.weights else _train(train, held_out, params, quality)
    save_text_encoder(folder, encoder)
    info = TextInfo(sha256=_hash(folder), width=encoder.width, length=encoder.length, pooled=encoder.pooled)
    return info, quality


def sample_prompts(train: Samples, held_out: Samples, classes: int) -> list[str]:
    """Return the prompts of sample images: one per class, or held-out captions if there are no classes."""
    if not classes:
        step = max(1, len(held_out.captions) // PROMPTS)
        return list(dict.fromkeys(captions[0] for captions in held_out.captions[::step]))[:PROMPTS]
    labelled = list(zip(train.labels, train.captions, strict=True))
    return [min(text for label, texts in labelled if label == c for text in texts) for c in range(classes)]


def _train(train: Samples, held_out: Samples, params: CodecParams, quality: dict[str, float]) -> AnyEncoder:
    """Train one encoder, or with `second_width` two with different seeds, and measure each.

    The second keeps its projection into the space shared with images, which makes the pooled embedding.
    """
    first, *further = recipes(params)
    encoder, pair = _train_tower(train, params, params.text.width, first)
    quality |= _retrieval(pair, encoder, held_out, params.seed, "text")
    if params.text.second_width is None:
        return encoder
    second, pair = _train_tower(train, params, params.text.second_width, further[0])
    quality |= _retrieval(pair, second, held_out, params.seed, "second_text")
    return PairedEncoder(encoder, projected(second, pair))


def recipes(params: CodecParams) -> list[Recipe]:
    """Return how each text encoder is trained, on the CPU: one, or with `second_width` two with different seeds."""
    bar = partial(progress, desc="codec: text encoder", unit="step")
    first = Recipe(params.text.steps, seed=params.seed, progress=bar)
    return [first] if params.text.second_width is None else [first, replace(first, seed=params.seed + 1)]


def _train_tower(train: Samples, params: CodecParams, width: int, recipe: Recipe) -> tuple[TextEncoder, Towers]:
    config = TextConfig(width, params.text.layers, params.text.length, params.text.words)
    return train_text_encoder(train.by_row, train.captions, config, replace(recipe, device=best_device()))


def _retrieval(pair: Towers, encoder: TextEncoder, held_out: Samples, seed: int, name: str) -> dict[str, float]:
    """Measure how often the encoder finds the caption of a held-out image; empty if all captions are equal."""
    rows = held_out_rows(held_out)
    captions = [held_out.captions[row] for row in rows.tolist()]
    try:
        accuracy, offered = retrieval_accuracy(pair, encoder, held_out.at(rows), captions, seed)
    except ValueError:
        return {}
    return {f"{name}_retrieval_accuracy": rounded(accuracy), f"{name}_retrieval_chance": rounded(1 / offered)}


def _download(params: CodecParams) -> AnyEncoder:
    section = params.text
    assert section.weights is not None and section.pin is not None, "checked when the parameters are loaded"
    paired = section.second_width is not None
    suffixes = SUFFIXES if paired else SUFFIXES[:1]
    names = [f"{name}{suffix}" for suffix in suffixes for name in ("text_encoder", "tokenizer")]
    folder = weights.local_folder(section.weights, section.pin, tuple(names))
    try:
        encoder = load_text_encoder(folder, best_device(), paired)
    except (OSError, ValueError) as error:
        raise StageError(f"codec.text.weights '{section.weights}': {error}") from None
    found = dict(zip(("width", "second_width"), (tower.width for tower in encoder.towers), strict=False))
    for name, value in {**found, "length": encoder.length}.items():
        if getattr(section, name) != value:
            raise StageError(f"codec.text.weights have {name} {value}; set codec.text.{name} to it")
    if encoder.pooled is not None and encoder.pooled + SIZES > encoder.width:
        raise StageError(
            f"codec.text.weights '{section.weights}' have a pooled embedding of {encoder.pooled} values, which does "
            f"not fit a token embedding of {encoder.width}; choose other weights"
        )
    return encoder


def _hash(folder: Path) -> str:
    """Hash the text encoders and tokenizers."""
    parts = [folder / f"{name}{suffix}" for suffix in SUFFIXES for name in ("text_encoder", "tokenizer")]
    return hashlib.sha256("".join(seal(part) for part in parts if part.is_dir()).encode()).hexdigest()
