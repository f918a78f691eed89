"""TensorRT engines: built from the ONNX graph and run; on a machine without TensorRT, the reason why not.

Needs an NVIDIA GPU and the extra `tensorrt`, whose package is imported where it is used. An engine works only with the
GPU and the TensorRT version that it was built with, and its bytes differ between builds: it is a cache, never part of a
model.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.hashing import file_sha256

if TYPE_CHECKING:
    import numpy as np

BATCHES = (1, 16, 256)
"""Smallest, optimal and largest batch size of the optimisation profile."""


def unavailable_because() -> str | None:
    """Return why no engine can be built on this machine; None if one can."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that this PyTorch can use"
    if importlib.util.find_spec("tensorrt") is None:
        return "the package tensorrt is not installed; it comes with the extra 'tensorrt'"
    return None


def identity() -> str:
    """Return the TensorRT version and the GPU, which an engine depends on besides the graph."""
    import tensorrt

    return f"tensorrt {tensorrt.__version__} on {torch.cuda.get_device_name()}"


def cache_key(graph: Path) -> str:
    """Return the name under which the engine of an ONNX file is kept: a hash of all that it depends on.

    That is the content of the graph and of its external weights, the batch sizes, the version of TensorRT and the GPU.
    """
    digest = hashlib.sha256(f"{identity()} {BATCHES}".encode())
    for file in sorted(graph.parent.glob(f"{graph.name}*")):
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()[:16]


def require_batch(images: int) -> None:
    """Check that a batch is one that engines are built for.

    Raises:
        ValueError: if it is larger, in one sentence.
    """
    if images > BATCHES[-1]:
        raise ValueError(f"the TensorRT engine takes at most {BATCHES[-1]} images at a time, not {images}; draw fewer")


def build(graph: Path) -> bytes:
    """Build a serialised engine from an ONNX file, for batch sizes within `BATCHES`.

    Raises:
        RuntimeError: with TensorRT's first error, if it cannot parse the graph or build the engine.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise RuntimeError(f"TensorRT cannot read {graph.name}: {parser.get_error(0).desc()}")
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        value = network.get_input(i)
        rest = tuple(value.shape)[1:]
        profile.set_shape(value.name, *((batch, *rest) for batch in BATCHES))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError("TensorRT built no engine; its log above says why")
    return bytes(engine)


class Engine:
    """A deserialised engine with the `predict` of `models.bundle.Bundle`."""

    def __init__(self, serialised: bytes) -> None:
        import tensorrt as trt

        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(serialised)
        if self._engine is None:
            raise RuntimeError("TensorRT cannot load the engine; delete it, so that it is built again")
        self._context = self._engine.create_execution_context()

    def predict(self, x: np.ndarray, t: float, label: np.ndarray | None = None) -> np.ndarray:
        """Evaluate the network at one timestep: x float32 [N, C, H, W], label int64 [N] -> float32 [N, C, H, W].

        Raises:
            ValueError: for more images than the profile of the engine has.
        """
        require_batch(len(x))
        feed = {
            "sample": torch.from_numpy(x),
            "timestep": torch.full((len(x),), t, dtype=torch.int64 if isinstance(t, int) else torch.float32),
        }
        if label is not None:
            feed["label"] = torch.from_numpy(label)
        return self.run({name: value.cuda() for name, value in feed.items()}).cpu().numpy()

    def run(self, feed: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the engine on inputs on the GPU, by name; returns the output on the GPU after synchronisation."""
        held = {name: value.contiguous() for name, value in feed.items()}
        output = torch.empty_like(held["sample"])
        for name, value in held.items():
            self._context.set_input_shape(name, tuple(value.shape))
            self._context.set_tensor_address(name, value.data_ptr())
        self._context.set_tensor_address("output", output.data_ptr())
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT could not run the engine")
        stream.synchronize()
        return output
