"""A picture of LoRA adapters at several weights: the subject or style of one adapter, blended with that of another.

    python -m tasks.lora_sweep --base FOLDER --lora A [--lora B] --prompt "a cat in sks style"

Each row has a weight of the first adapter, each column one of the second; with one adapter the columns are seeds.
FOLDER is the pipeline without adapters, such as the folder of train.init_from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from models.lora import Adapter
    from models.noise.samplers import Sampling
    from models.pipeline import Pipeline

PICTURE = Path("reports/lora_sweep.png")
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_ADAPTERS = 2
SIDE = 256
"""Largest side of an image in the picture."""


def load(base: Path, places: Sequence[Path]) -> tuple[Pipeline, list[Adapter]]:
    """Load the base and the adapters.

    Raises:
        StageError: for a folder that holds none, or an adapter of the text encoder or of another base.
    """
    from models.device import best_device
    from models.lora import merge_adapters, read_adapter
    from models.pipeline import load_pipeline

    if not 1 <= len(places) <= MOST_ADAPTERS:
        raise StageError(f"a picture has rows and columns, for 1 or 2 adapters and not {len(places)}; name fewer")
    try:
        pipeline = load_pipeline(base, best_device())
        adapters = [read_adapter(place) for place in places]
        for adapter in adapters:
            if adapter.parts != ["unet"]:
                raise ValueError(f"{adapter.file} changes {' and '.join(adapter.parts)}, not the unet alone")
            merge_adapters(pipeline.network.state_dict(), [(adapter, 1.0)])
    except (OSError, ValueError) as error:
        raise StageError(str(error)) from None
    if pipeline.text is None:
        raise StageError(f"{base} draws without prompts; name a text-conditional pipeline")
    return pipeline, adapters


def sweep(
    pipeline: Pipeline,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    prompt: str,
    seeds: Sequence[int],
    sampling: Sampling,
) -> np.ndarray:
    """Draw `prompt` at every weight, uint8 [rows, columns, C, H, W].

    Rows are the weights of the first adapter. Columns are those of the second, all from the first seed, or without a
    second the seeds.
    """
    import copy
    from dataclasses import replace

    import numpy as np

    from models.images.pixels import to_uint8
    from models.lora import merge_adapters
    from tasks.runtime.progress import progress

    first, *others = adapters
    base, network = pipeline.network.state_dict(), copy.deepcopy(pipeline.network)
    columns = [[(others[0], weight)] for weight in weights] if others else [[]]
    drawn = seeds[:1] if others else seeds
    rows = []
    for weight in progress(weights, desc="lora_sweep", unit="row"):
        images = []
        for column in columns:
            network.load_state_dict(merge_adapters(base, [(first, weight), *column]))
            asked = [prompt] * len(drawn)
            images.append(replace(pipeline, network=network).sample(drawn, None, sampling, prompts=asked))
        rows.append(to_uint8(np.concatenate(images)))
    return np.stack(rows)


def main() -> None:
    """Write the picture; an error is one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.lora_sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="pipeline without adapters")
    parser.add_argument("--lora", type=Path, action="append", required=True, help="adapter folder or file; up to twice")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2, 3), help="columns of a single adapter")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance")
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    try:
        _write(arguments)
    except (StageError, OSError) as error:
        sys.exit(f"lora_sweep: error: {' '.join(str(error).split())}")


def _write(arguments: argparse.Namespace) -> None:
    from models.images.pictures import grid, png_bytes, shrunk
    from models.noise.samplers import Sampling
    from tasks.runtime import atomic

    pipeline, adapters = load(arguments.base, arguments.lora)
    sampling = Sampling(steps=arguments.steps, guidance_scale=arguments.guidance)
    images = sweep(pipeline, adapters, arguments.weights, arguments.prompt, arguments.seeds, sampling)
    small = shrunk(images.reshape(-1, *images.shape[2:]), SIDE)
    weights = [f"{weight:g}" for weight in arguments.weights]
    columns = weights if len(adapters) > 1 else [f"seed {seed}" for seed in arguments.seeds]
    scale = max(1, SIDE // 2 // small.shape[-1])
    atomic.write_bytes(arguments.out, png_bytes(grid(small, images.shape[1], scale, weights, columns)))
    print(f"lora_sweep: wrote {arguments.out}, rows are weights of {arguments.lora[0]}")


if __name__ == "__main__":
    main()
