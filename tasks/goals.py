"""The table of the project's goals, filled from the evaluation runs in MLflow.

    python -m tasks.goals [--out goals.md]

One row for each goal and each way of measuring (its fingerprint): the run with the smallest distance, the latest of
equals. A goal that no run has reached stands there without numbers.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.runtime import atomic, tracking
from tasks.runtime.markdown import escaped
from tasks.runtime.measures import draw_name
from tasks.runtime.redaction import redacted
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

STABLE_DIFFUSION_SIDE = 512
"""Text to image in latents, from this resolution on, is called the Stable Diffusion class."""
READING = (
    "FID is the Fréchet distance in the features named; those of a network trained on the data itself (`classifier`, "
    "`clip`, `self_supervised`) do not compare with published values. The floor is the distance of real training "
    "images to the same held-out ones. Rows with different fingerprints were measured differently."
)
FLOORS = ("eval/frechet_distance_floor", "frechet_distance_floor")
"""The metric that holds the floor; runs of earlier versions have the second name."""
COLUMNS = {
    "goal": "Goal",
    "data": "Data",
    "resolution": "Resolution",
    "fid": "FID",
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
class Goal:
    """A row of the table: which sampler, how many steps, which kind of model."""

    name: str
    steps: int
    samplers: tuple[str, ...]
    """Any sampler where it is empty."""
    kinds: tuple[str, ...]

    def is_met_by(self, row: dict[str, Any]) -> bool:
        """Whether a row of an evaluation's table of samplers is of this goal."""
        fits = not self.samplers or row["sampler"] in self.samplers
        return fits and int(row["steps"]) == self.steps and row["kind"] in self.kinds


GOALS = (
    Goal("DDPM, 1000 steps", 1000, ("ddpm",), ("pixels",)),
    Goal("DDIM, 50 steps", 50, ("ddim",), ("pixels",)),
    Goal("Latent diffusion, 20 steps", 20, (), ("latents",)),
    Goal("Stable Diffusion class, 20 steps", 20, (), ("stable diffusion",)),
)


def goals(client: MlflowClient) -> list[dict[str, str]]:
    """The rows of the table, by `COLUMNS`, from the finished evaluation runs of this project."""
    filters = f"tags.`{tracking.KIND}` = 'evaluation' and attributes.status = 'FINISHED'"
    runs = client.search_runs([tracking.experiment_id(client)], filters, order_by=["start_time DESC"], max_results=1000)
    measured = [row for run in tqdm(runs, "goals", unit="run", delay=2) for row in _rows(client, run)]
    return [cells for goal in GOALS for cells in _best(goal, measured)]


def _rows(client: MlflowClient, run: Run) -> Iterator[dict[str, Any]]:
    """The rows of one run's table of samplers, each with what the run says of model, measurement and speed."""
    with tempfile.TemporaryDirectory() as scratch:
        names = {file.path for file in client.list_artifacts(run.info.run_id, "evaluation")}
        if "evaluation/samplers.csv" not in names:
            return
        path = client.download_artifacts(run.info.run_id, "evaluation/samplers.csv", scratch)
        table = list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))
        seconds = _seconds_per_image(client, run.info.run_id, scratch)
    told = run.data.params
    common = {
        "data": run.inputs.dataset_inputs[0].dataset.name if run.inputs and run.inputs.dataset_inputs else "",
        "resolution": told.get("measurement.image.size", ""),
        "kind": _kind(told),
        "features": told.get("measurement.extractor", ""),
        "fingerprint": told.get("fingerprint", ""),
        "floor": next((run.data.metrics[name] for name in FLOORS if name in run.data.metrics), None),
    }
    for row in table:
        eta = float(row.get("eta") or 0)  # tables of earlier versions have no such column
        name = draw_name(row["sampler"], int(row["steps"]), float(row["guidance_scale"]), eta)
        yield {**row, **common, "seconds": seconds.get(name)}


def _seconds_per_image(client: MlflowClient, run_id: str, scratch: str) -> dict[str, float]:
    if "evaluate.json" not in {file.path for file in client.list_artifacts(run_id)}:
        return {}
    path = client.download_artifacts(run_id, "evaluate.json", scratch)
    return json.loads(Path(path).read_text(encoding="utf-8"))["seconds_per_image"]


def _kind(told: dict[str, str]) -> str:
    """What a model is, for the goals: pixels, latents, or of the Stable Diffusion class."""
    if told.get("space", "pixels") == "pixels":
        return "pixels"
    large = int(told.get("measurement.image.size", 0)) >= STABLE_DIFFUSION_SIDE
    return "stable diffusion" if told.get("conditioning") == "text" and large else "latents"


def _best(goal: Goal, measured: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """The best row of each fingerprint, the newest first of equals; a row without numbers where there is none."""
    of_goal = [row for row in measured if goal.is_met_by(row)]
    if not of_goal:
        yield dict.fromkeys(COLUMNS, "") | {"goal": goal.name, "note": "no run yet"}
    for fingerprint in sorted({row["fingerprint"] for row in of_goal}):
        same = [row for row in of_goal if row["fingerprint"] == fingerprint]
        yield _cells(goal, min(same, key=lambda row: float(row["frechet_distance"] or "inf")))


def _cells(goal: Goal, row: dict[str, Any]) -> dict[str, str]:
    return {
        "goal": goal.name,
        "data": row["data"],
        "resolution": row["resolution"],
        "fid": _number(row["frechet_distance"]),
        "floor": _number(row["floor"]),
        "clip_score": _number(row["clip_score"]),
        "steps": row["steps"],
        "seconds": _number(row["seconds"], digits=2),
        "guidance": row["guidance_scale"],
        "n": f"{row['seed_blocks']} x {row['n']}" if row["seed_blocks"] != "1" else row["n"],
        "features": row["features"],
        "fingerprint": row["fingerprint"][:8],
        "note": row["note"],
    }


def _number(value: Any, digits: int = 3) -> str:
    return "" if value in (None, "") else f"{float(value):.{digits}g}"


def markdown(rows: list[dict[str, str]]) -> str:
    """The table as Markdown, with what a reader must know to read it."""
    lines = [f"| {' | '.join(COLUMNS.values())} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(escaped(row[key]) or '–' for key in COLUMNS)} |" for row in rows]
    return "\n".join([*lines, "", READING]) + "\n"


def main() -> None:
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
