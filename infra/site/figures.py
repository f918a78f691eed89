"""Copy pictures that the pipeline drew into `docs/images`, where the pages of the theory show them.

    python -m infra.site.figures

Run it after `make repro` with the default preset. The pictures are reduced to at most 256 colours, and an animation
stays one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

REPORTS, IMAGES = Path("reports"), Path("docs/images")
PICTURES = {
    "forward.png": "figures/forward.png",
    "forward_by_schedule.png": "figures/forward_by_schedule.png",
    "reverse.png": "figures/reverse.png",
    "schedules.png": "figures/schedules.png",
    "training.png": "figures/training.png",
    "neighbours.png": "figures/neighbours.png",
    "denoising.webp": "figures/denoising.png",
    "strengths.png": "figures/edits_strengths.png",
}
"""Picture in `docs/images` -> the file of the report that it is made from."""
COLOURS = 256


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.site.figures", description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    for name, source in PICTURES.items():
        file = REPORTS / source
        if not file.exists():
            print(f"figures: {file} does not exist; run 'make repro' with the default preset first", file=sys.stderr)
            return 1
        save(file, IMAGES / name)
        print(f"figures: {IMAGES / name}, {(IMAGES / name).stat().st_size / 1000:.0f} kB")
    return 0


def save(source: Path, target: Path) -> None:
    """Write the picture `source`, with all of its frames, to `target`."""
    with Image.open(source) as picture:
        frames, durations = [], []
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            durations.append(round(picture.info.get("duration", 0)))
            frames.append(picture.convert("RGBA"))
        if target.suffix == ".webp":
            frames[0].save(
                target, save_all=True, append_images=frames[1:], duration=durations, loop=0, lossless=True, method=6
            )
        else:
            frames[0].quantize(COLOURS, Image.Quantize.FASTOCTREE).save(target, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
