"""The stage `codec`: what stands between images and the model's inputs."""

from __future__ import annotations

from pathlib import Path

from tasks import atomic, stage
from tasks.images import load_pixels, read_index, require_accepted
from tasks.params import CodecParams, ImageParams
from tasks.stage import StageError

FORMAT = 1


def codec(images: Path, accepted: Path, outputs: Path, params: CodecParams, image: ImageParams) -> None:
    """Describe the model's inputs: pixels as they are (identity), and the condition that goes with them.

    Conditioning `text` trains a text encoder on the captions; samples are then asked for by class prompts.
    """
    require_accepted(accepted)
    classes = read_index(images)["classes"]
    if params.conditioning != "none" and not classes:
        raise StageError(
            f"codec.conditioning is '{params.conditioning}', but the images have no classes; set it to 'none', "
            "or sort the images into one folder per class"
        )
    with atomic.writing_folder(outputs) as folder:
        document = {
            "format": FORMAT,
            "kind": params.kind,
            "conditioning": params.conditioning,
            "size": image.size,
            "channels": image.channels,
            "classes": classes if params.conditioning != "none" else [],
        }
        if params.conditioning == "text":
            document["prompts"] = _text_encoder(images, folder, len(classes), params, image)
        atomic.write_json(folder / "codec.json", document)
    print(f"codec: {params.kind} on {image.channels}x{image.size}x{image.size}, conditioning {params.conditioning}")


def _text_encoder(images: Path, folder: Path, classes: int, params: CodecParams, image: ImageParams) -> list[str]:
    """Train the text encoder into `folder`; returns the prompt of each class: its alphabetically first caption."""
    from functools import partial

    from tqdm import tqdm

    from models.fit import Recipe
    from models.text_encoder import save_text_encoder, train_text_encoder

    samples = load_pixels(images, "train", image)
    without = [key for key, captions in zip(samples.keys, samples.captions, strict=True) if not captions]
    if without:
        raise StageError(
            f"codec.conditioning is 'text', but {len(without)} images have no caption ({', '.join(without[:3])}); "
            "add them, set ingest.caption_templates, or use conditioning 'label'"
        )
    progress = partial(tqdm, desc="codec: text encoder", unit="step", mininterval=1, dynamic_ncols=True)
    recipe = Recipe(params.text_steps, seed=params.seed, progress=progress)
    encoder, tokenizer = train_text_encoder(samples.pixels, samples.captions, params.text_width, recipe)
    save_text_encoder(folder, encoder, tokenizer)
    return [
        min(text for label, texts in zip(samples.labels, samples.captions, strict=True) if label == c for text in texts)
        for c in range(classes)
    ]


if __name__ == "__main__":
    stage.main(codec)
