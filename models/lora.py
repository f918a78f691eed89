"""LoRA adapters from files: read in diffusers' layout, and merged into the weights of a model at a weight each.

An adapter of a layer W [O, I] is a pair of matrices A [r, I] and B [O, r]. Several adapters at the weights w_i give
W + sum_i w_i (alpha_i / r_i) B_i A_i (Hu et al. 2021, eq. 3), which is what diffusers' `load_lora_weights` followed by
`set_adapters` or `fuse_lora` computes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

    from models.json_files import JsonObject

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
"""Entry of the file's metadata in which diffusers stores rank and alpha, as JSON."""
PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Networks that an adapter can change; names in the file begin with one of them."""
OLD_ENDINGS = {
    r"\.to_out_lora\.": ".to_out.0.lora.",
    r"\.to_(q|k|v)_lora\.": r".to_\1.lora.",
    r"\.processor\.": ".",
    r"\.lora_linear_layer\.": ".lora.",
    r"\.lora\.down\.weight$": ".lora_A.weight",
    r"\.lora\.up\.weight$": ".lora_B.weight",
}
"""Names in files of earlier versions of diffusers -> those of peft."""
TEXT_MODEL = "text_model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
Weighted: TypeAlias = "Sequence[tuple[Adapter, float]]"
"""Adapters, each with its weight."""


@dataclass(frozen=True)
class Adapter:
    """One adapter file."""

    file: Path
    tensors: Mapping[str, Tensor]
    """A and B of each layer under peft's names, such as `unet.[...].to_q.lora_A.weight`."""
    settings: JsonObject
    """peft's settings by part, such as `unet.lora_alpha`; empty in files that do not have them."""

    @property
    def parts(self) -> list[str]:
        """Those of `PARTS` that the adapter changes."""
        return [part for part in PARTS if any(name.startswith(f"{part}.") for name in self.tensors)]

    def scale(self, part: str, layer: str, rank: int) -> float:
        """Return alpha / r of a layer, or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023).

        A file without settings has alpha = r, as in diffusers.
        """
        alpha = self.settings.get(f"{part}.lora_alpha", rank)
        for pattern, own in (self.settings.get(f"{part}.alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):  # peft's rule
                alpha = own
        return float(alpha) / (math.sqrt(rank) if self.settings.get(f"{part}.use_rslora") else rank)


def read_adapter(place: Path) -> Adapter:
    """Read an adapter from a safetensors file, or from the file `FILE` of a folder or of its folder `lora/`.

    Raises:
        ValueError: if there is none, if it is damaged, or if it is not a plain LoRA adapter in diffusers' layout.
    """
    candidates = [place / FILE, place / "lora" / FILE] if place.is_dir() else [place]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ValueError(f"{place} holds no {FILE}; name a folder with a LoRA adapter in diffusers' layout")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {_peft_name(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            settings = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); fetch it again") from None
    for name in tensors:
        if not name.startswith(tuple(f"{part}." for part in PARTS)) or not name.endswith((DOWN, UP)):
            raise ValueError(
                f"{file} holds {name}, which is not part of a plain LoRA adapter in diffusers' layout; convert it with "
                "diffusers: pipeline.load_lora_weights(...), then pipeline.save_lora_weights(...)"
            )
    if not tensors:
        raise ValueError(f"{file} is empty; name another adapter")
    return Adapter(file, tensors, settings)


def _peft_name(name: str) -> str:
    for old, new in OLD_ENDINGS.items():
        name = re.sub(old, new, name)
    return name


def merge_adapters(weights: Mapping[str, Tensor], adapters: Weighted, part: str = "unet") -> dict[str, Tensor]:
    """Merge adapters into the weights of one network: W + sum_i w_i (alpha_i / r_i) B_i A_i.

    Args:
        weights: State dict of the network under diffusers' names; it is not changed.
        adapters: Adapters and their weights; 0 leaves an adapter out, negative weights subtract it.
        part: The network, one of `PARTS`.

    Returns:
        The new state dict. Layers without an adapter share their tensors with `weights`.

    Raises:
        ValueError: if an adapter was made for a network with other layers.
    """
    result = dict(weights)
    for adapter, weight in adapters:
        for name, down in adapter.tensors.items():
            layer = name.removeprefix(f"{part}.").removesuffix(DOWN)
            if not (name.startswith(f"{part}.") and name.endswith(DOWN)):
                continue
            owner = _name_in(result, layer)
            up, before = adapter.tensors.get(f"{part}.{layer}{UP}"), result.get(owner)
            if up is None or before is None or not _fits(before, down, up):
                raise ValueError(f"{adapter.file} does not fit the layer {part}.{layer}: it was made for another base")
            change = (up.float().flatten(1) @ down.float().flatten(1)).reshape(before.shape)
            change *= weight * adapter.scale(part, layer, len(down))
            result[owner] = (before.float() + change.to(before.device)).to(before.dtype)
    return result


def _name_in(weights: Mapping[str, Tensor], layer: str) -> str:
    """Return the name of a layer's weight; that of a text encoder has a prefix in some versions of transformers."""
    names = [f"{prefix}{layer.removeprefix(TEXT_MODEL)}.weight" for prefix in ("", TEXT_MODEL)]
    return next((name for name in names if name in weights), f"{layer}.weight")


def _fits(weight: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether B A has the shape of W: A [r, I], B [O, r], of a convolution A [r, I, k, k], B [O, r, 1, 1]."""
    outside, inside = up.flatten(1), down.flatten(1)
    return len(weight) == len(outside) and weight[0].numel() == inside.shape[1] and outside.shape[1] == len(inside)
