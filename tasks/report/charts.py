"""Line charts of the report: schedules, training curves, sweeps of guidance, averages, steps and strengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from models.noise.paths import DiffusionPath
from models.noise.schedules import log_snr
from tasks.report.plotting import COLOURS, DASHES, Chart, line, render, title_axes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from models.noise.paths import Path as NoisePath
    from models.noise.schedules import Array


def path_curves(path: NoisePath) -> dict[str, Array]:
    """Return `signal` (its share of the variance) and `log_snr` by timestep, and for a diffusion path `beta`.

    Each is float64 [T]. A rectified flow, which has no betas, is taken at t = 1..T.
    """
    if isinstance(path, DiffusionPath):
        levels = np.asarray(path.alpha_bar)
        beta = 1 - levels / np.concatenate([[1.0], levels[:-1]])
        return {"beta": beta, "signal": levels, "log_snr": log_snr(levels)}
    flow = [path.level(t) for t in range(1, path.timesteps + 1)]
    return {
        "signal": np.array([level.signal for level in flow]),
        "log_snr": np.array([level.log_snr for level in flow]),
    }


def schedule_panels(curves: dict[str, dict[str, Array]], own: str) -> list[Callable[[Axes], None]]:
    """Return the panels of beta, the signal's share and log-SNR over the timestep; the model's `own` is emphasised.

    curves: schedule -> result of `path_curves`.
    """
    panels = (
        ("beta", r"noise added per step, $\beta_t$"),
        ("signal", r"signal left, $\alpha_t^2/(\alpha_t^2+\sigma_t^2)$"),
        ("log_snr", r"log signal-to-noise, $\log\,\alpha_t^2/\sigma_t^2$"),
    )

    ordered = sorted(curves, key=lambda name: name != own)

    def panel(quantity: str, title: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            title_axes(axes, title, "timestep t")
            for series, name in enumerate(ordered):
                label = f"{name} (this model)" if name == own else name
                if quantity in curves[name]:
                    values = curves[name][quantity]
                    line(axes, range(len(values)), values, series, label, bold=name == own)
            if quantity == "beta":
                axes.set_yscale("log")
            if quantity == "signal":
                axes.legend(loc="best")

        return draw

    return [panel(*which) for which in panels]


def training(history: pd.DataFrame) -> Chart:
    """Draw the losses (logarithmic) and the learning rate over the training step.

    history: columns `step`, `loss`, `learning_rate` and, if it was measured, `held_out_loss` (NaN between
    measurements). The training loss is shown with its running mean over a twentieth of the run.
    """

    def draw_losses(losses: Axes) -> None:
        title_axes(losses, "loss", "step")
        logged = history.dropna(subset=["loss"])
        losses.plot(logged["step"], logged["loss"], color=COLOURS["series-1"], alpha=0.3, linewidth=1)
        smooth = logged["loss"].rolling(max(1, len(logged) // 20), min_periods=1).mean()
        line(losses, logged["step"], smooth, 0, "training, running mean", bold=True)
        if "held_out_loss" in history and history["held_out_loss"].notna().any():
            measured = history.dropna(subset=["held_out_loss"])
            line(losses, measured["step"], measured["held_out_loss"], 1, "held-out", bold=True, marker="o")
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_minor_formatter(NullFormatter())
        losses.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        losses.legend(loc="upper right")

    def draw_rate(rate: Axes) -> None:
        title_axes(rate, "learning rate", "step")
        timed = history.dropna(subset=["learning_rate"])
        line(rate, timed["step"], timed["learning_rate"], 0, None, bold=True)
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    return render([draw_losses, draw_rate], widths=(6.5, 3.9), salt="training")


def guidance(curves: Mapping[str, Sequence[tuple[float, float, float]]], distance: str, x_label: str) -> Chart:
    """Draw the curves of a guidance sweep, one for each kind of guidance.

    curves: name of the kind -> (x, distance, guidance scale) points; x is the CLIP score or the accuracy, or for an
    unconditional model the scale. `distance` and `x_label` are the titles of the two measures.
    """

    def draw(axes: Axes) -> None:
        title_axes(axes, distance, x_label)
        for series, (name, points) in enumerate(curves.items()):
            x, y = [point[0] for point in points], [point[1] for point in points]
            line(axes, x, y, series, name, bold=True, marker="o")
            for agreed, height, scale in points:
                axes.annotate(f"w = {scale:g}", (agreed, height), (5, 5), textcoords="offset points", fontsize=8.5)
        axes.margins(x=0.12, y=0.18)
        if len(curves) > 1:
            axes.legend(loc="best")

    return render([draw], widths=(7.2,), salt="guidance")


def widths(rows: Sequence[tuple[float, float, float]], distance: str, floor: float) -> Chart:
    """Draw distance and held-out loss over the width of an average, from (width, distance, held-out loss) rows.

    `distance` is the title of the measure; its `floor` is a horizontal line.
    """
    x = [row[0] for row in rows]

    def draw_distance(axes: Axes) -> None:
        title_axes(axes, distance, "relative width of the average")
        line(axes, x, [row[1] for row in rows], 0, None, bold=True, marker="o")
        axes.axhline(floor, color=COLOURS["muted"], linewidth=1, linestyle=DASHES[1])
        axes.annotate("floor", (x[-1], floor), (0, 4), textcoords="offset points", fontsize=8.5, ha="right")

    def draw_loss(axes: Axes) -> None:
        title_axes(axes, "held-out loss", "relative width of the average")
        line(axes, x, [row[2] for row in rows], 1, None, bold=True, marker="o")

    return render([draw_distance, draw_loss], widths=(5.2, 5.2), salt="widths")


def few_steps(lines: Mapping[str, Sequence[tuple[int, float]]], distance: str) -> Chart:
    """Draw a line through the (sampling steps, distance) points of each model, by its name."""

    def draw(axes: Axes) -> None:
        title_axes(axes, distance, "sampling steps")
        for series, (name, points) in enumerate(lines.items()):
            line(axes, [steps for steps, _ in points], [value for _, value in points], series, name, True, marker="o")
        axes.set_xscale("log")
        shown = sorted({steps for points in lines.values() for steps, _ in points})
        axes.set_xticks(shown, [str(steps) for steps in shown])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")

    return render([draw], widths=(7.2,), salt="few-steps")


def strengths(x: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Chart:
    """Draw the panels, title -> name of a line -> values, over the strength of image-to-image."""

    def panel(title: str, lines: Mapping[str, Sequence[float]]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            title_axes(axes, title, "strength")
            for series, (name, values) in enumerate(lines.items()):
                line(axes, x, values, series, name or None, bold=True, marker="o")
            axes.set_ylim(bottom=0)
            if len(lines) > 1:
                axes.legend(loc="best")

        return draw

    drawn = [panel(title, lines) for title, lines in panels.items()]
    return render(drawn, widths=[3.5] * len(drawn), salt="strengths")
