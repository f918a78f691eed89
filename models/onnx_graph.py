"""The U-Net as an ONNX graph: float32, any batch size, the same bytes every time."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    import torch

    from models.pipeline import Pipeline

INPUTS = ("sample", "timestep", "label")
OUTPUT = "output"
EXAMPLE_BATCH = 2
"""A batch of 1 can be taken for a constant, whatever is declared dynamic."""


def to_onnx(pipeline: Pipeline, opset: int) -> bytes:
    """Serialised graph with inputs `sample` float32 [batch, C, H, W], `timestep` int64 [batch] and, where
    the model is class-conditional, `label` int64 [batch]; output `output` float32 [batch, C, H, W].

    Raises `ValueError` for a model conditioned on anything else, `RuntimeError` where the exporter
    fixed the batch size.
    """
    if pipeline.conditioning not in ("none", "label"):
        raise ValueError(f"a model conditioned on {pipeline.conditioning!r} has no ONNX form here; use none or label")
    graph = _traced(pipeline, opset)
    for value in [*graph.graph.input, *graph.graph.output]:
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise RuntimeError(f"the exporter fixed the batch size of {value.name!r}")
    _strip(graph)
    return graph.SerializeToString(deterministic=True)


def example_inputs(pipeline: Pipeline, batch: int) -> tuple[torch.Tensor, ...]:
    """Zeros in the shapes and dtypes of the network's inputs."""
    import torch

    x = torch.zeros(batch, pipeline.channels, pipeline.size, pipeline.size)
    indices = torch.zeros(batch, dtype=torch.int64)
    return (x, indices, indices.clone()) if pipeline.conditioning == "label" else (x, indices)


def _traced(pipeline: Pipeline, opset: int) -> onnx.ModelProto:
    import torch

    inputs = example_inputs(pipeline, EXAMPLE_BATCH)
    batch = torch.export.Dim("batch")
    # It reports the operators of packages that are not here, and the axis that inputs share.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            pipeline.unet,
            inputs,
            dynamo=True,
            opset_version=opset,
            input_names=list(INPUTS[: len(inputs)]),
            output_names=[OUTPUT],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("the exporter gave no graph")
    return program.model_proto


def _strip(graph: onnx.ModelProto) -> None:
    """Drop what only the exporter's debugger reads: traces with the paths of this machine, inferred shapes."""

    def clear(message: Any) -> None:
        del message.metadata_props[:]

    clear(graph)
    clear(graph.graph)
    for part in (graph.graph.node, graph.graph.input, graph.graph.output, graph.graph.initializer):
        for message in part:
            clear(message)
            message.doc_string = ""
    del graph.graph.value_info[:]
