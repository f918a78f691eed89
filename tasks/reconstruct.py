"""Averages of other widths, reconstructed after training (post-hoc EMA, Karras et al. 2024).

    python -m tasks.reconstruct [--widths 0.03 0.07] [--blocks 1]
    python -m tasks.reconstruct --width 0.07 --out FOLDER

The first form measures the held-out loss and the distance of each width, prints a table and writes
reports/reconstruct.json and reports/reconstruct.png. The second writes a pipeline with one of them. Both need the
outputs of a finished chain in this folder; `train.ema_snapshots` must be above 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.params import ParamsError, load
from tasks.params.redaction import redacted
from tasks.runtime import atomic
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.posthoc_ema import Combination
    from tasks.formats.averages import Averages
    from tasks.reconstruction.sweep import Row

PIPELINE, AVERAGES, CODEC, JUDGE = (Path("outputs") / name for name in ("pipeline", "averages", "codec", "judge"))
IMAGES, LATENTS, ACCEPTED = Path("data/images"), Path("data/latents"), Path("data/accepted.json")
TRAINING, EVALUATION = Path("reports/train"), Path("reports/evaluation")
JSON, PICTURE = Path("reports/reconstruct.json"), Path("reports/reconstruct.png")
WIDTHS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.10, 0.12, 0.15, 0.20)
"""Widths of the sweep; those that the snapshots do not reach are left out."""


def measure(widths: Sequence[float] | None, blocks: int) -> None:
    """Measure the widths, or those of `WIDTHS` in reach; print a table, and write `JSON` and `PICTURE`."""
    from models.device import best_device
    from models.judges.judge import load_judge
    from models.pipeline import load_pipeline
    from tasks.evaluation.protocol import FILE, Protocol
    from tasks.evaluation.scorer import Scorer
    from tasks.reconstruction import sweep
    from tasks.report import charts, tables
    from tasks.runtime import integrity
    from tasks.runtime.progress import progress

    params, kept = load(), _kept()
    chosen = _chosen(kept, widths)
    with integrity.loading(PIPELINE, "afterimage.json", "train"):
        pipeline = load_pipeline(PIPELINE, best_device())
    run = sweep.assemble(LATENTS, CODEC, ACCEPTED, TRAINING, pipeline, params)
    with integrity.loading(JUDGE, "judge.json", "judge"):
        judge = load_judge(JUDGE, best_device())
    protocol = Protocol.read(EVALUATION / FILE)
    swept = sweep.sweep(run, pipeline, Scorer(IMAGES, judge, protocol), protocol, blocks)
    rows = list(progress(swept.rows(AVERAGES, kept, chosen), desc="reconstruct", unit="width", total=len(chosen)))
    floors, headline = swept.floors(), protocol.headline
    atomic.write_json(
        JSON,
        {
            "train_key": kept.train_key,
            "fingerprint": protocol.fingerprint,
            "seed_blocks": blocks,
            "headline": headline,
            "floors": floors,
            "rows": [sweep.to_json(row) for row in rows],
        },
    )
    points = [(row.width, row.distances[headline], row.held_out_loss) for row in rows]
    atomic.write_bytes(PICTURE, charts.widths(points, tables.MEASURES[headline][0], floors[headline]).png)
    print(table(rows, headline, floors[headline], params.train.pipeline_ema), end="")
    print(f"reconstruct: wrote {JSON} and {PICTURE}")


def table(rows: Sequence[Row], headline: str, floor: float, pipeline_ema: str) -> str:
    """Return the table of the widths as text; the row with the smallest distance has a star."""
    best = min(rows, key=lambda row: row.distances[headline])
    lines = [f"{'width':<10}{'profile error':>14}{'held-out loss':>15}{headline:>18}"]
    kind, _, number = pipeline_ema.partition("-")
    for row in rows:
        marks = " *" if row is best else ""
        marks += " (the pipeline)" if kind == "std" and float(number) == row.width else ""
        cells = f"{row.width:<10g}{row.profile_error:>13.2%} {row.held_out_loss:>15.5f}{row.distances[headline]:>18.4g}"
        lines.append(cells + marks)
    return "\n".join([*lines, f"{'floor':<39}{floor:>18.4g}"]) + "\n"


def write(width: float, folder: Path) -> None:
    """Write a pipeline with the average of relative width `width` into `folder`, which must not exist."""
    from tasks.reconstruction import weights
    from tasks.runtime import integrity

    if folder.exists():
        raise StageError(f"{folder} exists; give --out the name of a new folder")
    kept = _kept()
    combination = weights.in_reach(kept, width)
    integrity.read_described(PIPELINE, "afterimage.json", "train")
    plain, adapter = weights.combined(AVERAGES, kept, combination)
    with atomic.writing_folder(folder) as temporary:
        weights.save_with_weights(temporary, PIPELINE, plain, adapter)
    print(f"reconstruct: wrote {folder}, the average of width {width:g} (profile error {combination.error:.2%})")


def _chosen(kept: Averages, widths: Sequence[float] | None) -> dict[float, Combination]:
    """Return the combination of each of the given widths, or of those of `WIDTHS` that are in reach."""
    from tasks.reconstruction import weights

    if widths is not None:
        return {width: weights.in_reach(kept, width) for width in sorted(set(widths))}
    every = {width: weights.approximate(kept, width) for width in WIDTHS}
    reached = {width: combination for width, combination in every.items() if combination.error <= weights.MAX_ERROR}
    if not reached:
        raise StageError("none of the usual widths is in reach of the snapshots; name others with --widths")
    return reached


def _kept() -> Averages:
    """Read what describes the snapshots, and compare it with the pipeline."""
    from models.pipeline import INFO, PipelineInfo
    from tasks.reconstruction import weights
    from tasks.runtime import integrity

    kept = weights.open_averages(AVERAGES)
    if integrity.read_description(PipelineInfo, PIPELINE / INFO, "train").train_key != kept.train_key:
        raise StageError(f"{AVERAGES} and {PIPELINE} are of different trainings; run 'dvc repro train'")
    return kept


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.reconstruct",
        description=(__doc__ or "").partition("\n")[0],
        epilog="Without --width, each width is measured: reports/reconstruct.json, reports/reconstruct.png.",
    )
    parser.add_argument("--widths", type=float, nargs="+", metavar="STD", help="widths to measure")
    parser.add_argument("--blocks", type=int, default=1, help="seed blocks of the protocol to measure with; default 1")
    parser.add_argument("--width", type=float, metavar="STD", help="write the average of this width to --out")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new folder for the pipeline")
    given = parser.parse_args()
    if (given.width is None) != (given.out is None):
        parser.error("--width and --out belong together")
    try:
        if given.width is None:
            measure(given.widths, given.blocks)
        else:
            write(given.width, given.out)
    except (StageError, ParamsError) as error:
        sys.exit(f"reconstruct: error: {redacted(str(error))}")


if __name__ == "__main__":
    main()
