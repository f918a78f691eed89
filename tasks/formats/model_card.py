"""The model card: what the model is, what it was made of, how good it is, how to use it, what it is not for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from tasks.runtime.markdown import code, escaped, one_line
from tasks.runtime.measures import Measurements

# How often something is written down says nothing about the weights.
NOT_TRAINING = ("_every",)


def model_card(
    info: Mapping[str, Any],
    data: Mapping[str, Any],
    training: Mapping[str, Any],
    measured: Measurements,
    exported: Mapping[str, Any],
) -> str:
    """Markdown with the front matter that model hubs read.

    info: `afterimage.json` of the pipeline. data: the index of the images. training: flat parameters of
    the run. measured: the evaluation. exported: `reports/export.json`.
    """
    sections = [
        _front_matter(data, info),
        _summary(info, data),
        _use(info, training),
        _evaluation(measured),
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
        text += f" It is asked for one of {len(info['classes'])} classes: {', '.join(map(escaped, info['classes']))}."
    if info["conditioning"] == "text":
        text += f" It is asked for by text, such as '{escaped(info['prompts'][0])}'."
    if info["latent"]:
        text += f" It draws latents of {info['latent'][0]} x {info['latent'][1]} x {info['latent'][1]} numbers."
    return text


def _use(info: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    wish, request = _example(info)
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
        lines += [
            "",
            f"The low-rank additions alone, into {escaped(given)}: `base.load_lora_weights('pipeline/lora')`.",
        ]
    return "\n".join(lines)


def _example(info: Mapping[str, Any]) -> tuple[str, str]:
    """Options of the command line and fields of a request that ask for one image."""
    if info["conditioning"] == "none":
        return "", ""
    asked = one_line(next(iter(info["prompts"] or info["classes"])))
    if info["conditioning"] == "label" and not re.fullmatch(r"[\w ,.'-]+", asked):
        return " --label 0 --guidance 1.5", "'label': 0, "  # a name that no shell or Markdown should have to carry
    return f" --prompt {shlex.quote(asked)} --guidance 1.5", f"'prompt': {asked!r}, "


def _evaluation(measured: Measurements) -> str:
    head = ["measure", "guidance", "samples", "value", "spread between seed blocks", "floor", "real images"]
    lines = ["## Evaluation", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, measure in sorted(measured.measures.items()):
        numbers = (measure.value, measure.spread, measure.floor, measure.real)
        cells = [name, f"{measure.guidance_scale:g}", measured.samples(measure)]
        cells += ["" if number is None else f"{number:.6g}" for number in numbers]
        lines.append(f"| {' | '.join(cells)} |")
    eta = f", eta {measured.eta:g}" if measured.eta else ""
    interval = measured.guidance_interval
    guided = f" Guidance acts at noise levels from {interval[0]:g} to {interval[1]:g}." if interval else ""
    lines += [
        "",
        "Guidance 1 is none. The floor is what as many training images score against the held-out ones.",
        "",
        f"Sampler {measured.sampler}, {measured.steps} steps{eta}.{guided}",
        (
            f"Distances are those to {measured.n_reference} held-out images in the features of `{measured.extractor}`; "
            f"{measured.n_floor} training images give the floor."
        ),
        f"Fingerprint of the measurement: `{measured.fingerprint}`; compare only numbers that share it.",
    ]
    if measured.small_n:
        lines += ["", f"Few images: {measured.small_n}. The distances say little."]
    if measured.clip_score_note:
        lines += ["", f"The CLIP score is {measured.clip_score_note}."]
    if measured.not_applicable:
        lines += ["", "Not measured:", ""]
        lines += [f"- {escaped(name)}: {escaped(reason)}" for name, reason in sorted(measured.not_applicable.items())]
    return "\n".join(lines)


def _export(exported: Mapping[str, Any]) -> str:
    tensorrt = exported["tensorrt"]
    engine = "measured" if tensorrt["built"] else f"not built ({escaped(tensorrt['reason'])})"
    return (
        "## Export\n\n"
        f"ONNX opset {exported['opset']}. Largest difference from PyTorch {exported['max_abs_difference']:.1e}; images "
        f"drawn from the same noise agree to {exported['min_psnr_db']:.0f} dB. Measured on "
        f"{', '.join(exported['providers'])}. TensorRT engine: {engine}."
    )


def _data(data: Mapping[str, Any]) -> str:
    splits = ", ".join(f"{count} {split}" for split, count in sorted(data["splits"].items()))
    return (
        f"## Data\n\nSource {code(data['source'])}, {data['rows']} images ({splits}), "
        f"licence: {escaped(data['licence'])}. "
        f"Content hash `{data['sha256']}`."
    )


def _training(training: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {escaped(value)} |" for name, value in sorted(training.items()) if not name.endswith(NOT_TRAINING)
    ]
    key = f"Identity of the training run: `{info['train_key']}`."
    return "\n".join(["## Training", "", "| parameter | value |", "|---|---|", *rows, "", key])


def _limits(info: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    classes = " A prompt only picks the class whose name it contains." if info["conditioning"] == "label" else ""
    return (
        "## Limits\n\n"
        f"It knows {code(data['source'])} and nothing else: what is rare or absent there it draws badly or not at all, "
        f"and what is biased there is biased here.{classes} It may reproduce training images; whoever publishes its "
        "images must respect the licence of the data. The measures above hold for the sampler and the settings they "
        "were taken with."
    )
