"""The command line of `python -m tasks.draw`; imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = "outputs/pipeline"
MAX_IMAGES = 4096


@dataclass(frozen=True)
class Options:
    """What the user gave; None and empty for what they left out."""

    model: str | None = None
    label: Sequence[str] | None = None
    prompt: Sequence[str] | None = None
    negative_prompt: str | None = None
    seed: Sequence[int] | None = None
    count: int | None = None
    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None
    guidance: float | None = None
    guidance_interval: Sequence[float] | None = None
    guidance_kind: str | None = None
    precision: str | None = None
    lora: Sequence[str] | None = None
    image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    mask_rectangle: str | None = None
    control: Path | None = None
    control_from: Path | None = None
    control_scale: float | None = None
    like: Path | None = None
    out: Path | None = None
    scale: int | None = None
    force: bool = False


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line; ends the process with a message if it is not valid."""
    parser = _parser()
    given = Options(**vars(parser.parse_args(arguments)))
    if given.label and given.prompt:
        parser.error("give --label or --prompt, not both")
    if given.count is not None and given.seed is not None and len(given.seed) > 1:
        parser.error("--count N draws N seeds from the first on; give one --seed with it")
    if given.mask and given.mask_rectangle:
        parser.error("give --mask or --mask-rectangle, not both")
    if given.control and given.control_from:
        parser.error("give --control or --control-from, not both")
    for name in ("count", "scale", "steps"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.draw",
        description="Draw images with a trained model.",
        epilog="Without other options, the model's classes or example prompts are drawn as it was evaluated.",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help=f"a folder in diffusers' layout, models:/NAME@ALIAS or models:/NAME/VERSION; default {MODEL}",
    )
    _add_what(parser.add_argument_group("what to draw"))
    _add_image(parser.add_argument_group("what to begin with"))
    _add_how(parser.add_argument_group("how to draw it"))
    _add_where(parser.add_argument_group("where to write it"))
    return parser


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--label", nargs="+", metavar="LABEL", help="classes, by name or index")
    group.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts; for classes, texts that name one class each")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    group.add_argument("--seed", type=int, nargs="+", metavar="SEED", help="a row of images for each; default 0")
    group.add_argument("--count", type=int, metavar="N", help="draw N seeds, from --seed on")
    group.add_argument("--like", type=Path, metavar="PNG", help="repeat a drawing of this command; options change it")


def _add_image(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--image", type=Path, metavar="FILE", help="change this image; it is brought to the model's size"
    )
    group.add_argument("--strength", type=float, help="how much changes, above 0 to 1; default 0.8, with a mask 1")
    group.add_argument("--mask", type=Path, metavar="FILE", help="image of the same size; white is painted anew")
    group.add_argument(
        "--mask-rectangle", metavar="LEFT,TOP,WIDTH,HEIGHT", help="the same, in pixels of the drawn image"
    )

    group.add_argument("--control", type=Path, metavar="FILE", help="a map for the model's ControlNet")
    group.add_argument(
        "--control-from", type=Path, metavar="FILE", help="an image to make that map from, as in the training"
    )
    group.add_argument("--control-scale", type=float, metavar="WEIGHT", help="weight of the ControlNet; default 1")


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sampler", metavar="NAME", help="such as ddim, dpm_solver_pp_2m, euler, heun")
    group.add_argument("--steps", type=int, metavar="N", help="steps of the sampler")
    group.add_argument("--eta", type=float, help="stochasticity of the sampler ddim, 0 to 1")
    group.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale; 1 disables it")
    group.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels with it")
    group.add_argument("--guidance-kind", metavar="KIND", help="classifier_free, or auto for a model with a guide")
    group.add_argument(
        "--precision", choices=("no", "bf16", "fp16"), help="of the network; no is float32, the default; fp16 on a GPU"
    )
    group.add_argument("--lora", action="append", metavar="FOLDER:WEIGHT", help="merge a LoRA adapter; may be repeated")


def _add_where(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a .png (several images make a grid), a .gif or .webp (an animation of the denoising), or a folder for "
        "one PNG per image; default outputs/drawings/NUMBER.png",
    )
    group.add_argument("--scale", type=int, metavar="N", help="enlarge each pixel to N x N")
    group.add_argument("--force", action="store_true", help="overwrite what --out names")
