"""The model card, a Markdown file: use, evaluation, export, data, training parameters and limits of a model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from tasks.runtime.markdown import code, escaped, one_line
from tasks.runtime.measures import guidance_name

if TYPE_CHECKING:
    from tasks.formats.model_folder import ExportReport
    from tasks.runtime.measures import ControlMeasured, Measurements

OWN_NETWORKS = ("DiT", "TextDiT")
"""Transformers with options that those of diffusers lack, as their `config.json` names them."""
NOT_TRAINING = ("_every",)
"""Endings of parameters that the card leaves out: logging intervals do not change the weights."""


class ModelFacts(BaseModel):
    """The fields of `afterimage.json` that the card shows; see `PipelineInfo`, which needs torch."""

    model_config = ConfigDict(frozen=True)

    conditioning: str
    channels: int
    size: int
    schedule: str
    timesteps: int
    prediction: str
    train_key: str
    classes: list[str]
    prompts: list[str] | None = None
    latent: tuple[int, int] | None = None


class NetworkFacts(BaseModel):
    """How diffusers loads the model."""

    model_config = ConfigDict(frozen=True)

    kind: str
    """Class of the network."""
    folder: str
    """The network's folder in the pipeline."""
    pipeline: str | None
    """Class of the whole pipeline; None if diffusers has none for this model."""
    patch_size: int = 1
    """Side of the patches whose pixels are the channels of the network in diffusers."""


class DataFacts(BaseModel):
    """The fields of the data set's index that the card shows."""

    model_config = ConfigDict(frozen=True)

    source: str
    licence: str
    rows: int
    splits: dict[str, int]
    sha256: str


def model_card(
    info: ModelFacts,
    network: NetworkFacts,
    data: DataFacts,
    training: Mapping[str, object],
    measured: Measurements,
    exported: ExportReport,
) -> str:
    """Return Markdown with the front matter that model hubs read.

    training: the parameters of the training run by their dotted names.
    """
    sections = [
        _front_matter(data, info),
        _summary(info, data),
        _use(info, network, training),
        _evaluation(measured),
        _export(exported),
    ]
    return "\n\n".join([*sections, _data(data), _training(training, info), _limits(info, data)]) + "\n"


def _front_matter(data: DataFacts, info: ModelFacts) -> str:
    kinds = {"none": "unconditional-image-generation", "label": "class-conditional-image-generation"}
    kind = kinds.get(info.conditioning, "text-to-image")
    return f"---\nlibrary_name: diffusers\ntags: [diffusion, {kind}, onnx]\ndatasets: [{data.source}]\n---"


def _summary(info: ModelFacts, data: DataFacts) -> str:
    colour = "grey" if info.channels == 1 else "RGB"
    text = (
        f"# Diffusion model of {data.source}\n\n"
        f"Draws {colour} images of {info.size} x {info.size} pixels "
        f"({info.timesteps} timesteps, {info.schedule} schedule, {info.prediction} prediction)."
    )
    if info.conditioning == "label":
        text += f" It is conditioned on one of {len(info.classes)} classes: {', '.join(map(escaped, info.classes))}."
    if info.conditioning == "text":
        text += f" It is conditioned on text, such as '{escaped((info.prompts or info.classes)[0])}'."
    if info.latent:
        text += f" It denoises latents of {info.latent[0]} x {info.latent[1]} x {info.latent[1]} values."
    return text


def _use(info: ModelFacts, network: NetworkFacts, training: Mapping[str, object]) -> str:
    options, fields = _example(info, training)
    tokenizers = ", and `tokenizers`" if info.conditioning == "text" else ""
    lines = [
        "## How to use it",
        "",
        f"Without PyTorch, from the folder `onnx/` (needs `numpy`, `onnxruntime` and `pillow`{tokenizers}):",
        "",
        f"    python -m afterimage_bundle.bundle --seed 0{options} --out image.png",
        "",
        "From the MLflow registry; it returns the bytes of a PNG file:",
        "",
        "    model = mlflow.pyfunc.load_model('models:/NAME@champion')",
        f"    png = model.predict([{{{fields}'seed': 0}}])[0]",
        "",
        _with_diffusers(network),
    ]
    if training.get("model.lora_rank"):
        base = training.get("train.weights") or "the weights that training started from"
        lines += ["", f"The LoRA adapter alone, on top of {escaped(base)}: `base.load_lora_weights('pipeline/lora')`."]
    return "\n".join(lines)


def _with_diffusers(network: NetworkFacts) -> str:
    if network.kind in OWN_NETWORKS:
        return "diffusers has no network of this architecture."
    if network.pipeline is None:
        call = f"{network.kind}.from_pretrained('pipeline', subfolder='{network.folder}')"
        cut = (
            f" It takes `torch.nn.functional.pixel_unshuffle(x, {network.patch_size})` of the noisy image x; "
            f"`pixel_shuffle(output, {network.patch_size})` is the prediction."
        )
        return f"With diffusers, by component: `{call}`.{cut if network.patch_size > 1 else ''}"
    embeds = " It takes the text as `prompt_embeds`." if network.pipeline == "PixArtAlphaPipeline" else ""
    return f"With diffusers: `DiffusionPipeline.from_pretrained('pipeline')`, a `{network.pipeline}`.{embeds}"


def _example(info: ModelFacts, training: Mapping[str, object]) -> tuple[str, str]:
    """Return command-line options and fields of a request for one image."""
    few = "train.distil.after" in training
    sampler = (" --sampler consistency --steps 2", "'sampler': 'consistency', 'steps': 2, ") if few else ("", "")
    if info.conditioning == "none":
        return sampler
    name = one_line(next(iter(info.prompts or info.classes)))
    if info.conditioning == "label" and not re.fullmatch(r"[\w ,.'-]+", name):
        condition = " --label 0 --guidance 1.5", "'label': 0, "  # a name that is unsafe in a shell or in Markdown
    else:
        condition = f" --prompt {shlex.quote(name)} --guidance 1.5", f"'prompt': {name!r}, "
    return condition[0] + sampler[0], condition[1] + sampler[1]


def _evaluation(measured: Measurements) -> str:
    head = ["measure", "guidance", "samples", "value", "spread between seed blocks", "floor", "real images"]
    lines = ["## Evaluation", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, measure in sorted(measured.measures.items()):
        numbers = (measure.value, measure.spread, measure.floor, measure.real)
        cells = [name, guidance_name(measure.guidance_scale, measure.guidance_kind), measured.samples(measure)]
        cells += ["" if number is None else f"{number:.6g}" for number in numbers]
        lines.append(f"| {' | '.join(cells)} |")
    eta = f", eta {measured.eta:g}" if measured.eta else ""
    interval = measured.guidance_interval
    guided = f" Guidance acts at noise levels from {interval[0]:g} to {interval[1]:g}." if interval else ""
    auto = (
        " With 'auto' it is autoguidance by `pipeline/guide`, earlier weights of the same training; without, it is "
        "classifier-free guidance."
        if measured.guided_kind == "auto"
        else ""
    )
    lines += [
        "",
        f"Guidance 1 disables guidance.{auto} The floor is the same distance for as many training images.",
        "",
        f"Sampler {measured.sampler}, {measured.steps} steps{eta}.{guided}",
        (
            f"Distances compare with {measured.n_reference} held-out images in the features of `{measured.extractor}`; "
            f"the floor is that of {measured.n_floor} training images."
        ),
        f"Fingerprint of the measurement: `{measured.fingerprint}`; compare only numbers that share it.",
    ]
    if measured.control:
        lines += ["", _control(measured.control)]
    if measured.small_n:
        lines += ["", f"Few images: {measured.small_n}. The distances are not reliable."]
    if measured.clip_score_note:
        lines += ["", f"The CLIP score is {measured.clip_score_note}."]
    if measured.not_applicable:
        lines += ["", "Not measured:", ""]
        lines += [f"- {escaped(name)}: {escaped(reason)}" for name, reason in sorted(measured.not_applicable.items())]
    return "\n".join(lines)


def _control(control: ControlMeasured) -> str:
    return (
        f"The images of the ControlNet agree with their control maps ({control.kind}) to {control.value:.3f} (spread "
        f"{control.spread:.2g}, 1 is best), with another map to {control.shuffled:.3f}, without one to "
        f"{control.base:.3f}; real images to {control.real:.3f}. The other numbers are those of images without a map."
    )


def _export(exported: ExportReport) -> str:
    tensorrt = exported.tensorrt
    engine = "measured" if tensorrt.built else f"not built ({escaped(tensorrt.reason or 'unknown')})"
    return (
        "## Export\n\n"
        f"ONNX opset {exported.opset}. The largest difference from PyTorch is {exported.max_abs_difference:.1e}; "
        f"images drawn from the same noise agree to {exported.min_psnr_db:.0f} dB. Measured on "
        f"{', '.join(exported.providers)}. TensorRT engine: {engine}."
        f"{f' ControlNet: {exported.control}.' if exported.control else ''}"
    )


def _data(data: DataFacts) -> str:
    splits = ", ".join(f"{count} {split}" for split, count in sorted(data.splits.items()))
    return (
        f"## Data\n\nSource {code(data.source)}, {data.rows} images ({splits}), "
        f"licence: {escaped(data.licence)}. "
        f"Content hash `{data.sha256}`."
    )


def _training(training: Mapping[str, object], info: ModelFacts) -> str:
    rows = [
        f"| {name} | {escaped(value)} |" for name, value in sorted(training.items()) if not name.endswith(NOT_TRAINING)
    ]
    key = f"Identity of the training run: `{info.train_key}`."
    return "\n".join(["## Training", "", "| parameter | value |", "|---|---|", *rows, "", key])


def _limits(info: ModelFacts, data: DataFacts) -> str:
    classes = " A prompt only selects the class whose name it contains." if info.conditioning == "label" else ""
    return (
        "## Limits\n\n"
        f"Trained on {code(data.source)}: the model draws badly, or not at all, what is rare or absent in this data, "
        f"and it has the biases of the data.{classes} It may reproduce training images; respect the licence of the "
        "data when you publish its images. The measures above hold only for the sampler and settings with which they "
        "were taken."
    )
