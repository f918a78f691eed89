"""Stage `codec`: make the networks that convert images and captions to model inputs, and measure what they lose.

outputs/codec/codec.json                   description and checksums (`CodecInfo`)
outputs/codec/vae/                         the autoencoder, diffusers layout
outputs/codec/{text_encoder,tokenizer}/    transformers layout; those of a second encoder end in "_2"
outputs/codec/quality.json                 measurements on held-out images
outputs/codec/reconstructions.png          held-out images, each above its reconstruction
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.formats import codec_info
from tasks.formats.codec_info import CodecInfo
from tasks.formats.verdict import require_accepted
from tasks.params import CodecParams, ImageParams
from tasks.pictures.index import read_index
from tasks.runtime import atomic, integrity, stage
from tasks.runtime.codec_quality import QUALITY, RECONSTRUCTIONS

if TYPE_CHECKING:
    import numpy as np

    from tasks.pictures.samples import Samples, Split


def codec(images: Path, accepted: Path, outputs: Path, params: CodecParams, image: ImageParams) -> None:
    """Make the codec and measure its losses on held-out images.

    Images become pixels (kind "identity") or the latents of an autoencoder, which is downloaded or trained here. The
    condition is nothing, the label, or the token embeddings of text encoders, downloaded or trained on the captions.
    """
    require_accepted(accepted)

    from tasks.pictures.images import enlarged

    classes = read_index(images).classes
    if warning := enlarged(_smaller(images, image.resolution), image.resolution):
        print(f"codec: {warning}")
    autoencoder, text, prompts = None, None, None
    quality: dict[str, float] = {}
    with atomic.writing_folder(outputs) as folder:
        if params.kind == "autoencoder" or params.conditioning == "text":
            from tasks.codecs.autoencoder import make_autoencoder
            from tasks.codecs.text import make_text_encoder, sample_prompts

            train, held_out = _samples(images, params, image)
            if params.kind == "autoencoder":
                autoencoder, measured = make_autoencoder(train, held_out, folder, params, RECONSTRUCTIONS)
                quality |= measured
            if params.conditioning == "text":
                text, measured = make_text_encoder(train, held_out, folder, params)
                prompts = sample_prompts(train, held_out, len(classes))
                quality |= measured
        info = CodecInfo(
            kind=params.kind,
            conditioning=params.conditioning,
            size=image.resolution,
            channels=image.channels,
            classes=classes if params.conditioning != "none" else [],
            autoencoder=autoencoder,
            text=text,
            prompts=prompts,
            files=integrity.checksums(folder, "*/*"),  # of the networks; the files beside them are reports
        )
        info.write(folder / codec_info.FILE)
        atomic.write_json(folder / QUALITY, quality)
    shape = f"{image.channels}x{image.resolution}x{image.resolution}"
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in quality.items())
    print(f"codec: {params.kind} on {shape}, conditioning {params.conditioning}{'; ' if numbers else ''}{numbers}")


def _samples(images: Path, params: CodecParams, image: ImageParams) -> tuple[Samples, Samples]:
    """Read the training and the held-out split, with the pixels that are trained or measured on."""
    from tasks.pictures.images import load_pixels

    return (
        load_pixels(images, "train", image, partial(_training_rows, params=params)),
        load_pixels(images, "test", image, partial(_measured_rows, params=params)),
    )


def _trains_text(params: CodecParams) -> bool:
    return params.conditioning == "text" and params.text.weights is None


def _training_rows(split: Split, params: CodecParams) -> np.ndarray:
    """Return the training images that the trainings draw and that the scaling is measured on, as rows."""
    import numpy as np

    from models.judges.fit import drawn_rows
    from tasks.codecs import autoencoder, text

    count, recipes, rows = len(split.keys), [], [np.arange(0)]
    if params.kind == "autoencoder":
        rows.append(autoencoder.scaling_rows(count))
        recipes += [autoencoder.recipe(params)] if params.autoencoder.weights is None else []
    recipes += text.recipes(params) if _trains_text(params) else []
    return np.concatenate([*rows, *(drawn_rows(count, recipe) for recipe in recipes)])


def _measured_rows(split: Split, params: CodecParams) -> np.ndarray:
    """Return the held-out images that the autoencoder and the text encoders are measured on, as rows."""
    import numpy as np

    from tasks.codecs.autoencoder import QUALITY_IMAGES
    from tasks.pictures.samples import held_out_rows

    of_images = np.arange(min(QUALITY_IMAGES, len(split.keys)) if params.kind == "autoencoder" else 0)
    return np.concatenate([of_images, held_out_rows(split)]) if _trains_text(params) else of_images


def _smaller(images: Path, resolution: int) -> int:
    """Count the images whose shorter side is below `resolution`."""
    import numpy as np

    from tasks.pictures.images import read_columns

    sides = read_columns(images, ["width", "height"])
    return int((np.minimum(*(sides[name].to_numpy() for name in ("width", "height"))) < resolution).sum())


if __name__ == "__main__":
    stage.main(codec)
