"""One graph of an ONNX bundle in ONNX Runtime. The bundle has a copy of this file.

On a GPU inputs and output keep their place in its memory (IO binding), so that a CUDA graph can replay all kernels of a
call by one launch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
Provider: TypeAlias = str | tuple[str, dict[str, Any]]  # ONNX Runtime's options have values of several types
Feed: TypeAlias = Mapping[str, np.ndarray]

OUTPUT = "output"
GRAPH_ID = "gpu_graph_id"
"""Option of a call: the number of the CUDA graph that is captured or replayed."""
NO_GRAPH = "-1"
MOST_SHAPES = 8
"""Shapes of the inputs that have a place in the memory, at most; calls with further ones copy as on a CPU."""


class Session:
    """A graph with one output, called with NumPy arrays.

    Args:
        file: the graph.
        options: of ONNX Runtime.
        providers: in order of priority.
        captured: whether a GPU captures a CUDA graph for each shape of the inputs. A graph with operators that run on
            the CPU cannot be captured, and is then launched operator by operator.
        bound: the device whose memory the inputs stay in, "cuda" or "cpu"; None is "cuda" if ONNX Runtime uses it.
    """

    def __init__(
        self,
        file: Path,
        options: onnxruntime.SessionOptions,
        providers: Sequence[Provider],
        captured: bool = False,
        bound: str | None = None,
    ) -> None:
        self.session, self.captured = _open(file, options, providers, captured)
        self.providers = list(self.session.get_providers())
        """Execution providers that ONNX Runtime uses, in order of priority."""
        self.device = bound or ("cuda" if CUDA in self.providers else None)
        self._places: dict[tuple[object, ...], _Place] = {}
        self._lock = threading.Lock()

    def run(self, feed: Feed) -> np.ndarray:
        """Return the output for the inputs by name."""
        if self.device is None:
            return self._copied(feed)
        shapes = tuple((name, value.shape, value.dtype) for name, value in feed.items())
        with self._lock:  # the places are shared by all calls
            place = self._places.get(shapes)
            if place is not None:
                return place.run(feed)
            output = self._copied(feed)  # the first call shows the shape of the output, and allocates what kernels need
            if len(self._places) < MOST_SHAPES:
                graph = str(len(self._places) + 1) if self.captured else None
                self._places[shapes] = _Place(self.session, feed, output, self.device, graph)
            return output

    def _copied(self, feed: Feed) -> np.ndarray:
        return np.asarray(self.session.run([OUTPUT], dict(feed), _run_options(NO_GRAPH if self.captured else None))[0])


class _Place:
    """The memory of the inputs and the output of one shape, and the CUDA graph that works on it, if any."""

    def __init__(
        self, session: onnxruntime.InferenceSession, feed: Feed, output: np.ndarray, device: str, graph: str | None
    ) -> None:
        from onnxruntime import OrtValue

        self.session, self.options = session, _run_options(graph)
        # On a CPU the place is the array itself, so it must not be one of the caller's.
        self.inputs = {name: OrtValue.ortvalue_from_numpy(np.array(value), device) for name, value in feed.items()}
        self.output = OrtValue.ortvalue_from_numpy(np.array(output), device)
        self.binding = session.io_binding()
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output(OUTPUT, self.output)

    def run(self, feed: Feed) -> np.ndarray:
        for name, value in feed.items():
            self.inputs[name].update_inplace(np.ascontiguousarray(value))
        self.session.run_with_iobinding(self.binding, self.options)
        return np.array(self.output.numpy())


def _open(
    file: Path, options: onnxruntime.SessionOptions, providers: Sequence[Provider], captured: bool
) -> tuple[onnxruntime.InferenceSession, bool]:
    """Return a session, and whether it captures CUDA graphs."""
    import onnxruntime

    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    if captured and CUDA in names:
        with_graph = [
            (CUDA, {**(provider[1] if isinstance(provider, tuple) else {}), "enable_cuda_graph": "1"})
            if name == CUDA
            else provider
            for name, provider in zip(names, providers, strict=True)
        ]
        try:
            return onnxruntime.InferenceSession(str(file), options, providers=with_graph), True
        except Exception as error:  # its class differs: Fail, NotImplemented, RuntimeException
            if "graph" not in str(error).lower():
                raise
    return onnxruntime.InferenceSession(str(file), options, providers=list(providers)), False


def _run_options(graph: str | None) -> onnxruntime.RunOptions | None:
    if graph is None:
        return None
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(GRAPH_ID, graph)
    return options
