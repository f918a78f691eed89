"""The model card: what the model is, what it was made of, how good it is, how to use it, what it is not for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from tasks.formats import measures

# How often something is written down says nothing about the weights.
NOT_TRAINING = ("_every",)


def model_card(
    info: Mapping[str, Any],
    data: Mapping[str, Any],
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    exported: Mapping[str, Any],
) -> str:
    """Markdown with the front matter that model hubs read.

    info: `afterimage.json` of the pipeline. data: the index of the images. training: flat parameters of
    the run. metrics: `reports/metrics.json`. exported: `reports/export.json`.
    """
    sections = [
        _front_matter(data, info),
        _summary(info, data),
        _use(info, training),
        _evaluation(metrics),
        _export(exported),
    ]
    return "\n\n".join([*sections, _data(data), _training(training, info), _limits(info, data)]) + "\n"


def _front_matter(data: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    kinds = {"none": "unconditional-image-generation", "label": "class-conditional-image-generation"}
    kind = kinds.get(info["conditioning"], "text-to-image")
    return f"---\nlibrary_name: diffusers\ntags: [diffusion, {kind}, onnx]\ndatasets: [{data['source']}]\n---"


def _summary(info: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    colour = "grey" if info["channels"] == 1 else "RGB"
    text = (
        f"# Diffusion model of {data['source']}\n\n"
        f"Draws {colour} images of {info['size']} x {info['size']} pixels by removing noise step by step "
        f"({info['timesteps']} timesteps, {info['schedule']} schedule, {info['prediction']})."
    )
    if info["conditioning"] == "label":
        text += f" It is asked for one of {len(info['classes'])} classes: {', '.join(info['classes'])}."
    if info["conditioning"] == "text":
        text += f" It is asked for by text, such as '{info['prompts'][0]}'."
    if info["latent"]:
        text += f" It draws latents of {info['latent'][0]} x {info['latent'][1]} x {info['latent'][1]} numbers."
    return text


def _use(info: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    asked = next(iter(info["prompts"] or info["classes"]), None) if info["conditioning"] != "none" else None
    wish = f" --prompt {shlex.quote(asked)} --guidance 1.5" if asked else ""
    request = f"'prompt': {asked!r}, " if asked else ""
    tokenizers = ", and `tokenizers`" if info["conditioning"] == "text" else ""
    lines = [
        "## How to use it",
        "",
        f"Without PyTorch, from the folder `onnx/` (needs `numpy`, `onnxruntime` and `pillow`{tokenizers}):",
        "",
        f"    python -m afterimage_bundle.bundle --seed 0{wish} --out image.png",
        "",
        "From the MLflow registry (PNG bytes come back):",
        "",
        "    model = mlflow.pyfunc.load_model('models:/NAME@champion')",
        f"    png = model.predict([{{{request}'seed': 0}}])[0]",
        "",
    ]
    if (info["conditioning"] == "none") == (info["latent"] is None) and info["conditioning"] != "label":
        lines += ["With diffusers: `DiffusionPipeline.from_pretrained('pipeline')`."]
    else:
        network = "UNet2DConditionModel" if info["conditioning"] == "text" else "UNet2DModel"
        lines += [f"With diffusers, by component: `{network}.from_pretrained('pipeline', subfolder='unet')`."]
    if training.get("model.lora_rank"):
        given = training.get("train.weights") or "the weights that training began with"
        lines += ["", f"The low-rank additions alone, into {given}: `base.load_lora_weights('pipeline/lora')`."]
    return "\n".join(lines)


def _evaluation(metrics: Mapping[str, Any]) -> str:
    lines = ["## Evaluation", "", "| measure | value | spread between seed blocks | floor | real images |"]
    lines += ["|---|---|---|---|---|"]
    for name in measures.names(metrics):
        cells = [metrics.get(name + part) for part in ("", measures.SPREAD, measures.FLOOR, measures.REAL)]
        lines.append(f"| {name} | {' | '.join('' if cell is None else f'{cell:.6g}' for cell in cells)} |")
    settings = ", ".join(f"{name} {value}" for name, value in sorted(measures.facts(metrics).items()))
    lines += [
        "",
        "The floor is what as many training images score against the held-out ones.",
        "",
        f"Taken with {settings}.",
    ]
    lines += ["Compare only numbers that share the fingerprint."]
    absent = metrics.get("not_applicable") or {}
    if absent:
        lines += ["", "Not measured:", ""] + [f"- {name}: {reason}" for name, reason in sorted(absent.items())]
    return "\n".join(lines)


def _export(exported: Mapping[str, Any]) -> str:
    tensorrt = exported["tensorrt"]
    engine = "measured" if tensorrt["built"] else f"not built ({tensorrt['reason']})"
    return (
        "## Export\n\n"
        f"ONNX opset {exported['opset']}. Largest difference from PyTorch {exported['max_abs_difference']:.1e}; images "
        f"drawn from the same noise agree to {exported['min_psnr_db']:.0f} dB. Measured on "
        f"{', '.join(exported['providers'])}. TensorRT engine: {engine}."
    )


def _data(data: Mapping[str, Any]) -> str:
    splits = ", ".join(f"{count} {split}" for split, count in sorted(data["splits"].items()))
    return (
        f"## Data\n\nSource `{data['source']}`, {data['rows']} images ({splits}), licence: {data['licence']}. "
        f"Content hash `{data['sha256']}`."
    )


def _training(training: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in sorted(training.items()) if not name.endswith(NOT_TRAINING)]
    key = f"Identity of the training run: `{info['train_key']}`."
    return "\n".join(["## Training", "", "| parameter | value |", "|---|---|", *rows, "", key])


def _limits(info: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    classes = " A prompt only picks the class whose name it contains." if info["conditioning"] == "label" else ""
    return (
        "## Limits\n\n"
        f"It knows `{data['source']}` and nothing else: what is rare or absent there it draws badly or not at all, and "
        f"what is biased there is biased here.{classes} It may reproduce training images; whoever publishes its images "
        "must respect the licence of the data. The measures above hold for the sampler and the settings they were "
        "taken with."
    )
