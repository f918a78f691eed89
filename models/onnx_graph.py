"""The U-Net as an ONNX graph, and what stands around it: float32, any batch size, the same bytes every time."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch

from models.networks.text_encoder import pack

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from models.pipeline import Pipeline

INPUTS = ("sample", "timestep", "label", "text")
OUTPUT = "output"
EXAMPLE_BATCH = 2
"""A batch of 1 can be taken for a constant, whatever is declared dynamic."""
MOST_WEIGHTS = 2**31 - 2**26
"""Bytes of weights in a graph's own file. Protobuf writes no message of 2 GiB or more, and the nodes need some."""


def to_onnx(pipeline: Pipeline, opset: int) -> onnx.ModelProto:
    """Graph with inputs `sample` float32 [batch, C, H, W], `timestep` int64 [batch] and, where the model
    is conditional, `label` int64 [batch] or `text` float32 [batch, L, D]; output `output` float32 [batch, C, H, W].

    Raises `ValueError` for a model conditioned on anything else, `RuntimeError` where the exporter
    fixed the batch size.
    """
    if pipeline.conditioning not in ("none", "label", "text"):
        raise ValueError(f"a model conditioned on {pipeline.conditioning!r} has no ONNX form here; use none or label")
    names = [*INPUTS[:2], *([pipeline.conditioning] if pipeline.conditioning != "none" else [])]
    return _graph(pipeline.unet, example_inputs(pipeline, EXAMPLE_BATCH), names, opset)


def decoder_to_onnx(pipeline: Pipeline, opset: int) -> onnx.ModelProto:
    """Graph from latents to images: `latent` float32 [batch, k, s, s] -> `output` float32 [batch, C, H, W]."""
    latent = torch.zeros(EXAMPLE_BATCH, *pipeline.input_shape)
    return _graph(_Decoder(pipeline.autoencoder), (latent,), ["latent"], opset)


def text_to_onnx(pipeline: Pipeline, opset: int) -> onnx.ModelProto:
    """Graph of the text encoder: `ids` int64 [batch, L] -> `output` float32 [batch, L, D]; of two encoders with `ids_2`
    and packed (`models/networks/text_encoder.py`), [batch, L + 1, D]."""
    assert pipeline.text is not None, "asked for a text-conditional model alone"
    towers = pipeline.text.towers
    ids = tuple(tower.token_ids([""] * EXAMPLE_BATCH) for tower in towers)
    module = _Hidden(*(tower.model for tower in towers)) if len(towers) == 1 else _Packed(*(t.model for t in towers))
    return _graph(module, ids, ["ids", "ids_2"][: len(ids)], opset)


def write(graph: onnx.ModelProto, file: Path, most: int = MOST_WEIGHTS) -> list[Path]:
    """Write a graph, the same bytes every time, into a folder of its own files; returns what was written.

    Where its weights take over `most` bytes they go into a second file beside it, `<name>.data`, which whoever loads
    the first finds by itself.
    """
    from onnx.external_data_helper import convert_model_to_external_data, write_external_data_tensors

    beside = file.with_name(f"{file.name}.data")
    if sum(len(weight.raw_data) for weight in graph.graph.initializer) > most:
        convert_model_to_external_data(graph, location=beside.name)
        write_external_data_tensors(graph, str(file.parent))
    file.write_bytes(graph.SerializeToString(deterministic=True))
    return [path for path in (file, beside) if path.exists()]


def example_inputs(pipeline: Pipeline, batch: int) -> tuple[torch.Tensor, ...]:
    """Zeros in the shapes and dtypes of the network's inputs."""
    inputs = (torch.zeros(batch, *pipeline.input_shape), torch.zeros(batch, dtype=torch.int64))
    condition, _ = pipeline.condition(None if pipeline.conditioning == "none" else [0] * batch)
    return inputs if condition is None else (*inputs, torch.zeros_like(condition))


def _graph(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], names: list[str], opset: int) -> onnx.ModelProto:
    graph = _traced(module, inputs, names, opset)
    for value in [*graph.graph.input, *graph.graph.output]:
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise RuntimeError(f"the exporter fixed the batch size of {value.name!r}")
    _strip(graph)
    return graph


def _traced(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], names: list[str], opset: int) -> onnx.ModelProto:
    batch = torch.export.Dim("batch")
    # It reports the operators of packages that are not here, and the axis that inputs share.
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


class _Decoder(torch.nn.Module):
    """Latents as the network sees them -> images."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder, self.factor = autoencoder, autoencoder.config.scaling_factor

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode(latent / self.factor, return_dict=False)[0]


class _Hidden(torch.nn.Module):
    """Token ids -> the text encoder's last hidden state."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).last_hidden_state


class _Packed(torch.nn.Module):
    """Token ids of two tokenizers -> the packed condition without sizes."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: torch.Tensor, second_ids: torch.Tensor) -> torch.Tensor:
        return pack(self.first, self.second, ids, second_ids)
