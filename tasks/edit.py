"""Stage `edit`: image-to-image and inpainting of held-out images, measured against simple alternatives."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.formats.verdict import require_accepted
from tasks.params import EditParams
from tasks.runtime import atomic, integrity, stage

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from tasks.editing.measuring import Bench, Row
    from tasks.editing.subjects import Subjects

STRENGTHS, FILLS = "strengths", "fills"
"""Tables (CSV) and pictures (PNG) in the report's folder."""
DISTANCES = ["feature_distance", "frechet_to_input", "frechet_to_data"]
STRENGTH_COLUMNS = ["strength", "n", "psnr", *DISTANCES, "asked_share", "asked_share_ignored"]
FILL_COLUMNS = ["mask", "fill", "n", "masked_share", "known_error", "psnr", *DISTANCES, "own_share"]
DIGITS = 6
SHOWN_STRENGTHS, SHOWN_FILLS = 6, 8
"""Images in the pictures."""
TILE_PIXELS = 64


def edit(
    pipeline: Path, images: Path, accepted: Path, judge: Path, metrics: Path, report: Path, params: EditParams
) -> None:
    """Edit held-out images, and measure how much they keep and how real they look.

    Image-to-image asks each image to become another class, or another image's caption, at every strength; inpainting
    fills each mask with the model, and beside it with simple alternatives. Tables and pictures go to the folder
    `report`, the headline numbers to `metrics`. Without images, or without strengths and masks, both are empty.

    Raises `StageError` if there are too few held-out images.
    """
    require_accepted(accepted)
    swept: list[tuple[Row, np.ndarray]] = []
    filled: list[tuple[Row, np.ndarray]] = []
    subjects = None
    headline: Mapping[str, object] = {"images": 0}
    if params.enabled:
        from tasks.editing import measuring

        bench = _bench(pipeline, images, judge, params)
        subjects = bench.subjects
        swept, filled = list(measuring.strengths(bench)), list(measuring.fills(bench))
        headline = measuring.headline([row for row, _ in swept], [row for row, _ in filled], len(subjects.pixels))
    with atomic.writing_folder(report) as folder:
        for name, columns, found in ((STRENGTHS, STRENGTH_COLUMNS, swept), (FILLS, FILL_COLUMNS, filled)):
            atomic.write_text(folder / f"{name}.csv", _csv(columns, [row for row, _ in found]))
        if subjects:
            _draw(folder, subjects, swept, filled, params)
    atomic.write_json(metrics, _rounded(headline))
    if params.enabled:
        bench.drafts.discard()
    _print(headline, params)


def _bench(pipeline: Path, images: Path, judge: Path, params: EditParams) -> Bench:
    from models.device import best_device, keep_freed
    from models.judges.judge import load_judge
    from models.networks.precision import in_precision
    from models.pipeline import load_pipeline
    from tasks.editing import subjects
    from tasks.editing.drafts import Drafts
    from tasks.editing.measuring import Bench
    from tasks.pictures.index import read_index
    from tasks.runtime import arithmetic

    keep_freed(device := best_device())
    arithmetic.check_precision("edit.precision", params.precision, device)
    with integrity.loading(pipeline, "afterimage.json", "train"):
        model = in_precision(load_pipeline(pipeline, device), params.precision)
    with integrity.loading(judge, "judge.json", "judge"):
        scoring = load_judge(judge, device)
    drafts = Drafts.of(dict(model.info.files), read_index(images).sha256, params.model_dump(mode="json"), device)
    return Bench(model, scoring, subjects.choose(images, model, params), params, drafts)


def _csv(columns: list[str], rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rounded(row) for row in rows)
    return text.getvalue()


def _rounded(values: Mapping[str, object]) -> dict[str, object]:
    """Round every number of a nested mapping to `DIGITS`."""
    rounded: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            rounded[name] = _rounded(value)
        else:
            rounded[name] = round(value, DIGITS) if isinstance(value, float) else value
    return rounded


def _draw(
    folder: Path,
    subjects: Subjects,
    swept: Sequence[tuple[Row, np.ndarray]],
    filled: Sequence[tuple[Row, np.ndarray]],
    params: EditParams,
) -> None:
    """Write the strip of strengths, one row for each image, and the fills, one row for each mask and way to fill it."""
    import numpy as np

    from models.images.pictures import save_png
    from tasks.editing.measuring import masked_of

    if swept:
        count = min(SHOWN_STRENGTHS, len(subjects.pixels))
        columns = np.stack([subjects.pixels[:count], *(images[:count] for _, images in swept)], axis=1)
        titles = ["given", *(f"{row['strength']:g}" for row, _ in swept)]
        save_png(_grid(columns, subjects.titles[:count], titles), folder / f"{STRENGTHS}.png")
    if filled:
        count = min(SHOWN_FILLS, len(subjects.pixels))
        rows, titles = [], []
        for kind in params.masks:
            of_kind = [(row, images) for row, images in filled if row["mask"] == kind]
            rows += [masked_of(kind, subjects.pixels, params.seed)[:count], *(images[:count] for _, images in of_kind)]
            titles += [f"{kind}: masked", *(str(row["fill"]) for row, _ in of_kind)]
        save_png(_grid(np.stack(rows), titles, None), folder / f"{FILLS}.png")


def _grid(images: np.ndarray, rows: list[str], columns: list[str] | None) -> Image.Image:
    """Arrange images uint8 [R, K, C, S, S] with titles; large ones are shrunk."""
    from models.images.pictures import grid, shrunk

    small = shrunk(images.reshape(-1, *images.shape[2:]), 2 * TILE_PIXELS)
    titles = rows if any(rows) else None
    return grid(small, images.shape[1], max(1, round(TILE_PIXELS / small.shape[-1])), titles, columns)


def _print(headline: Mapping[str, object], params: EditParams) -> None:
    if not params.enabled:
        print("edit: nothing to edit (edit.n_images 0, or neither edit.strengths nor edit.masks)")
        return
    for name, found in headline.items():
        print(f"edit: {name}: {json.dumps(_rounded(found) if isinstance(found, Mapping) else found)}")


if __name__ == "__main__":
    stage.main(edit)
