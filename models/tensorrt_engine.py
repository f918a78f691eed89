"""TensorRT engines: built from the ONNX graph and run; on a machine without TensorRT, the reason why not.

Needs an NVIDIA GPU and the extra `tensorrt`, whose package is imported where it is used. An engine works only with the
GPU and the TensorRT version that it was built with, and its bytes differ between builds: it is a cache, never part of a
model.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.hashing import file_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping

OUTPUT = "output"
BATCHES, LARGE_BATCHES = (1, 16, 256), (1, 4, 16)
"""Smallest, optimal and largest batch size of the optimisation profile; the second of a large graph."""
SETTINGS = "strongly typed, no TF32"
"""How engines are built, in the name under which they are kept."""
LARGE_BYTES = 400 << 20
"""A graph whose files are larger is large."""
DEVICE = "cuda:0"
"""Where engines are built and run."""
MOST_SHAPES = 8
"""Shapes of the inputs that have memory and a captured graph of their own, at most."""


def batches_of(graph: Path) -> tuple[int, int, int]:
    """Return the smallest, the optimal and the largest batch size of the engine of an ONNX file."""
    return LARGE_BATCHES if sum(file.stat().st_size for file in _files(graph)) > LARGE_BYTES else BATCHES


def _files(graph: Path) -> list[Path]:
    """Return an ONNX file, and that of its external weights if there is one."""
    return sorted(graph.parent.glob(f"{graph.name}*"))


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

    return f"tensorrt {tensorrt.__version__} on {torch.cuda.get_device_name(DEVICE)}"


def cache_key(graph: Path) -> str:
    """Return the name under which the engine of an ONNX file is kept: a hash of all that it depends on.

    That is the content of the graph and of its external weights, the batch sizes, the version of TensorRT and the GPU.
    """
    digest = hashlib.sha256(f"{identity()} {SETTINGS} {batches_of(graph)}".encode())
    for file in _files(graph):
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()[:16]


def require_batch(images: int, largest: int) -> None:
    """Check that an engine takes a batch.

    Raises:
        ValueError: if it is larger than the `largest` of the engine's profile, in one sentence.
    """
    if images > largest:
        raise ValueError(f"the TensorRT engine takes at most {largest} images at a time, not {images}; draw fewer")


def build(graph: Path, tf32: bool = False) -> bytes:
    """Build a serialised engine from an ONNX file, for the batch sizes `batches_of`.

    The engine is strongly typed: every layer computes in the type that the graph says, float16 for a bundle of
    `export.precision` fp16, and float32 in full unless `tf32` allows products of TF32.

    Raises:
        RuntimeError: with TensorRT's first error, if it cannot parse the graph or build the engine.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise RuntimeError(f"TensorRT cannot read {graph.name}: {parser.get_error(0).desc()}")
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        value = network.get_input(i)
        rest = tuple(value.shape)[1:]
        profile.set_shape(value.name, *((batch, *rest) for batch in batches_of(graph)))
    config = builder.create_builder_config()
    if not tf32:  # TensorRT's own setting allows it
        config.clear_flag(trt.BuilderFlag.TF32)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError("TensorRT built no engine; its log above says why")
    return bytes(engine)


class Engine:
    """A deserialised engine of a network, with the `predict` of `models.bundle.Bundle`, or of a decoder.

    It works on a stream of its own. The second call with the same shapes replays a CUDA graph of the first.
    """

    def __init__(self, serialised: bytes) -> None:
        import tensorrt as trt

        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(serialised)
        if self._engine is None:
            raise RuntimeError("TensorRT cannot load the engine; delete it, so that it is built again")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.inputs = [name for name in names if name != OUTPUT]
        """Names of the inputs."""
        self.largest = int(self._engine.get_tensor_profile_shape(self.inputs[0], 0)[2][0])
        """Most images at a time."""
        self._stream = torch.cuda.Stream(DEVICE)
        self._calls: dict[tuple[object, ...], _Call] = {}

    def predict(self, x: np.ndarray, t: float, condition: np.ndarray | None = None) -> np.ndarray:
        """Evaluate the network at one timestep.

        x: float32 [N, C, H, W]. condition: labels int64 [N] or embedded text float32 [N, L, D]. Returns float32
        [N, C, H, W].

        Raises:
            ValueError: for more images than the profile of the engine has.
        """
        time = np.full(len(x), t, np.int64 if isinstance(t, int) else np.float32)
        feed = {"sample": x, "timestep": time}
        if condition is not None:
            (name,) = (name for name in self.inputs if name not in feed)
            feed[name] = condition
        return self.run({name: torch.from_numpy(value) for name, value in feed.items()}).cpu().numpy()

    def run(self, feed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the output on the GPU for the inputs by name, on any device; the next call of its shape replaces it.

        Raises:
            ValueError: as `predict`.
        """
        require_batch(len(next(iter(feed.values()))), self.largest)
        shapes = tuple((name, value.shape) for name, value in feed.items())
        if shapes not in self._calls:
            if len(self._calls) == MOST_SHAPES:
                self._calls.pop(next(iter(self._calls)))  # the oldest
            self._calls[shapes] = _Call(self._engine, feed, self._stream)
        return self._calls[shapes](feed)


class _Call:
    """Memory, execution context and, after the first call, the CUDA graph for one shape of the inputs."""

    def __init__(self, engine: Any, feed: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> None:
        self.context, self.stream = engine.create_execution_context(), stream
        self.inputs = {name: torch.empty_like(value, device=DEVICE) for name, value in feed.items()}
        for name, value in self.inputs.items():
            self.context.set_input_shape(name, tuple(value.shape))
            self.context.set_tensor_address(name, value.data_ptr())
        self.output = torch.empty(tuple(self.context.get_tensor_shape(OUTPUT)), device=DEVICE)
        self.context.set_tensor_address(OUTPUT, self.output.data_ptr())
        self.graph: torch.cuda.CUDAGraph | None = None
        self.count = 0

    def __call__(self, feed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.stream.wait_stream(torch.cuda.current_stream(DEVICE))  # the caller may have just computed the inputs
        with torch.cuda.stream(self.stream):
            for name, value in feed.items():
                self.inputs[name].copy_(value)
            if self.count == 1:  # TensorRT allocates in the first call, which a graph cannot
                self.graph = self._captured()
            if self.graph is None:
                self._enqueue()
            else:
                self.graph.replay()
        self.stream.synchronize()
        self.count += 1
        return self.output

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """Return the CUDA graph of a call; None for an engine with operators that cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._enqueue()
        except RuntimeError:
            return None
        return graph

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError("TensorRT could not run the engine")
