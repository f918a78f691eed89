"""The stage `codec`: what stands between images and the model's inputs.

outputs/codec/codec.json             what the other stages must know
outputs/codec/vae/                   the autoencoder, diffusers layout
outputs/codec/{text_encoder,tokenizer}/    transformers layout, with a "_2" at their end those of a second encoder
outputs/codec/quality.json           what it does on held-out images
outputs/codec/reconstructions.png    held-out images, each above what is left of it
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.formats.verdict import require_accepted
from tasks.params import AutoencoderParams, CodecParams, ImageParams
from tasks.pictures.images import Samples, enlarged, load_pixels, read_columns, read_index
from tasks.runtime import atomic, integrity, stage
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    import numpy as np

    from models.networks.text_encoder import AnyEncoder, TextEncoder

FORMAT = 2
MEASURED_IMAGES = 1024
"""Training images over which the scaling of the latents is measured."""
PROMPTS = 64
"""Held-out captions that stand for what may be asked of a model of captions without classes."""
JUDGED_IMAGES, SHOWN_IMAGES, SHOWN_PIXELS, MOST_PIXELS = 512, 10, 64, 256


def codec(images: Path, accepted: Path, outputs: Path, params: CodecParams, image: ImageParams) -> None:
    """Make what turns images and captions into the model's inputs, and measure on held-out images what it loses.

    Images: pixels as they are (identity), or the latents of an autoencoder, published or trained here. Conditions:
    none, the label, or the token sequence of a text encoder, published or trained here on the captions.
    """
    require_accepted(accepted)
    classes = read_index(images).classes
    document: dict[str, Any] = {
        "format": FORMAT,
        "kind": params.kind,
        "conditioning": params.conditioning,
        "size": image.resolution,
        "channels": image.channels,
        "classes": classes if params.conditioning != "none" else [],
    }
    if told := enlarged(_smaller(images, image.resolution), image.resolution):
        print(f"codec: {told}")
    quality: dict[str, float] = {}
    with atomic.writing_folder(outputs) as folder:
        if params.kind == "autoencoder" or params.conditioning == "text":
            train, held_out = (load_pixels(images, split, image) for split in ("train", "test"))
        if params.kind == "autoencoder":
            document["autoencoder"] = _autoencoder(train, held_out, folder, params, quality)
        if params.conditioning == "text":
            document |= _text(train, held_out, folder, len(classes), params, quality)
        document["files"] = integrity.checksums(folder, "*/*")  # of the networks; what lies beside them only reports
        atomic.write_json(folder / "codec.json", document)
        atomic.write_json(folder / "quality.json", quality)
    form = f"{image.channels}x{image.resolution}x{image.resolution}"
    measured = ", ".join(f"{name} {value:.4g}" for name, value in quality.items())
    print(f"codec: {params.kind} on {form}, conditioning {params.conditioning}{'; ' if measured else ''}{measured}")


def _smaller(images: Path, resolution: int) -> int:
    """Number of images whose shorter side is below `resolution`."""
    import numpy as np

    sides = read_columns(images, ["width", "height"])
    return int((np.minimum(*(sides[name].to_numpy() for name in ("width", "height"))) < resolution).sum())


def _autoencoder(
    train: Samples, held_out: Samples, folder: Path, params: CodecParams, quality: dict[str, float]
) -> dict[str, Any]:
    """Write `vae/` with its scaling, and what it does to held-out images; returns what codec.json says about it."""
    from models import autoencoder_training as training
    from models.networks import autoencoder

    network = _trained(train, params) if params.autoencoder.weights is None else _published(params.autoencoder)
    _require_fits(network, train, params.autoencoder)
    # Evenly spread, so that a data set sorted by class is measured over all of its classes.
    some = train.pixels[:: max(1, len(train.pixels) // MEASURED_IMAGES)][:MEASURED_IMAGES]
    mean, std = training.measure_scaling(network, some)
    if params.autoencoder.scaling == "measured":
        try:
            training.fold_scaling(network, mean, std)
        except ValueError as error:
            raise StageError(f"{error}; set codec.autoencoder.scaling to 'published'") from None
    judged = held_out.pixels[:JUDGED_IMAGES]
    reconstructed = autoencoder.reconstruct(network, judged)
    measured = training.quality(judged, reconstructed)
    quality |= {f"autoencoder_{name}": _rounded(value) for name, value in measured.items()}
    _picture(judged, reconstructed, folder / "reconstructions.png")
    return {
        "sha256": autoencoder.save_autoencoder(folder / "vae", network),
        "channels": network.config.latent_channels,
        "size": held_out.pixels.shape[-1] // autoencoder.downscale_factor(network),
        "scaling": params.autoencoder.scaling,
        # Of the latents that the network gives without it, over the training images.
        "measured_mean": [_rounded(value) for value in mean.tolist()],
        "measured_std": [_rounded(value) for value in std.tolist()],
    }


def _trained(train: Samples, params: CodecParams) -> Any:
    from models.autoencoder_training import AutoencoderConfig, train_autoencoder
    from models.device import best_device
    from models.judges.fit import Recipe

    wanted = params.autoencoder
    config = AutoencoderConfig(
        channels=train.pixels.shape[1],
        latent_channels=wanted.latent_channels,
        widths=wanted.widths,
        layers_per_block=wanted.layers_per_block,
        reconstruction=wanted.reconstruction,
        edge_weight=wanted.edge_weight,
        kl_weight=wanted.kl_weight,
    )
    recipe = Recipe(
        wanted.steps, wanted.batch_size, params.seed, wanted.horizontal_flip, best_device(), _bar("autoencoder")
    )
    return train_autoencoder(train.pixels, config, recipe)


def _published(params: AutoencoderParams) -> Any:
    from models.device import best_device
    from models.networks.autoencoder import load_autoencoder
    from tasks.pretrained import weights

    assert params.weights is not None and params.pin is not None, "the parameters were checked"
    folder = weights.part(weights.bring(params.weights, params.pin, ("vae",)), "vae")
    try:
        return load_autoencoder(folder, best_device())
    except (OSError, ValueError) as error:
        raise StageError(f"codec.autoencoder.weights '{params.weights}': {error}") from None


def _require_fits(network: Any, train: Samples, params: AutoencoderParams) -> None:
    """Published weights must have the shape that the parameters state, on which the model's shape was checked."""
    from models.networks.autoencoder import downscale_factor

    config, given = network.config, "codec.autoencoder.weights"
    if config.in_channels != train.pixels.shape[1]:
        raise StageError(
            f"{given} are for {config.in_channels} channels and image.channels is {train.pixels.shape[1]}; change that"
        )
    if config.latent_channels != params.latent_channels:
        raise StageError(
            f"{given} make {config.latent_channels} latent channels; set codec.autoencoder.latent_channels"
        )
    if downscale_factor(network) != 2 ** (len(params.widths) - 1):
        raise StageError(
            f"{given} make a side {downscale_factor(network)} times smaller, and codec.autoencoder.widths says "
            f"{2 ** (len(params.widths) - 1)} times; state the widths of the weights"
        )
    if getattr(config, "latents_mean", None) is not None:
        raise StageError(
            f"{given} normalise their latents by a latents_mean beside the scaling factor, which other programs would "
            "then add to the images drawn here; choose others"
        )


def _picture(images: np.ndarray, reconstructed: np.ndarray, path: Path) -> None:
    import numpy as np

    from models import pictures

    count = min(SHOWN_IMAGES, len(images))
    pairs = pictures.shrunk(np.concatenate([images[:count], reconstructed[:count]]), MOST_PIXELS)
    scale = max(1, round(SHOWN_PIXELS / pairs.shape[-1]))
    pictures.save_png(pictures.grid(pairs, count, scale, ["image", "decoded"]), path)


def _text(
    train: Samples, held_out: Samples, folder: Path, classes: int, params: CodecParams, quality: dict[str, float]
) -> dict[str, Any]:
    """Write the text encoders and their tokenizers; returns what codec.json says about them, and the prompts by which
    samples are asked for: one of each class, or where there are none captions of held-out images."""
    from models.networks.text_encoder import save_text_encoder

    encoder = _published_text(params) if params.text.weights else _trained_text(train, held_out, params, quality)
    save_text_encoder(folder, encoder)
    prompts = _class_prompts(train, classes) if classes else _some_captions(held_out)
    text = {"sha256": _hash(folder), "width": encoder.width, "length": encoder.length, "pooled": encoder.pooled}
    return {"text": text, "prompts": prompts}


def _class_prompts(samples: Samples, classes: int) -> list[str]:
    """The alphabetically first caption of each class."""
    labelled = list(zip(samples.labels, samples.captions, strict=True))
    return [min(text for label, texts in labelled if label == c for text in texts) for c in range(classes)]


def _some_captions(samples: Samples) -> list[str]:
    """The first captions of images that are evenly spread over the split, each once."""
    step = max(1, len(samples.captions) // PROMPTS)
    return list(dict.fromkeys(captions[0] for captions in samples.captions[::step]))[:PROMPTS]


def _trained_text(train: Samples, held_out: Samples, params: CodecParams, quality: dict[str, float]) -> AnyEncoder:
    """One encoder, or two of different seeds, the second with the projection that it was trained in."""
    from models.networks.text_encoder import PairedEncoder
    from models.text_training import projected

    encoder, pair = _trained_tower(train, params, params.text.width, params.seed)
    quality |= _retrieval(pair, encoder, held_out, params.seed, "text")
    if params.text.second_width is None:
        return encoder
    second, pair = _trained_tower(train, params, params.text.second_width, params.seed + 1)
    quality |= _retrieval(pair, second, held_out, params.seed, "second_text")
    return PairedEncoder(encoder, projected(second, pair))


def _trained_tower(train: Samples, params: CodecParams, width: int, seed: int) -> tuple[TextEncoder, Any]:
    from models.device import best_device
    from models.judges.fit import Recipe
    from models.text_training import TextConfig, train_text_encoder

    wanted = params.text
    config = TextConfig(width, wanted.layers, wanted.length, wanted.words)
    recipe = Recipe(wanted.steps, seed=seed, device=best_device(), progress=_bar("text encoder"))
    return train_text_encoder(train.pixels, train.captions, config, recipe)


def _retrieval(pair: Any, encoder: TextEncoder, held_out: Samples, seed: int, name: str) -> dict[str, float]:
    """How well the encoder finds the caption of a held-out image; nothing where there is one caption for all."""
    from models.text_training import retrieval_accuracy

    try:
        accuracy, offered = retrieval_accuracy(pair, encoder, held_out.pixels, held_out.captions, seed)
    except ValueError:
        return {}
    return {f"{name}_retrieval_accuracy": _rounded(accuracy), f"{name}_retrieval_chance": _rounded(1 / offered)}


def _published_text(params: CodecParams) -> AnyEncoder:
    from models.device import best_device
    from models.networks.text_encoder import SIZES, SUFFIXES, load_text_encoder
    from tasks.pretrained import weights

    wanted = params.text
    assert wanted.weights is not None and wanted.pin is not None, "the parameters were checked"
    paired = wanted.second_width is not None
    suffixes = SUFFIXES if paired else SUFFIXES[:1]
    names = [f"{name}{suffix}" for suffix in suffixes for name in ("text_encoder", "tokenizer")]
    folder = weights.bring(wanted.weights, wanted.pin, tuple(names))
    try:
        encoder = load_text_encoder(folder, best_device(), paired)
    except (OSError, ValueError) as error:
        raise StageError(f"codec.text.weights '{wanted.weights}': {error}") from None
    found = dict(zip(("width", "second_width"), (tower.width for tower in encoder.towers), strict=False))
    for name, value in {**found, "length": encoder.length}.items():
        if getattr(wanted, name) != value:
            raise StageError(f"codec.text.weights have {name} {value}; set codec.text.{name} to it")
    if encoder.pooled is not None and encoder.pooled + SIZES > encoder.width:
        raise StageError(f"codec.text.weights '{wanted.weights}' pool to {encoder.pooled} numbers, which is too wide")
    return encoder


def _hash(folder: Path) -> str:
    """sha256 over text encoders and tokenizers."""
    import hashlib

    from models.networks.autoencoder import seal
    from models.networks.text_encoder import SUFFIXES

    parts = [folder / f"{name}{suffix}" for suffix in SUFFIXES for name in ("text_encoder", "tokenizer")]
    return hashlib.sha256("".join(seal(part) for part in parts if part.is_dir()).encode()).hexdigest()


def _rounded(value: float) -> float:
    """To six digits: more are noise of the order of summation."""
    return float(f"{value:.6g}")


def _bar(what: str) -> Callable[..., Any]:
    from tqdm import tqdm

    return partial(tqdm, desc=f"codec: {what}", unit="step", mininterval=1, dynamic_ncols=True)


if __name__ == "__main__":
    stage.main(codec)
