"""Where training spends its timesteps in log-SNR, and the measured error of the model there.

Legend: s = t / T in (0, 1), l = log SNR.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.noise.paths import DiffusionPath, error_scale
from models.noise.schedules import Array, log_snr
from tasks.report import charts
from tasks.report.page import Figure
from tasks.report.plotting import COLOURS, SERIES, line, render, title_axes

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

    from models.json_files import JsonObject
    from models.noise.paths import Path as NoisePath
    from models.pipeline import Pipeline

LEVELS = np.linspace(-13, 13, 261)
"""The log-SNRs at which densities are drawn."""
UNIFORM = "uniform"
LEVELS_TEXT = (
    "Training does not visit all noise levels equally often. The fourth chart shows how it spreads its timesteps over "
    "log SNR, which can be compared between schedules."
)
ERRORS_TEXT = (
    "The last chart shows the measured error of this model, and shaded behind it the density of its training, whose "
    "height has no unit there. The error of the clean image says how much of an image is unknown at a noise level."
)


@dataclass(frozen=True)
class Sampler:
    """The distribution of training timesteps, see `models.optimization.timesteps.Density`."""

    kind: str = UNIFORM
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    @staticmethod
    def of_run(params: JsonObject) -> Sampler:
        """Read it from the parameters in `reports/train/run.json`."""
        names = ("timestep_density", "density_mean", "density_std", "shift")
        kind, *numbers = (params.get(f"diffusion.{name}") for name in names)
        defaults = (0.0, 1.0, 1.0)
        return Sampler(kind or UNIFORM, *(d if n is None else float(n) for n, d in zip(numbers, defaults, strict=True)))


def density(path: NoisePath, sampler: Sampler, levels: Array = LEVELS) -> Array:
    """Return the density of training timesteps over log-SNR at `levels`, float64 [K]; 0 where the path has none.

    A density p(s) of the timesteps becomes p(s(l)) |ds / dl|, and `normal_log_snr` is a density over l itself. A
    diffusion path, whose timesteps are discrete, is interpolated between them.
    """
    moved = levels + 2 * math.log(sampler.shift)  # the shift moves every drawn log-SNR by -2 log(shift)
    if sampler.kind == "normal_log_snr":
        return _normal(moved, sampler.mean, sampler.std)
    s, slope = _share(path, moved)
    inside = (s > 0) & (s < 1)
    over_s = np.ones_like(s)
    if sampler.kind == "logit_normal":
        within = np.clip(s, 1e-12, 1 - 1e-12)
        over_s = _normal(np.log(within / (1 - within)), sampler.mean, sampler.std) / (within * (1 - within))
    return np.where(inside, over_s * slope, 0.0)


def _normal(x: Array, mean: float, std: float) -> Array:
    return np.asarray(np.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi)))


def _share(path: NoisePath, levels: Array) -> tuple[Array, Array]:
    """Return s and |ds / dl| at log-SNRs, float64 [K] each; s is 0 or 1 beyond the ends of a diffusion path."""
    if not isinstance(path, DiffusionPath):
        s = 1 / (1 + np.exp(levels / 2))
        return s, s * (1 - s) / 2
    own = log_snr(np.asarray(path.alpha_bar, dtype=np.float64))
    steps = (np.arange(len(own)) + 0.5) / len(own)
    known = np.isfinite(own)
    own, steps = own[known][::-1], steps[known][::-1]
    s = np.interp(levels, own, steps, left=1.0, right=0.0)
    return s, np.interp(levels, own, np.abs(np.gradient(steps, own)), left=0.0, right=0.0)


@dataclass(frozen=True)
class Errors:
    """The measured errors of the model over the timesteps, float64 [K] each, in the order of falling log-SNR."""

    log_snr: Array
    clean: Array
    """Mean squared error of the predicted clean image, values in [-1, 1]."""
    output: Array | None
    """The same as error of the network's output, which is the plain loss; None for a model of latents, whose clean
    images are compared after decoding."""


def measured(evaluation: Path, model: Pipeline) -> Errors | None:
    """Read the errors by timestep that `evaluate` measured; None without them."""
    file = evaluation / "timesteps.csv"
    if not file.exists():
        return None
    with file.open(encoding="utf-8", newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["squared_error"]]
    levels = [model.path.level(float(row["timestep"])) for row in rows]
    if not rows:
        return None
    clean = np.array([float(row["squared_error"]) for row in rows])
    output = None
    if model.autoencoder is None:
        scales = [error_scale(model.info.prediction, math.exp(each.log_snr), each.alpha, each.sigma) for each in levels]
        output = clean * np.array(scales)
    return Errors(np.array([each.log_snr for each in levels]), clean, output)


def figure(model: Pipeline, paths: Mapping[str, NoisePath], training: JsonObject, evaluation: Path) -> Figure:
    """Return the schedules, the density of the training's timesteps and the measured errors in one figure.

    Args:
        model: its own path is emphasised.
        paths: every path by the name of its schedule.
        training: parameters of the training run, by names such as "diffusion.schedule".
        evaluation: the folder with `timesteps.csv`.
    """
    own, sampler = model.info.schedule, Sampler.of_run(training)
    errors = measured(evaluation, model)
    own_density = density(model.path, sampler)
    others = {name: density(path, Sampler()) for name, path in paths.items()}

    def draw_density(axes: Axes) -> None:
        title_axes(axes, "share of the training per unit of log SNR", "log SNR (natural logarithm)")
        axes.fill_between(LEVELS, own_density, color=COLOURS["series-1"], alpha=0.18, linewidth=0)
        line(axes, LEVELS, own_density, 0, f"this run: {_name(sampler)}", bold=True)
        names = [name for name in paths if name != own or sampler.kind != UNIFORM][: len(SERIES) - 1]
        for series, name in enumerate(names, start=1):
            line(axes, LEVELS, others[name], series, f"{name}, uniform", bold=False)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")

    def draw_errors(axes: Axes) -> None:
        assert errors is not None
        title_axes(axes, "mean squared error on held-out images", "log SNR (natural logarithm)")
        line(axes, errors.log_snr, errors.clean, 1, "clean image", bold=True, marker="o")
        if errors.output is not None and model.info.prediction != "sample":
            line(axes, errors.log_snr, errors.output, 2, "network's output (the loss)", bold=True, marker="s")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        height = own_density / own_density.max()
        axes.fill_between(
            LEVELS,
            low,
            low * (high / low) ** (0.9 * height),
            color=COLOURS["series-1"],
            alpha=0.18,
            linewidth=0,
            label="where training spends its timesteps",
        )
        axes.set_ylim(low, high * (high / low) ** 0.35)
        axes.legend(loc="upper right")

    panels: list[Callable[[Axes], None]] = [
        *charts.schedule_panels({name: charts.path_curves(path) for name, path in paths.items()}, own),
        draw_density,
        *([draw_errors] if errors else []),
    ]
    widths = [3.5, 3.5, 3.5, *[5.25] * (len(panels) - 3)]
    text = [f"{LEVELS_TEXT} This run draws them {_sentence(sampler)}."]
    if errors:
        text.append(ERRORS_TEXT)
    else:
        text.append("Errors by timestep were not measured (reports/evaluation has no timesteps.csv).")
    label = (
        "Three line charts over the timestep for each noise schedule and rectified flow: beta, the remaining signal, "
        f"and log signal-to-noise ratio; {own} is emphasised. Over log SNR: the density of the training's timesteps"
        + (", and the measured error." if errors else ".")
    )
    chart = render(panels, widths, "schedules", rows=2)
    return Figure("Noise schedules", text, label=label, chart=chart)


def _name(sampler: Sampler) -> str:
    return sampler.kind.replace("_", "-")


def _sentence(sampler: Sampler) -> str:
    kinds = {
        UNIFORM: "uniformly over t",
        "logit_normal": f"as t/T = sigmoid(z), z normal with mean {sampler.mean:g} and deviation {sampler.std:g}",
        "normal_log_snr": f"with a normal log SNR of mean {sampler.mean:g} and deviation {sampler.std:g}",
    }
    moved = f", shifted by the factor {sampler.shift:g}" if sampler.shift != 1 else ""
    return kinds.get(sampler.kind, sampler.kind) + moved
