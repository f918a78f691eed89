"""Drawing in bfloat16 or float16: layers in the lower precision, norms, sampler and images in float32."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from models.networks.network import predictor as network_predictor

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.networks.network import Predict
    from models.pipeline import Pipeline

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Lower precisions by name; "no" is float32."""
LAYERS = (nn.Linear, nn.Conv2d)
"""Layers whose weights autocast would convert at every call."""

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


def predictor(
    network: Callable[..., Tensor], context: Tensor | None, control: Tensor | None, precision: str
) -> Predict:
    """Return the `predict` of `network.predictor` for a network that computes in `precision`; its output is float32."""
    predict = network_predictor(network, context, control)
    if precision == "no":
        return predict

    def lower(x: Tensor, t: float, condition: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, DTYPES[precision]):
            output = predict(x, t, condition)
        return output.float()

    return lower


def lowered(network: AnyNetwork, precision: str) -> AnyNetwork:
    """Return a copy whose linear and convolutional layers are stored in `precision`; all else stays in float32.

    On a GPU convolutions also get the layout NHWC, which the tensor cores read.
    """
    lower = copy.deepcopy(network)
    for module in lower.modules():
        if isinstance(module, LAYERS):
            module.to(DTYPES[precision])
    on_gpu = any(weights.is_cuda for weights in lower.parameters())
    return lower.to(memory_format=torch.channels_last) if on_gpu else lower  # type: ignore[call-overload]


def in_precision(pipeline: Pipeline, precision: str) -> Pipeline:
    """Return the pipeline with the network that draws, its companions and its ControlNet in `precision`.

    The weights of autoencoder and text encoder stay as they are; with "bf16" the pipeline decodes in bfloat16. "no"
    returns the same pipeline.
    """
    if precision == pipeline.precision:
        return pipeline
    companions = {name: lowered(network, precision) for name, network in pipeline.companions.items()}
    control = None if pipeline.control is None else lowered(pipeline.control, precision)
    network = lowered(pipeline.network, precision)
    return replace(pipeline, network=network, companions=companions, control=control, precision=precision)
