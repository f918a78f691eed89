"""The table of the project's goals, filled from the evaluation runs in MLflow.

    python -m tasks.goals [--out goals.md]

One row per goal, fingerprint (a way of measuring) and headline (`evaluate.headline`, the distance that leads): the run
with the smallest distance, of equals the latest. A goal without a run has a row without numbers.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.json_files import read_json
from tasks.params.redaction import redacted
from tasks.runtime import atomic, tracking
from tasks.runtime.errors import StageError
from tasks.runtime.markdown import escaped
from tasks.runtime.measures import draw_name
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

STABLE_DIFFUSION_SIDE = 512
"""Least resolution at which a text-to-image model on latents counts as the Stable Diffusion class."""
READING = (
    "FID is the Fréchet distance in the features of the named network. Values in features of a network that was "
    "trained on the same data (`classifier`, `clip`, `self_supervised`) cannot be compared with published ones. The "
    "floor is the distance between real training images and the same held-out images. Rows with different fingerprints "
    "or measures cannot be compared with each other."
)
DISTANCES = {"frechet_distance": "FID", "kid": "KID", "cmmd": "CMMD"}
"""Names in the table of the distances that `evaluate.headline` may be."""
USUAL = "frechet_distance"
"""The headline of runs of earlier versions, which have no parameter `headline`."""
FLOORS = ("eval/{}_floor", "{}_floor")
"""Names of the metric with the floor; runs of earlier versions have the second one."""
TABLE_COLUMNS = ("sampler", "steps", "clip_score", "seed_blocks", "n", "note")
"""Columns of `samplers.csv` that are read, besides the headline."""
NOT_RUN = "no run yet"
"""Note of a goal without a run."""
COLUMNS = {
    "goal": "Goal",
    "data": "Data",
    "resolution": "Resolution",
    "distance": "Distance",
    "measure": "Measure",
    "floor": "Floor",
    "clip_score": "CLIP score",
    "steps": "Steps",
    "seconds": "Seconds per image",
    "guidance": "Guidance",
    "n": "n",
    "features": "Features",
    "fingerprint": "Fingerprint",
    "note": "Note",
}


@dataclass(frozen=True)
class Row:
    """One row of an evaluation's table of samplers, whose numbers are text, with the properties of its run."""

    sampler: str
    steps: str
    guidance: str
    """Scale, and kind unless it is classifier-free guidance."""
    clip_score: str
    seed_blocks: str
    n: str
    note: str
    headline: str
    """Name of the distance."""
    distance: str
    """Empty if there were too few images."""
    data: str
    """Name of the dataset."""
    resolution: str
    kind: str
    """"pixels", "latents" or "stable diffusion"."""
    features: str
    """Feature extractor of the distances."""
    fingerprint: str
    floor: float | None
    seconds: float | None
    """Seconds per image."""


@dataclass(frozen=True)
class Goal:
    """A goal of the project: samplers, number of steps and kinds of model."""

    name: str
    steps: int
    samplers: tuple[str, ...]
    """Empty for any sampler."""
    kinds: tuple[str, ...]

    def is_met_by(self, row: Row) -> bool:
        """Whether a row was measured with a sampler, number of steps and kind of model of this goal."""
        fits = not self.samplers or row.sampler in self.samplers
        return fits and int(row.steps) == self.steps and row.kind in self.kinds


GOALS = (
    Goal("DDPM, 1000 steps", 1000, ("ddpm",), ("pixels",)),
    Goal("DDIM, 50 steps", 50, ("ddim",), ("pixels",)),
    Goal("Latent diffusion, 20 steps", 20, (), ("latents",)),
    Goal("Stable Diffusion class, 20 steps", 20, (), ("stable diffusion",)),
)


def goals(client: MlflowClient) -> list[dict[str, str]]:
    """Return the rows of the table, with the keys of `COLUMNS`, from the finished evaluation runs in MLflow."""
    filters = f"tags.`{tracking.KIND}` = 'evaluation' and attributes.status = 'FINISHED'"
    runs = client.search_runs([tracking.experiment_id(client)], filters, order_by=["start_time DESC"], max_results=1000)
    measured = [row for run in progress(runs, desc="goals", unit="run", delay=2) for row in _rows(client, run)]
    return [cells for goal in GOALS for cells in _best(goal, measured)]


def _rows(client: MlflowClient, run: Run) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        names = {file.path for file in client.list_artifacts(run.info.run_id, "evaluation")}
        if "evaluation/samplers.csv" not in names:
            return
        path = client.download_artifacts(run.info.run_id, "evaluation/samplers.csv", scratch)
        table = list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))
        seconds = _seconds_per_image(client, run.info.run_id, scratch)
    params = run.data.params
    headline = params.get("headline", USUAL)
    floors = (name.format(headline) for name in FLOORS)
    floor = next((run.data.metrics[name] for name in floors if name in run.data.metrics), None)
    for row in table:
        if row.get("weights"):  # not of the model itself
            continue
        # tables of earlier versions do not have these two columns
        eta, kind = float(row.get("eta") or 0), row.get("guidance")
        name = draw_name(row["sampler"], int(row["steps"]), float(row["guidance_scale"]), eta, kind)
        yield Row(
            **{column: row[column] for column in TABLE_COLUMNS},
            headline=headline,
            distance=row[headline],
            guidance=f"{row['guidance_scale']}, auto" if kind == "auto" else row["guidance_scale"],
            data=run.inputs.dataset_inputs[0].dataset.name if run.inputs and run.inputs.dataset_inputs else "",
            resolution=params.get("measurement.image.size", ""),
            kind=_kind(params),
            features=params.get("measurement.extractor", ""),
            fingerprint=params.get("fingerprint", ""),
            floor=floor,
            seconds=seconds.get(name),
        )


def _seconds_per_image(client: MlflowClient, run_id: str, scratch: str) -> dict[str, float]:
    """Seconds per image by the name of the draw; empty if the run has no timings."""
    if "evaluate.json" not in {file.path for file in client.list_artifacts(run_id)}:
        return {}
    path = client.download_artifacts(run_id, "evaluate.json", scratch)
    seconds: dict[str, float] = read_json(Path(path))["seconds_per_image"]
    return seconds


def _kind(params: dict[str, str]) -> str:
    """The kind of a model: "pixels", "latents" or "stable diffusion"."""
    if params.get("space", "pixels") == "pixels":
        return "pixels"
    large = int(params.get("measurement.image.size", 0)) >= STABLE_DIFFUSION_SIDE
    return "stable diffusion" if params.get("conditioning") == "text" and large else "latents"


def _best(goal: Goal, measured: list[Row]) -> Iterator[dict[str, str]]:
    """The cells of the best row of each fingerprint and headline, of equals the newest; without a row, no numbers."""
    of_goal = [row for row in measured if goal.is_met_by(row)]
    if not of_goal:
        yield dict.fromkeys(COLUMNS, "") | {"goal": goal.name, "note": NOT_RUN}
    for kind in sorted({(row.fingerprint, row.headline) for row in of_goal}):
        same = [row for row in of_goal if (row.fingerprint, row.headline) == kind]
        yield _cells(goal, min(same, key=lambda row: float(row.distance or "inf")))


def _cells(goal: Goal, row: Row) -> dict[str, str]:
    return {
        "goal": goal.name,
        "data": row.data,
        "resolution": row.resolution,
        "distance": _number(row.distance),
        "measure": DISTANCES[row.headline],
        "floor": _number(row.floor),
        "clip_score": _number(row.clip_score),
        "steps": row.steps,
        "seconds": _number(row.seconds, digits=2),
        "guidance": row.guidance,
        "n": f"{row.seed_blocks} x {row.n}" if row.seed_blocks != "1" else row.n,
        "features": row.features,
        "fingerprint": row.fingerprint[:8],
        "note": row.note,
    }


def _number(value: str | float | None, digits: int = 3) -> str:
    return "" if value in (None, "") else f"{float(value):.{digits}g}"


def markdown(rows: list[dict[str, str]]) -> str:
    """Return the table as Markdown, with an explanation of its columns."""
    lines = [f"| {' | '.join(COLUMNS.values())} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(escaped(row[key]) or '–' for key in COLUMNS)} |" for row in rows]
    return "\n".join([*lines, "", READING]) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.goals", description="The table of the project's goals, from the runs in MLflow."
    )
    parser.add_argument("--out", type=Path, help="write it to this Markdown file instead of the terminal")
    arguments = parser.parse_args()
    try:
        text = markdown(goals(tracking.connect()))
    except StageError as error:
        sys.exit(f"goals: error: {redacted(str(error))}")
    if arguments.out is None:
        print(text, end="")
    else:
        atomic.write_text(arguments.out, text)
        print(f"goals: wrote {arguments.out}")


if __name__ == "__main__":
    main()
