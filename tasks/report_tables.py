"""What `evaluate` measured -> the words and numbers of the report's tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tasks.report_page import Headline, Metric, Picture

MEASURES = {
    "frechet_distance": ("Fréchet distance", "distance between the distributions of features; lower is better"),
    "kid": ("KID", "kernel distance: the same question without assuming a Gaussian; lower is better"),
    "inception_style_score": ("Inception-style score", "clear and varied classes; higher is better"),
    "label_accuracy": ("Label accuracy", "share of the images in which the judge reads the label asked for"),
    "clip_score": ("CLIP score", "agreement of image and caption; higher is better"),
}
SAMPLER_COLUMNS = {
    "sampler": "Sampler",
    "steps": "Steps",
    "guidance_scale": "Guidance",
    "n": "n",
    "seed_blocks": "Blocks",
    "frechet_distance": "Fréchet",
    "kid": "KID",
    "inception_style_score": "Inception",
    "label_accuracy": "Accuracy",
    "clip_score": "CLIP",
}
SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler_ancestral": "Euler ancestral",
    "dpm_solver_pp_2m": "DPM-Solver++ 2M",
}


def sampler_name(sampler: str, steps: int) -> str:
    """For example "DDIM in 50 steps"."""
    return f"{SAMPLERS[sampler]} in {steps} steps"


def measures(metrics: dict[str, Any]) -> dict[str, Any]:
    """`metrics.json` -> the page's headlines, table of measures and what does not apply."""
    rows, headlines = [], []
    for key, (name, reading) in MEASURES.items():
        if key not in metrics:
            continue
        reference = metrics.get(f"{key}_floor", metrics.get(f"{key}_real"))
        rows.append(
            Metric(
                name,
                _number(key, metrics[key]),
                f"± {_number(key, metrics[f'{key}_spread'])}" if f"{key}_spread" in metrics else "",
                _number(key, reference) if reference is not None else "",
                reading,
            )
        )
        headlines.append(Headline(name, rows[-1].value, _beside(key, metrics[key], reference)))
    return {
        "metrics": rows,
        "headlines": headlines[:4],
        "not_applicable": [
            (MEASURES[key][0] if key in MEASURES else key, reason)
            for key, reason in sorted(metrics["not_applicable"].items())
        ],
        "protocol": _protocol(metrics),
    }


def _protocol(metrics: dict[str, Any]) -> str:
    """How the numbers were drawn, in a sentence."""
    drawn = (
        f"Drawn with {sampler_name(metrics['sampler'], metrics['steps'])}, over {metrics['seed_blocks']} seed blocks"
    )
    distances = f"{metrics['n_samples']} samples each, without guidance, for the distances"
    guided = f"{metrics['n_samples_accuracy']} with guidance {metrics['guidance_scale']:g} for accuracy and CLIP score"
    return f"{drawn}: {distances}{', ' + guided if metrics['n_samples_accuracy'] else ''}."


def _beside(key: str, value: float, reference: float | None) -> str:
    if reference is None:
        return "no reference"
    if key == "frechet_distance" and reference > 0:
        return f"{value / reference:.1f} times the floor of {_number(key, reference)}"
    return f"real images: {_number(key, reference)}"


def _number(key: str, value: float) -> str:
    return f"{100 * value:.1f} %" if key == "label_accuracy" else f"{value:.4g}"


def sampler_table(path: Path) -> dict[str, Any]:
    """`samplers.csv` -> the columns that hold anything, in the order of `SAMPLER_COLUMNS`, with readable
    names, and the rows' notes."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    keys = [key for key in SAMPLER_COLUMNS if any(row.get(key) for row in rows)]

    def cell(key: str, text: str) -> str:
        if key == "sampler":
            return SAMPLERS.get(text, text)
        if not text or key in ("steps", "n", "seed_blocks"):
            return text or "–"
        return _number(key, float(text))

    return {
        "sampler_columns": [SAMPLER_COLUMNS[key] for key in keys],
        "sampler_rows": [[cell(key, row[key]) for key in keys] for row in rows],
        "sampler_notes": [
            (sampler_name(row["sampler"], int(row["steps"])), row["note"]) for row in rows if row.get("note")
        ],
    }


def grids(evaluation: Path, metrics: dict[str, Any]) -> list[Picture]:
    """The grids that `evaluate` drew, the protocol's own first."""
    own = sampler_name(metrics["sampler"], metrics["steps"])
    captions = {
        "grid_unguided": f"{own}, without guidance",
        "grid_guided": f"{own}, guidance {metrics['guidance_scale']:g}",
        "grid_ddpm": "DDPM over all timesteps, without guidance",
    }
    return [
        Picture((evaluation / f"{name}.png").read_bytes(), caption, f"Grid of generated images: {caption}")
        for name, caption in captions.items()
        if (evaluation / f"{name}.png").exists()
    ]
