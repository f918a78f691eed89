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
HEADLINES = ("frechet_distance", "label_accuracy", "kid", "clip_score")
"""What one wants to see first, where it was measured."""
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
    present = [key for key in MEASURES if key in metrics]
    first = [key for key in (*HEADLINES, *present) if key in metrics]
    return {
        "metrics": [_row(key, metrics) for key in present],
        "headlines": [_headline(key, metrics) for key in list(dict.fromkeys(first))[: len(HEADLINES)]],
        "not_applicable": [
            (MEASURES[key][0] if key in MEASURES else key, reason)
            for key, reason in sorted(metrics["not_applicable"].items())
        ],
        "protocol": _protocol(metrics),
    }


def _protocol(metrics: dict[str, Any]) -> str:
    """How the numbers were drawn, in a sentence."""
    sampler = sampler_name(metrics["sampler"], metrics["steps"])
    sampler += f", η = {metrics['eta']:g}" if "eta" in metrics else ""
    drawn = f"Drawn with {sampler}, over {metrics['seed_blocks']} seed blocks"
    distances = f"{metrics['n_samples']} samples each, without guidance, for the distances"
    guided = f"{metrics['n_samples_accuracy']} with guidance {metrics['guidance_scale']:g} for accuracy and CLIP score"
    if "guidance_interval" in metrics:
        guided += " at noise levels σ from {:g} to {:g}".format(*metrics["guidance_interval"])
    return f"{drawn}: {distances}{', ' + guided if metrics['n_samples_accuracy'] else ''}."


def _row(key: str, metrics: dict[str, Any]) -> Metric:
    reference = _reference(key, metrics)
    name, reading = MEASURES[key]
    return Metric(
        name,
        _number(key, metrics[key]),
        _spread(key, key, metrics),
        f"{_number(key, metrics[reference])} {_spread(key, reference, metrics)}".strip() if reference else "",
        reading,
    )


def _headline(key: str, metrics: dict[str, Any]) -> Headline:
    reference = _reference(key, metrics)
    if reference is None:
        note = "no reference"
    elif key == "frechet_distance" and metrics[reference] > 0:
        note = f"{metrics[key] / metrics[reference]:.1f} times the floor of {_number(key, metrics[reference])}"
    else:
        note = f"real images: {_number(key, metrics[reference])}"
    return Headline(MEASURES[key][0], _number(key, metrics[key]), note)


def _reference(key: str, metrics: dict[str, Any]) -> str | None:
    """The entry that says what real images reach."""
    return next((name for name in (f"{key}_floor", f"{key}_real") if name in metrics), None)


def _spread(key: str, name: str, metrics: dict[str, Any]) -> str:
    if f"{name}_spread" not in metrics:
        return ""
    return f"± {_number(key, metrics[f'{name}_spread'], digits=2)}"


def _number(key: str, value: float, digits: int = 3) -> str:
    text = f"{100 * value:.1f} %" if key == "label_accuracy" else f"{value:.{digits}g}"
    return text.replace("-", "−")


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
