"""A pipeline with the weights of earlier steps of its training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from models.networks.network import under_all_names
from models.networks.text_unet import merged
from models.tuned_text import split
from tasks.formats.averages import FILE, REFERENCE, Averages
from tasks.runtime import integrity

if TYPE_CHECKING:
    from models.pipeline import Pipeline


def earlier(pipeline: Pipeline, folder: Path) -> Iterator[tuple[int, Pipeline]]:
    """Yield the pipeline with the weights of each earlier step of which `train` kept an average in `folder`.

    One network takes the weights of each step in turn. Of several averages it is the first, the reference of the
    differences.
    """
    kept = Averages.read(folder / FILE)
    integrity.require(folder, kept.files, Averages.STAGE)
    if not kept.snapshots:
        return
    profile = kept.snapshots[0].profile
    reference, _ = split(whole := load_file(folder / REFERENCE))
    network = copy.deepcopy(pipeline.network)
    final = {name: value.clone() for name, value in pipeline.network.state_dict().items()}
    for snapshot in kept.snapshots:
        if snapshot.profile != profile or snapshot.step == kept.steps:
            continue
        differences = load_file(folder / snapshot.file)
        weights, text = split({name: value + differences[name].float() for name, value in whole.items()})
        network.load_state_dict(_complete(weights, reference, final, network))
        encoder = copy.deepcopy(pipeline.text)
        if text and encoder is not None:
            encoder.towers[0].model.load_state_dict(text)
        yield snapshot.step, replace(pipeline, network=network, text=encoder)


def _complete(
    weights: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    final: Mapping[str, torch.Tensor],
    network: torch.nn.Module,
) -> dict[str, torch.Tensor]:
    """Return the state dict of the plain network.

    A LoRA adapter alone changes the final weights by its product B A minus that of the `reference`, which they contain.
    """
    if not any(".lora_" in name for name in weights) or any(".base_layer." in name for name in weights):
        return under_all_names(network, {**final, **merged(weights)})
    changed = dict(final)
    for sign, adapter in ((1, weights), (-1, reference)):
        owners = {name.split(".lora_")[0] for name in adapter}
        zeros = {f"{owner}.base_layer.weight": torch.zeros_like(final[f"{owner}.weight"]) for owner in owners}
        on_device = {name: value.to(final[next(iter(final))].device) for name, value in adapter.items()}
        for name, product in merged({**zeros, **on_device}).items():
            changed[name] = changed[name] + sign * product
    return changed
