"""Stage `visualize`: pictures of the process as PNG files, and the report as one offline HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.formats.verdict import require_accepted
from tasks.params import ImageParams, VisualizeParams
from tasks.runtime import atomic, integrity, measures, stage

if TYPE_CHECKING:
    from models.pipeline import Pipeline
    from tasks.report.charts import Chart
    from tasks.report.page import Tiles
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
    figures: Path,
    page: Path,
    params: VisualizeParams,
) -> None:
    """Draw the pictures of a trained model and join them in one offline page.

    Writes PNG files to the folder `figures` and the page to `page`. The pictures show samples by class and guidance,
    forward and reverse process, noise schedules, an animation of the sampling, training curves, and the nearest
    training images. The page adds the results of `validation`, the tables and grids of `evaluation`, and the tables and
    pictures of `editing`, which are copied to `figures`.
    """
    from models.device import best_device
    from models.pipeline import load_pipeline
    from tasks.pictures.images import load_pixels
    from tasks.report import control, edits, process, tables
    from tasks.report.page import Report, render

    require_accepted(accepted)
    with integrity.loading(pipeline, "afterimage.json", "train"):
        model = load_pipeline(pipeline, best_device())
    image = ImageParams.model_validate({"resolution": model.info.size, "channels": model.info.channels})
    held_out = load_pixels(images, "test", image)
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
    schedules_chart, training_chart = _charts(model, training)
    measured = measures.read(evaluation / measures.FILE)
    with atomic.writing_folder(figures) as folder:
        _write_figures(folder, tiles, {"schedules": schedules_chart, "training": training_chart}, drawn)
        _copy_edits(editing, folder)
        animation, still = ((folder / name).read_bytes() for name in ("denoising.png", "denoised.png"))
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
        schedules_svg=schedules_chart.svg,
        training_svg=training_chart.svg,
        progress=tables.progress(training / "samples"),
        data=tables.data(validation),
        codec=tables.codec(training / "codec"),
        reconstructions=tables.reconstructions(training / "codec"),
        neighbours=neighbours,
        measures=tables.measures(measured),
        tables=[*control.tables(measured), *tables.tables(evaluation, measured.headline)],
        evaluation_grids=tables.grids(evaluation, measured),
        experiments=[section for section in (edits.section(editing),) if section],
        provenance=_provenance(model, measured),
    )
    atomic.write_text(page, render(report))
    print(f"visualize: {page} shows {len(list(figures.iterdir()))} figures, also in {figures}")


def _charts(model: Pipeline, training: Path) -> tuple[Chart, Chart]:
    """Return the charts of the noise schedules and of the training curves."""
    import pandas as pd

    from tasks.report import charts
    from tasks.report.process import known_paths

    curves = {name: charts.path_curves(path) for name, path in known_paths(model).items()}
    return charts.schedules(curves, model.info.schedule), charts.training(pd.read_csv(training / "history.csv"))


def _write_figures(folder: Path, tiles: dict[str, Tiles], charts: dict[str, Chart], drawn: Drawn) -> None:
    from models.images.pictures import save_animation, save_png
    from tasks.report.process import animation, save_tiles

    for name, table in tiles.items():
        save_tiles(table, folder / f"{name}.png")
    for name, chart in charts.items():
        (folder / f"{name}.png").write_bytes(chart.png)
    frames = animation(drawn.trajectory, drawn.names)
    save_animation(frames, folder / "denoising.png")
    save_png(frames[-1], folder / "denoised.png")


def _copy_edits(editing: Path, folder: Path) -> None:
    """Copy the pictures of `editing` and draw its chart, each with a name that begins with "edits"."""
    from tasks.report import edits

    for picture in sorted(editing.glob("*.png")):
        atomic.write_bytes(folder / f"edits_{picture.name}", picture.read_bytes())
    if chart := edits.chart_png(editing):
        atomic.write_bytes(folder / "edits.png", chart)


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


def _min_snr_gamma(training: Path) -> float | None:
    trained = json.loads((training / "run.json").read_text(encoding="utf-8"))["params"]
    return float(trained["diffusion.min_snr_gamma"]) if trained["diffusion.loss_weighting"] == "min_snr" else None


def _provenance(model: Pipeline, measured: Measurements) -> list[tuple[str, str]]:
    """Return what identifies weights and measurement; without dates, so that equal inputs give equal bytes."""
    return [("Training key", model.info.train_key), ("Fingerprint of the measurement", measured.fingerprint)]


if __name__ == "__main__":
    stage.main(visualize)
