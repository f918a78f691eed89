"""Export to ONNX: the network, the autoencoder and the text encoders, with a dynamic batch size.

Everything is in float32; the network can be in float16. An export of the same model gives the same bytes. onnx is
imported where it is used (0.5 s).
"""

from __future__ import annotations

import logging
import os
import warnings
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any

import torch

from models.networks.text_encoder import pack
from models.noise.paths import RectifiedFlow

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import onnx
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from models.networks.autoencoder import Autoencoder
    from models.pipeline import Pipeline

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in models/bundle.py, for the conversion to float16

INPUTS = ("sample", "timestep", "label", "text")
OUTPUT = "output"
EXAMPLE_BATCH = 2
"""The exporter can treat a batch of 1 as a constant even if its dimension is declared dynamic."""
FLOAT32 = ("InstanceNormalization", "GroupNormalization", "LayerNormalization", "Softmax")
"""Operators that stay in float32 in a graph of float16, as with `evaluate.precision`."""
MAX_EMBEDDED_BYTES = 2**31 - 2**26
"""Most bytes of weights inside a graph's file: protobuf messages are limited to 2 GiB, nodes included."""


def to_onnx(pipeline: Pipeline, opset: int, precision: str = "fp32") -> onnx.ModelProto:
    """Export the network; in the precision "fp16" its layers are in float16, its inputs and output in float32.

    Inputs: `sample` float32 [batch, C, H, W], `timestep` int64 [batch] (float32 for a rectified flow) and, for a
    conditional model, `label` int64 [batch] or `text` float32 [batch, L, D]. Output: `output` float32 [batch, C, H, W].

    Raises:
        ValueError: for a model with another kind of condition.
        RuntimeError: if the exporter fixed the batch size.
    """
    conditioning = pipeline.info.conditioning
    if conditioning not in ("none", "label", "text"):
        raise ValueError(f"a model conditioned on {conditioning!r} cannot be exported to ONNX; use none, label or text")
    if pipeline.context_channels:
        raise ValueError("an inpainting U-Net cannot be exported to ONNX; export the model that it was made from")
    names = [*INPUTS[:2], *([conditioning] if conditioning != "none" else [])]
    return _graph(pipeline.network, example_inputs(pipeline, EXAMPLE_BATCH), names, opset, precision)


def decoder_to_onnx(pipeline: Pipeline, opset: int) -> onnx.ModelProto:
    """Export the decoder: `latent` float32 [batch, k, s, s] -> `output` float32 [batch, C, H, W]."""
    assert pipeline.autoencoder is not None, "called for a model of latents"
    latent = torch.zeros(EXAMPLE_BATCH, *pipeline.info.input_shape)
    return _graph(_Decoder(pipeline.autoencoder), (latent,), ["latent"], opset)


def encoder_to_onnx(pipeline: Pipeline, opset: int) -> onnx.ModelProto:
    """Export the encoder: `image` float32 [batch, C, H, W] -> `output` float32 [batch, k, s, s], scaled means."""
    assert pipeline.autoencoder is not None, "called for a model of latents"
    image = torch.zeros(EXAMPLE_BATCH, pipeline.info.channels, pipeline.info.size, pipeline.info.size)
    return _graph(_Encoder(pipeline.autoencoder), (image,), ["image"], opset)


def text_to_onnx(pipeline: Pipeline, opset: int) -> onnx.ModelProto:
    """Export the text encoder: `ids` int64 [batch, L] -> `output` float32 [batch, L, D].

    With two encoders there is a second input `ids_2`, and the output is packed (see `models/networks/text_encoder.py`):
    [batch, L + 1, D].
    """
    assert pipeline.text is not None, "called for a text-conditional model"
    towers = pipeline.text.towers
    ids = tuple(tower.token_ids([""] * EXAMPLE_BATCH) for tower in towers)
    module = _Hidden(*(tower.model for tower in towers)) if len(towers) == 1 else _Packed(*(t.model for t in towers))
    return _graph(module, ids, ["ids", "ids_2"][: len(ids)], opset)


def write(graph: onnx.ModelProto, file: Path, max_embedded_bytes: int = MAX_EMBEDDED_BYTES) -> list[Path]:
    """Write a graph deterministically; returns the files written.

    Weights of more than `max_embedded_bytes` go into a second file, `<name>.data`, in ONNX's external data format.
    """
    from onnx.external_data_helper import convert_model_to_external_data, write_external_data_tensors

    external = file.with_name(f"{file.name}.data")
    if sum(len(weight.raw_data) for weight in graph.graph.initializer) > max_embedded_bytes:
        convert_model_to_external_data(graph, location=external.name)
        write_external_data_tensors(graph, str(file.parent))
    file.write_bytes(graph.SerializeToString(deterministic=True))
    return [path for path in (file, external) if path.exists()]


def example_inputs(pipeline: Pipeline, batch: int) -> tuple[torch.Tensor, ...]:
    """Return zeros with the shapes and dtypes of the network's inputs."""
    dtype = torch.float32 if isinstance(pipeline.path, RectifiedFlow) else torch.int64
    inputs = (torch.zeros(batch, *pipeline.info.input_shape), torch.zeros(batch, dtype=dtype))
    condition, _ = pipeline.condition(None if pipeline.info.conditioning == "none" else [0] * batch)
    return inputs if condition is None else (*inputs, torch.zeros_like(condition))


def _graph(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], names: list[str], opset: int, precision: str = "fp32"
) -> onnx.ModelProto:
    graph = _traced(module, inputs, names, opset)
    if precision == "fp16":
        graph = _in_float16(graph)
    for value in [*graph.graph.input, *graph.graph.output]:
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise RuntimeError(f"the exporter fixed the batch size of {value.name!r}")
    _strip(graph)
    return graph


def _traced(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], names: list[str], opset: int) -> onnx.ModelProto:
    batch = torch.export.Dim("batch")
    # The exporter logs operators of packages that are not installed, and the dimension that inputs share.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=[OUTPUT],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no graph")
    return program.model_proto


def _in_float16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Convert weights and operators to float16, except those of `FLOAT32` and what the embedding of t is made from.

    The frequencies of the embedding times t exceed the digits of float16, and so does t of a rectified flow. The
    conversion needs the shapes and types that the exporter inferred, because onnx infers those of graphs below 2 GiB
    only.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    makers = {name: node for node in graph.graph.node for name in node.output}
    kept: dict[str, onnx.NodeProto] = {}
    waiting = [node for node in graph.graph.node if node.op_type in ("Sin", "Cos")]
    while waiting:
        node = waiting.pop()
        if node.name not in kept:
            kept[node.name] = node
            waiting += [makers[name] for name in node.input if name in makers]
    own = {node.name for node in graph.graph.node}
    converted = convert_float_to_float16(
        graph,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32],
        node_block_list=list(kept),
    )
    _skip_rounding(converted.graph, own)
    _sort(converted.graph)
    return converted


def _skip_rounding(graph: onnx.GraphProto, own: set[str]) -> None:
    """Let operators in float32 read values in float32 as they are.

    The conversion rounds every value to float16, and gives operators in float32 the rounded one, by casts that it adds
    to the nodes of the graph, whose names are `own`.
    """
    from onnx import TensorProto

    casts = {node.output[0]: node for node in graph.node if node.name not in own}
    to = {name: node.attribute[0].i for name, node in casts.items()}
    exact = {
        name: casts[node.input[0]].input[0]
        for name, node in casts.items()
        if to[name] == TensorProto.FLOAT and to.get(node.input[0]) == TensorProto.FLOAT16
    }
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = exact.get(name, name)
    outputs = {value.name for value in graph.output}
    for unread in (TensorProto.FLOAT, TensorProto.FLOAT16):  # the second kind is read by the first
        read = outputs.union(*(node.input for node in graph.node))
        left = [node for node in graph.node if to.get(node.output[0]) != unread or node.output[0] in read]
        del graph.node[:]
        graph.node.extend(left)


def _sort(graph: onnx.GraphProto) -> None:
    """Put every node after those whose output it reads, and keep one of equal ones, as the format demands.

    The conversion appends its casts, and repeats the cast of a value for every node that reads it.
    """
    nodes = list({tuple(node.output): node for node in graph.node}.values())
    makers = {name: number for number, node in enumerate(nodes) for name in node.output}
    needs = {number: [makers[name] for name in node.input if name in makers] for number, node in enumerate(nodes)}
    order = TopologicalSorter(needs).static_order()
    del graph.node[:]
    graph.node.extend(nodes[number] for number in order)


def _strip(graph: onnx.ModelProto) -> None:
    """Remove debugging data: stack traces, which contain paths of this machine, and inferred shapes."""
    inner = graph.graph
    parts: Iterable[Any] = [*inner.node, *inner.input, *inner.output, *inner.initializer]  # protobuf messages
    for message in parts:
        del message.metadata_props[:]
        message.doc_string = ""
    for owner in (graph, inner):
        del owner.metadata_props[:]
    del inner.value_info[:]


class _Decoder(torch.nn.Module):
    """Scaled latents -> images."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder, self.factor = autoencoder, autoencoder.config.scaling_factor

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode(latent / self.factor, return_dict=False)[0]


class _Encoder(torch.nn.Module):
    """Images -> the means of their scaled latents."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder, self.factor = autoencoder, autoencoder.config.scaling_factor

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        encoded = self.autoencoder.encode(image)
        return self.factor * (encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean)


class _Hidden(torch.nn.Module):
    """Token ids -> the text encoder's last hidden state."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).last_hidden_state


class _Packed(torch.nn.Module):
    """Token ids of two tokenizers -> the packed condition without sizes."""

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: torch.Tensor, second_ids: torch.Tensor) -> torch.Tensor:
        return pack(self.first, self.second, ids, second_ids)
