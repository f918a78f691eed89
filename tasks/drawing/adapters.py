"""LoRA adapters of the command: named as FOLDER:WEIGHT, and merged into a pipeline that is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.hashing import file_sha256
from models.lora import merge_adapters, read_adapter
from models.networks.text_encoder import SUFFIXES
from models.networks.text_unet import TextUNet
from tasks.drawing.settings import Adapter
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    import torch

    from models.pipeline import Pipeline


def parse(text: str) -> tuple[Path, float]:
    """Split FOLDER:WEIGHT; without a weight it is 1.

    Raises:
        ValueError: if the weight is not a number.
    """
    folder, colon, weight = text.rpartition(":")
    if not colon:
        return Path(text), 1.0
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise ValueError(f"--lora {text} has the weight {weight!r}; write FOLDER:WEIGHT, such as style:0.8") from None


def described(places: Sequence[tuple[Path, float]]) -> tuple[Adapter, ...]:
    """Return the adapters of some places with the SHA-256 of their files.

    Raises:
        StageError: if one of them is no adapter.
    """
    try:
        return tuple(
            Adapter(path=str(path), sha256=file_sha256(read_adapter(path).file), weight=weight)
            for path, weight in places
        )
    except ValueError as error:
        raise StageError(f"--lora {error}") from None


def merge(pipeline: Pipeline, adapters: Sequence[Adapter]) -> None:
    """Merge adapters into the U-Net and the text encoders of `pipeline`, which is changed.

    Raises:
        StageError: if the model takes no adapters, or if one was made for another base.
    """
    if not adapters:
        return
    if not isinstance(pipeline.network, TextUNet) or pipeline.text is None:
        raise StageError("--lora needs a text-conditional U-Net, which this model is not; leave it out")
    modules: dict[str, torch.nn.Module] = {"unet": pipeline.network}
    modules |= {
        f"text_encoder{suffix}": tower.model for suffix, tower in zip(SUFFIXES, pipeline.text.towers, strict=False)
    }
    weighted = [(read_adapter(Path(adapter.path)), adapter.weight) for adapter in adapters]
    for adapter, _ in weighted:
        if missing := set(adapter.parts) - set(modules):
            raise StageError(
                f"--lora {adapter.file} changes {', '.join(sorted(missing))}, which this model lacks: it was made for "
                "another base"
            )
    try:
        for part, module in modules.items():
            module.load_state_dict(merge_adapters(module.state_dict(), weighted, part))
    except ValueError as error:
        raise StageError(f"--lora {error}") from None
