"""Stage `visualize`: pictures of the process as PNG files, and the report as one offline HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.formats.verdict import require_accepted
from tasks.params import ImageParams, VisualizeParams
from tasks.runtime import atomic, integrity, measures, stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.json_files import JsonObject
    from models.pipeline import Pipeline
    from tasks.report.animations import Animation
    from tasks.report.page import Figure, Tiles
    from tasks.report.plotting import Chart
    from tasks.report.process import Drawn
    from tasks.runtime.measures import Measurements

PREDICTIONS = {
    "epsilon": "noise ε",
    "sample": "clean image x₀",
    "v_prediction": "v",
    "flow_prediction": "velocity ε − x₀",
}


def visualize(
    pipeline: Path,
    images: Path,
    accepted: Path,
    validation: Path,
    training: Path,
    evaluation: Path,
    editing: Path,
    timing: Path,
    figures: Path,
    animations: Path,
    page: Path,
    timed: Path,
    params: VisualizeParams,
) -> None:
    """Draw the pictures of a trained model and join them in one offline page.

    Writes PNG files to the folder `figures`, WebP and MP4 files to `animations`, and the page to `page`. The pictures
    show samples by class, guidance and prompt, forward and reverse process, samples between two others, attention,
    noise schedules, training curves, quality against cost, and the nearest training images. The page adds the results
    of `validation`, the tables and grids of `evaluation`, and the tables and pictures of `editing`, which are copied to
    `figures`. Only the pictures in the folder `timed` depend on `timing`, so that a repeated evaluation gives the same
    page.
    """
    import pandas as pd

    from models.device import best_device, keep_freed
    from models.networks.precision import in_precision
    from models.pipeline import load_pipeline
    from tasks.pictures.images import load_pixels
    from tasks.report import charts, control, edits, noise_analysis, process, tables
    from tasks.report.page import Report, render
    from tasks.runtime import arithmetic

    require_accepted(accepted)
    keep_freed(device := best_device())
    arithmetic.check_precision("visualize.precision", params.precision, device)
    with integrity.loading(pipeline, "afterimage.json", "train"):
        model = in_precision(load_pipeline(pipeline, device), params.precision)
    image = ImageParams.model_validate({"resolution": model.info.size, "channels": model.info.channels})
    held_out = load_pixels(images, "test", image, process.held_out_rows)
    measured = measures.read(evaluation / measures.FILE)
    drawn = process.draw(model, params)
    tiles = {
        "samples": drawn.samples,
        "forward": process.forward(model, held_out, params.seed),
        "forward_by_schedule": process.forward_by_schedule(model, held_out, params.seed),
        "reverse": process.reverse(drawn.trajectory, drawn.names),
    }
    neighbours = process.neighbours(images, image, held_out, drawn)
    if neighbours:
        tiles["neighbours"] = neighbours.tiles
    schedules = noise_analysis.figure(model, process.known_paths(model), _trained(training), evaluation)
    training_chart = charts.training(pd.read_csv(training / "history.csv"))
    sampling = process.animation(model, drawn.trajectory, drawn.names)
    further = _further_figures(model, drawn, params, training, evaluation, measured.headline)
    edited = edits.chart_of(editing)
    with atomic.writing_folder(figures) as folder:
        pictured = further | {"schedules": schedules}
        _write_figures(folder, tiles, {"training": training_chart}, sampling, pictured)
        _copy_edits(editing, edited, folder)
        animation, still = ((folder / name).read_bytes() for name in ("denoising.png", "denoised.png"))
    _write_animations(animations, sampling, further)
    _write_timed(timed, evaluation, timing, measured.headline)
    sampler = tables.sampler_name(params.sampler, params.steps)
    report = Report(
        title=_title(model),
        facts=_facts(model, sampler),
        conditional=model.info.conditioning != "none",
        guidance=params.guidance if model.info.conditioning != "none" or set(params.guidance_scales) != {1.0} else None,
        prediction=model.info.prediction,
        min_snr_gamma=_min_snr_gamma(training),
        schedule=model.info.schedule,
        sampler=sampler,
        animation=animation,
        still=still,
        samples=tiles["samples"],
        forward=tiles["forward"],
        forward_by_schedule=tiles["forward_by_schedule"],
        reverse=tiles["reverse"],
        schedules=schedules,
        training_svg=training_chart.svg,
        progress=tables.progress(training / "samples"),
        data=tables.data(validation),
        codec=tables.codec(training / "codec"),
        reconstructions=tables.reconstructions(training / "codec"),
        neighbours=neighbours,
        measures=tables.measures(measured),
        tables=[*control.tables(measured), *tables.tables(evaluation, measured.headline)],
        evaluation_grids=tables.grids(evaluation, measured),
        figures=further,
        experiments=[section for section in (edits.section(editing, edited),) if section],
        provenance=_provenance(model, measured),
    )
    atomic.write_text(page, render(report))
    print(f"visualize: {page} shows {len(list(figures.iterdir()))} figures, also in {figures}")


def _further_figures(
    model: Pipeline, drawn: Drawn, params: VisualizeParams, training: Path, evaluation: Path, distance: str
) -> dict[str, Figure]:
    """Return the figures that have the same form in page and folder, by the name of their file."""
    from models.parallel import on_devices
    from tasks.report import attention, cost, interpolation, prompts, timelapse

    drawing: list[Callable[[str], dict[str, Figure]]] = [
        lambda device: prompts.figures(model.on(device), params),
        lambda device: interpolation.figures(model.on(device), drawn, params),
        lambda device: attention.figures(model.on(device), drawn),
    ]
    return {
        **{name: figure for figures in on_devices(drawing, model.device) for name, figure in figures.items()},
        **timelapse.figures(training),
        "quality_by_cost": cost.by_steps(evaluation, distance),
        "quality_by_guidance": cost.by_guidance(evaluation, distance),
    }


def _write_figures(
    folder: Path,
    tiles: dict[str, Tiles],
    charts: dict[str, Chart],
    sampling: Animation,
    further: dict[str, Figure],
) -> None:
    from models.images.pictures import save_png
    from tasks.report.process import save_tiles

    for name, table in (tiles | {name: figure.tiles for name, figure in further.items() if figure.tiles}).items():
        save_tiles(table, folder / f"{name}.png")
    for name, chart in (charts | {name: figure.chart for name, figure in further.items() if figure.chart}).items():
        (folder / f"{name}.png").write_bytes(chart.png)
    (folder / "denoising.png").write_bytes(sampling.png())
    save_png(sampling.still, folder / "denoised.png")


def _write_animations(animations: Path, sampling: Animation, further: dict[str, Figure]) -> None:
    """Write every animation as WebP and, if OpenCV has the encoder, as MP4."""
    from tasks.report.animations import save_mp4, save_webp

    moving = {"denoising": sampling} | {name: each.animation for name, each in further.items() if each.animation}
    with atomic.writing_folder(animations) as folder:
        for name, animation in moving.items():
            save_webp(animation, folder / f"{name}.webp")
        encoded = [save_mp4(animation, folder / f"{name}.mp4") for name, animation in moving.items()]
    if not all(encoded):
        print("visualize: this build of OpenCV has no MPEG-4 encoder, so there are no MP4 files beside the WebP ones")


def _write_timed(timed: Path, evaluation: Path, timing: Path, distance: str) -> None:
    """Write the pictures that depend on measured durations."""
    from tasks.report import cost

    chart = cost.by_seconds(evaluation, timing, distance)
    with atomic.writing_folder(timed) as folder:
        if chart:
            atomic.write_bytes(folder / "quality_by_seconds.png", chart)


def _copy_edits(editing: Path, chart: Chart | None, folder: Path) -> None:
    """Copy the pictures of `editing` and write its chart, each with a name that begins with "edits"."""
    for picture in sorted(editing.glob("*.png")):
        atomic.write_bytes(folder / f"edits_{picture.name}", picture.read_bytes())
    if chart:
        atomic.write_bytes(folder / "edits.png", chart.png)


def _title(model: Pipeline) -> str:
    kinds = {"none": "unconditional", "label": f"{len(model.info.classes)} classes", "text": "text-conditional"}
    kind = kinds[model.info.conditioning]
    colour = "grey" if model.info.channels == 1 else "colour"
    return f"A diffusion model of {model.info.size} × {model.info.size} {colour} images, {kind}"


def _facts(model: Pipeline, sampler: str) -> list[tuple[str, str]]:
    from models.networks.network import folder_name

    weights = sum(parameter.numel() for parameter in model.network.parameters())
    network = "U-Net" if folder_name(model.network.config) == "unet" else "Transformer"
    return [
        ("Network", f"{network}, {weights / 1e6:.2f} M parameters"),
        ("Images", f"{model.info.size} × {model.info.size}, {'grey' if model.info.channels == 1 else 'RGB'}"),
        *([("Latents", " × ".join(map(str, model.info.input_shape)))] if model.autoencoder else []),
        ("Conditioning", model.info.conditioning),
        ("Schedule", f"{model.info.schedule}, T = {model.info.timesteps}"),
        ("Prediction", PREDICTIONS[model.info.prediction]),
        ("Sampler", sampler),
    ]


def _trained(training: Path) -> JsonObject:
    """Return the parameters of the training run, by names such as "diffusion.schedule"."""
    return json.loads((training / "run.json").read_text(encoding="utf-8"))["params"]


def _min_snr_gamma(training: Path) -> float | None:
    trained = _trained(training)
    return float(trained["diffusion.min_snr_gamma"]) if trained["diffusion.loss_weighting"] == "min_snr" else None


def _provenance(model: Pipeline, measured: Measurements) -> list[tuple[str, str]]:
    """Return what identifies weights and measurement; without dates, so that equal inputs give equal bytes."""
    return [("Training key", model.info.train_key), ("Fingerprint of the measurement", measured.fingerprint)]


if __name__ == "__main__":
    stage.main(visualize)
