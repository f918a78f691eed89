"""The tables and picture galleries of the report, from the files that the stages wrote."""

from __future__ import annotations

import csv
import json
from dataclasses import astuple
from pathlib import Path

from tasks.report import charts, control
from tasks.report.page import Headline, Measures, Metric, Picture, Table
from tasks.report.process import spread
from tasks.runtime.codec_quality import QUALITY, RECONSTRUCTIONS
from tasks.runtime.measures import CLIP_SCORE, Measurements, Row, guidance_name
from tasks.validation.report import page as validation_report

MEASURES = {
    "frechet_distance": ("Fréchet distance", "distance between the distributions of features; lower is better"),
    "kid": ("KID", "kernel distance between features, without the assumption of a Gaussian; lower is better"),
    "cmmd": ("CMMD", "the same with a Gaussian kernel (σ = 10) on features of unit length, × 1000; lower is better"),
    "precision": ("Precision", "share of the samples that look real; higher is better"),
    "recall": ("Recall", "share of the real images that the samples cover; higher is better"),
    "inception_score": ("Inception score", "clear and varied images, in the classes of ImageNet; higher is better"),
    "inception_style_score": ("Inception-style score", "clear and varied classes; higher is better"),
    "label_accuracy": (
        "Label accuracy",
        "share of the images that the classifier assigns to the requested class",
    ),
    "clip_score": ("CLIP score", "agreement of image and caption; higher is better"),
    "near_copies": (
        "Near copies",
        "share of the samples that are nearer to a training image than 99 % of the held-out images; lower is better",
    ),
}
HEADLINES = ("label_accuracy", "kid", "clip_score", "frechet_distance")
"""The measures that come first, after the protocol's headline, as far as they were taken."""
MAX_HEADLINES = 4
SAMPLER_COLUMNS = {
    "sampler": "Sampler",
    "weights": "Weights",
    "steps": "Steps",
    "eta": "η",
    "guidance_scale": "Guidance",
    "guidance": "Kind",
    "n": "n",
    "seed_blocks": "Blocks",
    "frechet_distance": "Fréchet",
    "kid": "KID",
    "cmmd": "CMMD",
    "precision": "Precision",
    "recall": "Recall",
    "inception_score": "IS",
    "inception_style_score": "Inception-style",
    "label_accuracy": "Accuracy",
    "clip_score": "CLIP",
}
SUBJECT_COLUMNS = {"weights": "Weights", "step": "Step", "n": "n", "subject_similarity": "Subject"}
SUBJECT_COLUMNS |= {"class_similarity": "Class", "margin": "Margin", "class_diversity": "Diversity"}
SUBJECT_COLUMNS |= {"prompt_fidelity": "Prompt", "note": "Note"}
SWEEP_COLUMNS = {"guidance_scale": "Guidance", "guidance": "Kind", "n": "n"} | {
    name: SAMPLER_COLUMNS[name]
    for name in ("frechet_distance", "kid", "cmmd", "precision", "recall", "label_accuracy", "clip_score")
}
CLASS_COLUMNS = {
    "class": "Class",
    "n": "n, guided",
    "label_accuracy": "Accuracy",
    "clip_score": "CLIP",
    "n_unguided": "n, unguided",
    "kid": "KID",
    "kid_floor": "KID floor",
}
TIMESTEP_COLUMNS = {
    "timestep": "t",
    "signal": "Signal left",
    "n": "n",
    "squared_error": "Squared error",
    "psnr": "PSNR, dB",
}
GUIDANCES = {"classifier_free": "classifier-free", "auto": "autoguidance"}
PROGRESS_GRIDS = 6
SHARES = ("label_accuracy", "precision", "recall", "near_copies")
WHOLE = ("steps", "n", "n_unguided", "seed_blocks", "timestep")
SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler_ancestral": "Euler ancestral",
    "dpm_solver_pp_2m": "DPM-Solver++ 2M",
    "euler": "Euler",
    "heun": "Heun",
    "consistency": "Consistency",
}


def sampler_name(sampler: str, steps: int) -> str:
    """Return, for example, "DDIM in 50 steps"."""
    return f"{SAMPLERS[sampler]} in {steps} steps"


def measures(measured: Measurements) -> Measures:
    """Return the section of measures."""
    first = measured.rows(dict.fromkeys((measured.headline, *HEADLINES, *MEASURES)))
    return Measures(
        headlines=[_headline(row, measured.headline) for row in first[:MAX_HEADLINES]],
        metrics=[_metric(row, measured.clip_score_note) for row in measured.rows(MEASURES)],
        not_applicable=[
            (MEASURES[name][0] if name in MEASURES else name, reason)
            for name, reason in sorted(measured.not_applicable.items())
        ],
        few_images=measured.small_n or "",
        protocol=_protocol(measured),
    )


def _protocol(measured: Measurements) -> str:
    """Describe how the samples were drawn, in one sentence."""
    sampler = sampler_name(measured.sampler, measured.steps)
    sampler += f", η = {measured.eta:g}" if measured.eta else ""
    drawn = f"Drawn with {sampler}, over {measured.seed_blocks} seed blocks"
    unguided = f"{measured.n_samples} samples each, without guidance, for the distances"
    guided = next((measure for measure in measured.measures.values() if measure.drawn == "guided"), None)
    if guided is None:
        return f"{drawn}: {unguided}."
    kind = "autoguidance" if guided.guidance_kind == "auto" else "guidance"
    text = f"{guided.n} with {kind} {guided.guidance_scale:g} for accuracy and CLIP score"
    if measured.guidance_interval:
        text += " at noise levels σ from {:g} to {:g}".format(*measured.guidance_interval)
    return f"{drawn}: {unguided}, {text}."


def _metric(row: Row, clip_score_note: str | None) -> Metric:
    """Format a row of the table of measures."""
    name, reading = MEASURES[row.name]
    note = f"; {clip_score_note}" if row.name == CLIP_SCORE and clip_score_note else ""
    reference = ""
    if row.reference:
        reference = f"{_number(row.name, row.reference.value)} {_spread(row.name, row.reference.spread)}".strip()
    return Metric(
        name,
        row.guidance if row.guidance == "none" else f"w = {row.guidance}",
        _number(row.name, row.value),
        _spread(row.name, row.spread),
        reference,
        reading + note,
    )


def _headline(row: Row, distance: str) -> Headline:
    """Format a row as a headline; only that of the protocol's `distance` states a multiple of its floor."""
    reference = row.reference
    if reference is None:
        note = "no reference"
    elif row.name == distance and reference.value > 0:
        note = f"{row.value / reference.value:.1f} times the floor of {_number(row.name, reference.value)}"
    else:
        note = f"{reference.name}: {_number(row.name, reference.value)}"
    drawn = "without guidance" if row.guidance == "none" else f"at guidance {row.guidance}"
    return Headline(MEASURES[row.name][0], _number(row.name, row.value), f"{drawn}; {note}")


def _spread(key: str, spread: float | None) -> str:
    return "" if spread is None else f"± {_number(key, spread, digits=2)}"


def _number(key: str, value: float, digits: int = 3) -> str:
    text = f"{100 * value:.1f} %" if key in SHARES else f"{value:.{digits}g}"
    return text.replace("-", "−")


def tables(evaluation: Path, headline: str) -> list[Table]:
    """Return the tables that `evaluate` wrote; `headline` is the distance of the chart by guidance scale."""
    found = [_sampler_table(evaluation / "samplers.csv", headline)]
    if (evaluation / "guidance.csv").exists():
        found.append(_guidance_table(evaluation / "guidance.csv", headline))
    if (evaluation / "classes.csv").exists():
        text = (
            "Over all seed blocks. Accuracy and CLIP score are those of guided samples; KID compares unguided samples "
            "with the held-out images of their class, and its floor as many training images with the same."
        )
        columns, rows = _cells(_read(evaluation / "classes.csv"), CLASS_COLUMNS)
        found.append(Table("By class", text, columns, rows))
    if (evaluation / "timesteps.csv").exists():
        text = (
            "Error of the clean image that the model predicts from a held-out image with the noise of timestep t. At "
            "the last timesteps almost no signal is left, so every model has a large error there."
        )
        columns, rows = _cells(_read(evaluation / "timesteps.csv"), TIMESTEP_COLUMNS)
        found.append(Table("By timestep", text, columns, rows))
    if (evaluation / "subject.csv").exists():
        found.append(subject_table(evaluation / "subject.csv"))
    return found


def subject_table(path: Path) -> Table:
    """Return the table of the measures of DreamBooth."""
    text = (
        "DreamBooth: mean cosine of the features of samples with those of the subject's pictures, with the token of "
        "the subject in the prompt and without (class). A class that comes nearer to the subject than before leaks; "
        "the margin is the difference that the token makes. Diversity is 1 minus the mean cosine of two samples of the "
        "class. Prompt fidelity is the CLIP score in held-out contexts."
    )
    columns, rows = _cells(_read(path), SUBJECT_COLUMNS)
    return Table("The subject over the training", text, columns, rows, worded=["Weights", "Note"])


def _sampler_table(path: Path, headline: str) -> Table:
    """Return the table of samplers, with a chart of `headline` by steps for a consistency model."""
    rows = _read(path)
    text = (
        "Samples of the same weights with different samplers, steps and guidance. Do not compare distances of rows "
        "with different n: with fewer images a distance is larger."
    )
    notes = [(sampler_name(row["sampler"], int(row["steps"])), row["note"]) for row in rows if row.get("note")]
    title, (columns, cells) = "Samplers compared", _cells(rows, SAMPLER_COLUMNS)
    lines = _distance_by_steps(rows, headline)
    if not all(lines.values()):
        return Table(title, text, columns, cells, notes)
    text += " The rows of the teacher are drawn with the weights from which consistency tuning began."
    distance = MEASURES[headline][0]
    label = f"{distance} against sampling steps, of the consistency model and of its teacher"
    chart = charts.few_steps(lines, distance)
    return Table(title, text, columns, cells, notes, chart.svg, label, worded=["Weights"])


def _distance_by_steps(rows: list[dict[str, str]], distance: str) -> dict[str, list[tuple[int, float]]]:
    """Return (steps, distance) of a consistency model and its teacher, over as many images for each point."""
    drawn = [row for row in rows if row[distance] and float(row["guidance_scale"]) == 1]
    teacher = [row for row in drawn if row.get("weights") == "teacher"]
    alike = {(row["n"], row["seed_blocks"]) for row in teacher}
    student = [row for row in drawn if not row.get("weights") and (row["n"], row["seed_blocks"]) in alike]
    return {
        name: sorted((int(row["steps"]), float(row[distance])) for row in group)
        for name, group in (("consistency model", student), ("teacher", teacher))
    }


def _guidance_table(path: Path, headline: str) -> Table:
    """Return the table of the sweep, with a chart of `headline` against agreement or, without conditions, scale."""
    rows = _read(path)
    agreement = next((name for name in ("clip_score", "label_accuracy") if any(row[name] for row in rows)), None)
    kinds = _kinds(rows)
    notes = [
        (f"w = {guidance_name(float(row['guidance_scale']), row.get('guidance'))}", row["note"])
        for row in rows
        if row.get("note")
    ]
    title, text, (columns, cells) = "Guidance", _about_guidance(kinds, agreement), _cells(rows, SWEEP_COLUMNS)
    x = agreement or "guidance_scale"
    curves = {
        GUIDANCES[kind]: [
            (float(row[x]), float(row[headline]), float(row["guidance_scale"]))
            for row in rows
            if row.get("guidance") in (None, "", kind) and row[x] and row[headline]
        ]
        for kind in kinds
    }
    if not curves or min(map(len, curves.values())) < 2:
        return Table(title, text, columns, cells, notes)
    against = MEASURES[agreement][0] if agreement else "Guidance scale w"
    distance = MEASURES[headline][0]
    label = f"{distance} against {against}, one point for each guidance scale"
    return Table(title, text, columns, cells, notes, charts.guidance(curves, distance, against).svg, label)


def _kinds(rows: list[dict[str, str]]) -> list[str]:
    """Return the kinds of guidance among the rows; tables without that column are of classifier-free guidance."""
    named = [kind for row in rows if (kind := row.get("guidance"))]
    return list(dict.fromkeys(named)) or ["classifier_free"]


def _about_guidance(kinds: list[str], agreement: str | None) -> str:
    text = ""
    if agreement:
        text = (
            "A larger guidance scale w improves the agreement with the requested class or caption, and beyond some "
            "value increases the distance to real images. Points further down and to the right are better. "
        )
    if "auto" in kinds:
        text += "Autoguidance moves the prediction away from that of earlier weights of the same network. "
    if "auto" in kinds and "classifier_free" in kinds:
        text += "Classifier-free guidance moves it away from the prediction without the class or caption. "
    return text + "w = 1 is no guidance. One seed block."


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _cells(rows: list[dict[str, str]], known: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """Return the titles of the columns that are not empty, in the order of `known`, and the formatted rows.

    The kind of guidance is a column only if it is not classifier-free guidance throughout.
    """
    keys = [key for key in known if any(row.get(key) for row in rows)]
    if "guidance" in keys and "auto" not in _kinds(rows):
        keys.remove("guidance")

    def cell(key: str, text: str) -> str:
        if key in ("sampler", "class", "weights", "note"):
            return SAMPLERS.get(text, text)
        if key == "guidance":
            return GUIDANCES.get(text, "–")
        if not text or key in WHOLE:
            return text or "–"
        return _number(key, float(text))

    return [known[key] for key in keys], [[cell(key, row[key]) for key in keys] for row in rows]


CODEC = {
    "autoencoder_psnr": ("PSNR, decoded images", "dB, mean over the images; higher is better"),
    "autoencoder_ssim": ("SSIM, decoded images", "1 means no loss"),
    "text_retrieval_accuracy": ("Text encoder", "share of the images whose own caption is ranked first"),
    "text_retrieval_chance": ("by chance", "the same for random guesses"),
    "second_text_retrieval_accuracy": ("Second text encoder", "share of the images whose own caption is ranked first"),
    "second_text_retrieval_chance": ("by chance", "the same for random guesses"),
}


def codec(folder: Path) -> Table | None:
    """Return the quality of autoencoder and text encoder on held-out images; None without them."""
    file = folder / QUALITY
    measured = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not measured:
        return None
    text = (
        "Measured on held-out images. The model cannot draw details that the autoencoder loses, nor follow "
        "differences between captions that the text encoder does not represent."
    )
    rows = [[*CODEC[name][:1], f"{measured[name]:.3g}", *CODEC[name][1:]] for name in CODEC if name in measured]
    return Table("Autoencoder and text encoder", text, ["Measure", "Value", "Meaning"], rows, worded=["Meaning"])


def data(validation: Path) -> list[Table]:
    """Return every check of the data with its result and remedy, and the quarantined inputs by reason."""
    rows = [[*astuple(check)] for check in validation_report.checks(validation)]
    text = (
        "Expectations about the metadata of the images, and what was observed. A failed check stops the chain, unless "
        'it is listed in validate.warn_only; its verdict is then "warning".'
    )
    columns = validation_report.COLUMNS
    found = [Table("Checks of the data", text, columns, rows, worded=columns[1:])]
    reasons = validation_report.quarantined_by_reason(validation)
    text = "Inputs that are not part of the data set, by reason. They are stored in data/quarantine."
    if reasons:
        cells = [[reason, str(count)] for reason, count in reasons.items()]
        found.append(Table("Quarantine", text, ["Reason", "Inputs"], cells))
    return found


def reconstructions(folder: Path) -> Picture | None:
    """Return held-out images above their reconstructions; None without an autoencoder."""
    file = folder / RECONSTRUCTIONS
    if not file.is_file():
        return None
    return Picture(
        file.read_bytes(),
        "Held-out images above their reconstructions from latents",
        "Held-out images and reconstructions",
    )


def grids(evaluation: Path, measured: Measurements) -> list[Picture]:
    """Return the grids that `evaluate` drew, those of the protocol's sampler first."""
    own = sampler_name(measured.sampler, measured.steps)
    guided = {}
    if measured.guided_scale is not None:
        guided["grid_guided"] = f"{own}, guidance {guidance_name(measured.guided_scale, measured.guided_kind)}"
    captions = {
        "grid_unguided": f"{own}, without guidance",
        **guided,
        "grid_slowest": f"{_slowest(evaluation)}, without guidance",
        "grid_subject": "The subject's pictures, then samples from the same seeds before, during and after DreamBooth",
        "grid_nearest": "The samples that are nearest to a training image by features, above that image",
        "grid_control": control.CAPTION,
    }
    return [
        Picture((evaluation / f"{name}.png").read_bytes(), caption, f"Grid of generated images: {caption}")
        for name, caption in captions.items()
        if (evaluation / f"{name}.png").exists()
    ]


def _slowest(evaluation: Path) -> str:
    """Return sampler and steps of the last row of the table of samplers, whose images are in `grid_slowest`."""
    *_, last = _read(evaluation / "samplers.csv")
    return sampler_name(last["sampler"], int(last["steps"]))


def progress(samples: Path) -> list[Picture]:
    """Return the sample grids of training, at most `PROGRESS_GRIDS` spread over the run."""
    paths = sorted(samples.glob("step-*.png"))
    chosen = [paths[index] for index in spread(len(paths), PROGRESS_GRIDS)] if paths else []
    steps = [int(path.stem.removeprefix("step-")) for path in chosen]
    return [
        Picture(path.read_bytes(), f"step {step:,}", f"Grid of samples after {step} training steps")
        for path, step in zip(chosen, steps, strict=True)
    ]
