"""The stage `codec`: what stands between images and the model's inputs."""

from __future__ import annotations

from pathlib import Path

from tasks import atomic, stage
from tasks.images import read_index, require_accepted
from tasks.params import CodecParams, ImageParams
from tasks.stage import StageError

FORMAT = 1


def codec(images: Path, accepted: Path, outputs: Path, params: CodecParams, image: ImageParams) -> None:
    """Describe the model's inputs: pixels as they are (identity), and the condition that goes with them."""
    require_accepted(accepted)
    classes = read_index(images)["classes"]
    if params.conditioning == "label" and not classes:
        raise StageError(
            "codec.conditioning is 'label', but the images have no classes; set it to 'none', "
            "or sort the images into one folder per class"
        )
    with atomic.writing_folder(outputs) as folder:
        document = {
            "format": FORMAT,
            "kind": params.kind,
            "conditioning": params.conditioning,
            "size": image.size,
            "channels": image.channels,
            "classes": classes if params.conditioning == "label" else [],
        }
        atomic.write_json(folder / "codec.json", document)
    print(f"codec: {params.kind} on {image.channels}x{image.size}x{image.size}, conditioning {params.conditioning}")


if __name__ == "__main__":
    stage.main(codec)
