"""Parameters of a ControlNet: the sub-section `encode.control`, and the keys that belong together with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from tasks.params.section import NO_PATH, PositiveInt, Section

if TYPE_CHECKING:
    from tasks.params.chain import Params


class ControlParams(Section):
    """The control maps that `encode` makes for a ControlNet (Zhang et al. 2023)."""

    kind: Literal["canny", "colour", "own"]
    """`canny`: edges by OpenCV; `colour`: mean colours of a coarse grid; `own`: maps given with the images, in a folder
    `conditioning` with the names of the images, or in a column `conditioning_image` of a table."""
    canny_low: Annotated[float, Field(gt=0)] = 100.0
    """Lower threshold of `canny`, see `canny_high`."""
    canny_high: Annotated[float, Field(gt=0)] = 200.0
    """Thresholds of the gradient of a grey image (0 to 255): edges begin above the higher one, and go on above the
    lower one. They also make the edges of samples that are compared with a map."""
    colour_cells: PositiveInt = 8
    """Cells of a colour map along a side."""

    @model_validator(mode="after")
    def _check(self) -> ControlParams:
        if self.canny_low > self.canny_high:
            raise ValueError(
                f"encode.control.canny_low {self.canny_low:g} exceeds encode.control.canny_high {self.canny_high:g}; "
                "give the lower threshold first"
            )
        return self


def check(params: Params) -> None:
    """Raise `ValueError` unless the keys of a ControlNet are all set, or none, and fit the rest of the chain."""
    keys = {
        "encode.control": params.encode.control,
        "model.control_widths": params.model.control_widths,
        "train.control_dropout": params.train.control_dropout,
    }
    missing = [name for name, value in keys.items() if value is None]
    if len(missing) == len(keys):
        return
    if missing:
        present = next(name for name in keys if name not in missing)
        raise ValueError(
            f"{present} is set and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not, but a "
            "ControlNet needs the three of them; set all, or set all to null"
        )
    if params.codec.conditioning != "text":
        raise ValueError(
            f"encode.control makes maps for a ControlNet, which is made from a text-conditional U-Net, and "
            f"codec.conditioning is '{params.codec.conditioning}'; set it to 'text' (conditioning=text), or the three "
            "keys of the control to null"
        )
    _check_training(params)
    _check_widths(params)


def _check_training(params: Params) -> None:
    train = params.train
    others = {
        "model.lora_rank": params.model.lora_rank,
        "train.distil": train.distil,
        "train.guide_step": train.guide_step,
        "train.ema_snapshots": train.ema_snapshots,
    }
    for name, value in others.items():
        if value:
            raise ValueError(
                f"{name} changes or keeps weights of the U-Net, which model.control_widths freezes; set it to "
                f"{'0' if isinstance(value, int) and name.startswith('train') else 'null'}"
            )
    if train.init_from == NO_PATH and train.weights is None and not train.full_steps:
        raise ValueError(
            "model.control_widths trains a ControlNet for a U-Net that is frozen; name that in train.weights or "
            "train.init_from, or set train.full_steps to train it first"
        )
    shorter = min(train.steps - train.full_steps, train.full_steps or train.steps)
    if train.warmup_steps >= shorter:
        raise ValueError(
            f"train.warmup_steps {train.warmup_steps} comes before the training of the U-Net and before that of the "
            f"ControlNet, of which the shorter one has {shorter} steps; lower it"
        )


def _check_widths(params: Params) -> None:
    """Each width after the first halves the control map, which must end at the size of the network's input."""
    widths = params.model.control_widths or ()
    halvings = len(params.codec.autoencoder.widths) - 1 if params.codec.kind == "autoencoder" else 0
    if len(widths) - 1 != halvings:
        raise ValueError(
            f"model.control_widths has {len(widths)} widths, which halve a control map {len(widths) - 1} times, and "
            f"the codec halves an image {halvings} times; give {halvings + 1}"
        )
