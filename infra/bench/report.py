"""The report of `bench.json`: tables in `bench.md`, and a CSV and a PNG of each curve in `bench/`."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from matplotlib.figure import Figure

from tasks.report.plotting import COLOURS
from tasks.runtime import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from infra.bench import schema
    from models.json_files import JsonObject

PRECISION = {"no": "float32", "tf32": "TF32", "bf16": "bfloat16", "fp16": "float16"}
NAMES = {"dpm_solver_pp_2m": "DPM-Solver++ (2M)", "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "heun": "Heun"}
REFERENCE = (
    "The reference is the loop that diffusers documents for unconditional training (`train_unconditional.py`): "
    "`UNet2DModel`, `DDPMScheduler.add_noise`, `EMAModel`, AdamW, a DataLoader over image files."
)
DISTANCE = "A distance is the Frechet distance to the held-out images in the features of the project's judge"


Rows: TypeAlias = Sequence[Mapping[str, object]]
Draw: TypeAlias = "Callable[[Axes], None]"
Made: TypeAlias = "tuple[str, Rows, Draw | None]"
"""A table in Markdown, the rows of the CSV, and the function that draws the chart."""


def write(folder: Path, parts: Mapping[str, schema.Part]) -> None:
    """Write the report of the parts measured so far."""
    # Each function reads the keys of its own part, which the name of the part selects.
    makers: dict[str, Callable[[Any], Made]] = {
        "throughput": _throughput,
        "quality": _quality,
        "levers": _levers,
        "sampling": _sampling,
        "startup": _startup,
        "encoding": _encoding,
    }
    details = folder / "bench"
    texts = []
    for name, part in sorted(parts.items()):
        kind = name.partition("_")[0]
        table, rows, draw = makers[kind](part)
        machine = part["machine"]
        texts.append(
            f"## {name.replace('_', ', ')}\n\n{_about(kind, part)}\n\n{table}\n\n"
            f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, load {part['load'][0]} before and "
            f"{part['load'][1]} after, torch {machine['torch']}.\n"
        )
        if rows:
            atomic.write_text(details / f"{name}.csv", csv_text(rows))
        if draw:
            atomic.write_bytes(details / f"{name}.png", _picture(draw))
    atomic.write_text(folder / "bench.md", "# Benchmarks\n\n" + "\n".join(texts))


def csv_text(rows: Rows) -> str:
    """CSV of rows with equal keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _about(kind: str, part: schema.Part) -> str:
    """What was measured, and how to read the numbers."""
    given = cast("JsonObject", part["arguments"])  # the Plan of the part as JSON
    how = given.get("measure", {})
    drawn = f"{DISTANCE}, of {how.get('samples')} images drawn in {how.get('sampler_steps')} network evaluations each"
    best = f"by {' or '.join(NAMES.get(name, name) for name in how.get('samplers', []))}, whichever is smaller"
    labels = "without labels, as the reference" if "conditioning=none" in given.get("overrides", []) else "with labels"
    return {
        "throughput": (
            f"Training images per second with the same images and the same network. {REFERENCE} The sides alternate "
            f"in {given.get('rounds')} rounds, each in a process of its own; a ratio is the median over the rounds of "
            "ours divided by the reference's, above 1 is faster. By CPU time it is the ratio of images per CPU second, "
            "which other load of the machine does not affect. As they come: the reference with its default batch size "
            "in float32, ours as its preset says. Of ceiling: operations per second of our training, relative to a "
            "large matrix product in the same precision."
        ),
        "quality": (
            f"Seconds of training until the distance of the samples is that of the reference at the end of its run. "
            f"{REFERENCE} It trains in float32 without labels; ours by its preset {labels}. {drawn} "
            f"{best}; sampling is not timed. A ratio is ours divided by the reference's, below 1 is faster."
        ),
        "levers": (
            f"The recipe of the preset {given.get('preset')} with one choice changed at a time, seeds of each: "
            f"{given.get('seeds')}. {drawn} {best}: mean and standard deviation over the seeds."
        ),
        "sampling": (
            f"One trained model of the digits with each sampler. {DISTANCE}, of {given.get('samples')} images; "
            "the floor is that of as many training images."
        ),
        "startup": "From the command to its help, and to its first checkpoint, which is saved after one step.",
        "encoding": (
            "A training step on latents and embeddings that `encode` has stored (stored), one that encodes files and "
            "captions itself, as diffusers' `train_text_to_image.py` does (online: decode, resize, tokenize, encode; "
            "bilinear, in the training process), and one with decoded images and tokens; the same samples in turns. "
            "Ratios are relative to stored; after the break-even epoch, encoding once has cost less than it saved."
        ),
    }[kind]


def _throughput(part: schema.ThroughputPart) -> Made:
    titles = [
        "network",
        "parameters",
        "compared",
        "precision",
        "reference img/s",
        "ours img/s",
        "ratio",
        "by CPU time",
        "ours of ceiling",
    ]
    lines = [
        [
            f"`{row['network']}`",
            f"{row['parameters'] / 1e6:.2f} M",
            row["compared"],
            " / ".join(dict.fromkeys(PRECISION[row[side]] for side in ("peer_precision", "ours_precision"))),
            row["peer_img_s"],
            row["ours_img_s"],
            f"{row['ratio']:.2f}",
            f"{row['ratio_by_cpu_time']:.2f}",
            f"{row['ours_utilisation']:.0%}",
        ]
        for row in part["rows"]
    ]
    ceilings = ", ".join(f"{flops / 1e12:.3g} in {PRECISION[name]}" for name, flops in part["matmul_flops"].items())
    return f"{_table(titles, lines)}\n\nCeiling, TFLOP/s of a matrix product: {ceilings}.", part["rows"], None


def _quality(part: schema.QualityPart) -> Made:
    titles = ["seed", "reference: s", "distance at its end", "ours: s to that", "steps", "ratio", "by CPU time"]
    lines = []
    rows = []
    for run in part["runs"]:
        theirs, mine = run["peer"]["curve"][-1], run["ours"]["curve"][-1]
        reached = "not reached" if run["ratio"] is None else None
        lines.append(
            [
                run["seed"],
                theirs["seconds"],
                run["target"],
                reached or mine["seconds"],
                mine["step"],
                reached or f"{run['ratio']:.2f}",
                reached or f"{run['ratio_by_cpu_time']:.2f}",
            ]
        )
        rows += [{"seed": run["seed"], "side": side, **row} for side in ("peer", "ours") for row in run[side]["curve"]]

    def draw(axes: Axes) -> None:
        for number, run in enumerate(part["runs"]):
            sides = ((run["peer"], "series-2", "reference loop"), (run["ours"], "series-1", "ours"))
            for side, colour, label in sides:
                points = side["curve"]
                axes.plot(
                    [row["seconds"] for row in points],
                    [row["distance"] for row in points],
                    marker="o",
                    markersize=3.5,
                    color=COLOURS[colour],
                    label=None if number else label,
                )
        axes.axhline(part["floor"], color=COLOURS["muted"], linestyle="dotted", label="floor: training images")
        axes.set(xlabel="seconds of training", ylabel="Frechet distance", yscale="log")
        axes.legend()

    notes = [f"Distance of real training images (the floor): {part['floor']:.4g}."]
    if part["ratio"] is not None:
        notes.append(f"Median over the seeds: {part['ratio']:.2f}, by CPU time {part['ratio_by_cpu_time']:.2f}.")
    return f"{_table(titles, lines)}\n\n{' '.join(notes)}", rows, draw


def _levers(part: schema.LeversPart) -> Made:
    titles = ["lever", "change", "steps", "distance", "spread", "training s", "CPU s", "samples"]
    lines = [
        [
            row["lever"],
            f"`{row['change']}`",
            row["steps"],
            row["distance"],
            row["spread"],
            row["seconds"],
            row["cpu_seconds"],
            f"[picture](bench/{row['picture']})" if row["picture"] else None,
        ]
        for row in part["rows"]
    ]
    return _table(titles, lines), part["rows"], None


def _sampling(part: schema.SamplingPart) -> Made:
    titles = ["sampler", "steps", "img/s", f"distance (floor {part['floor']})"]
    lines = [[NAMES[row["sampler"]], row["steps"], row["img_s"], row["distance"]] for row in part["rows"]]

    def draw(axes: Axes) -> None:
        for number, sampler in enumerate(dict.fromkeys(row["sampler"] for row in part["rows"])):
            rows = [row for row in part["rows"] if row["sampler"] == sampler]
            costs, distances = [row["seconds_per_image"] for row in rows], [row["distance"] for row in rows]
            axes.plot(costs, distances, marker="o", color=COLOURS[f"series-{number + 1}"], label=NAMES[sampler])
            for row in rows:
                place = (row["seconds_per_image"], row["distance"])
                axes.annotate(str(row["steps"]), place, textcoords="offset points", xytext=(5, 5))
        axes.axhline(part["floor"], color=COLOURS["muted"], linestyle="dotted", label="floor: training images")
        axes.set(xlabel="seconds per image (steps beside the points)", ylabel="Frechet distance", xscale="log")
        axes.legend()

    return _table(titles, lines), part["rows"], draw


def _encoding(part: schema.EncodingPart) -> Made:
    titles = [
        "case",
        "image",
        "latent",
        "network",
        "batch",
        "precision",
        "stored: ms a step",
        "online: ms a step",
        "ratio",
        "by CPU time",
        "images and tokens ready: ms a step",
        "ratio",
        "encoders by operations",
        "encoding once: img/s",
        "breaks even in epoch",
    ]
    lines = [
        [
            f"`{row['case']}`",
            f"{row['image']}x{row['image']}",
            "x".join(map(str, row["latent"])),
            f"{row['parameters'] / 1e6:.2f} M",
            row["batch"],
            PRECISION[row["precision"]],
            row["stored_ms"],
            row["online_ms"],
            f"{row['ratio']:.2f}",
            f"{row['ratio_by_cpu_time']:.2f}",
            row["encoders_ms"],
            f"{row['encoders_ratio']:.2f}",
            f"{row['ratio_by_operations']:.2f}",
            row["encode_img_s"],
            "never" if row["break_even_epoch"] is None else row["break_even_epoch"],
        ]
        for row in part["rows"]
    ]
    return _table(titles, lines), [{**row, "latent": "x".join(map(str, row["latent"]))} for row in part["rows"]], None


def _startup(part: schema.StartupPart) -> Made:
    lines = [
        ["`python -m tasks.train --help`", part["help_seconds"]],
        ["the same, CPU time", part["help_cpu_seconds"]],
        ["first optimizer step of `digits`", part["first_step_seconds"]],
        ["the same with an MLflow store that does not exist yet", part["first_step_seconds_with_an_empty_mlflow"]],
    ]
    return _table([f"median of {part['repeats']}", "seconds"], lines), [], None


def _table(titles: list[str], lines: Iterable[Iterable[object]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows)


def _picture(draw: Draw) -> bytes:
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=144, metadata={"Software": None})
    return png.getvalue()
