"""TensorRT without a GPU: what is asked of it when an engine is built, and the calls of an engine, by stubs.

The stub engine computes on the CPU: it reads and writes memory at the addresses that it was given.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
import types
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
import torch

from models import tensorrt_engine
from models.tensorrt_engine import BATCHES, LARGE_BATCHES, Engine


def at(address: int, shape: tuple[int, ...], kind: type = ctypes.c_float) -> np.ndarray:
    return np.ctypeslib.as_array((kind * math.prod(shape)).from_address(address)).reshape(shape)


class Context:
    """Computes sample + t, plus the text's mean if there is a text."""

    def __init__(self, engine: EngineStub) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        engine.contexts.append(self)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, _: str) -> tuple[int, ...]:
        return self.shapes["sample"]

    def execute_async_v3(self, stream: int) -> bool:
        self.engine.log.append(f"enqueue on {stream}")
        sample = at(self.addresses["sample"], self.shapes["sample"])
        t = at(self.addresses["timestep"], self.shapes["timestep"], ctypes.c_int64)
        text = at(self.addresses["text"], self.shapes["text"]).mean(axis=(1, 2)) if "text" in self.shapes else 0 * t
        at(self.addresses["output"], self.shapes["sample"])[:] = sample + (t + text)[:, None, None, None]
        return True


class EngineStub:
    names = ("sample", "timestep", "text", "output")
    num_io_tensors = len(names)

    def __init__(self) -> None:
        self.contexts, self.log = [], []

    def get_tensor_name(self, number: int) -> str:
        return self.names[number]

    def get_tensor_profile_shape(self, *_: object) -> list[tuple[int, ...]]:
        return [(batch, 1, 2, 2) for batch in (1, 2, 4)]

    def create_execution_context(self) -> Context:
        return Context(self)


class Graph:
    """A CUDA graph: what was enqueued while it was captured."""

    def replay(self) -> None:
        self.log.append("replay")
        self.enqueue()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> EngineStub:
    """An engine that is deserialised by a stub of the package, with streams and graphs that note their use."""
    engine = EngineStub()
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda serialised: engine)
    logger = types.SimpleNamespace(ERROR=0)
    package = types.SimpleNamespace(Runtime=lambda _: runtime, Logger=lambda *_: logger)
    package.Logger.ERROR = 0
    stream = types.SimpleNamespace(
        cuda_stream=7, wait_stream=lambda _: engine.log.append("wait"), synchronize=lambda: engine.log.append("done")
    )

    @contextlib.contextmanager
    def capturing(graph: Graph, stream: object):
        yield
        graph.log, graph.enqueue = engine.log, lambda: engine.contexts[-1].execute_async_v3(0)

    monkeypatch.setitem(sys.modules, "tensorrt", package)
    monkeypatch.setattr(tensorrt_engine, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    return engine


def inputs(batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng((batch, seed))
    return tuple(random.standard_normal(shape, dtype=np.float32) for shape in ((batch, 1, 2, 2), (batch, 3, 5)))


def test_a_text_conditional_network_is_evaluated_and_replayed(stub):
    engine = Engine(b"")
    for seed in range(4):
        x, text = inputs(3, seed)
        expected = x + seed + text.mean(axis=(1, 2))[:, None, None, None]
        assert np.allclose(engine.predict(x, seed, text), expected, atol=1e-6)
    enqueue = "enqueue on 7"
    assert stub.log[:8] == ["wait", enqueue, "done", "wait", enqueue, "replay", "enqueue on 0", "done"]
    assert stub.log.count(enqueue) == 2 and stub.log.count("replay") == 3, "captured once, then replayed"
    assert len(stub.contexts) == 1
    engine.predict(*(inputs(2)[0], 1, inputs(2)[1]))
    assert len(stub.contexts) == 2, "another shape has memory of its own"


def test_an_engine_that_cannot_be_captured_is_enqueued(stub, monkeypatch):
    @contextlib.contextmanager
    def refused(graph: Graph, stream: object):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    engine = Engine(b"")
    for seed in range(3):
        x, text = inputs(2, seed)
        assert np.allclose(engine.predict(x, 0, text), x + text.mean(axis=(1, 2))[:, None, None, None], atol=1e-6)
    assert "replay" not in stub.log


def test_a_batch_beyond_the_profile_is_refused(stub):
    x, text = inputs(5)
    with pytest.raises(ValueError, match="the TensorRT engine takes at most 4 images at a time, not 5; draw fewer"):
        Engine(b"").predict(x, 3, text)


class Flag(IntEnum):
    STRONGLY_TYPED = 1
    TF32 = 2


def test_an_engine_is_strongly_typed_without_tf32_and_has_a_profile_of_every_input(tmp_path, monkeypatch):
    asked = []
    shapes = {"sample": (-1, 4, 64, 64), "timestep": (-1,), "text": (-1, 77, 768)}
    values = [types.SimpleNamespace(name=name, shape=shape) for name, shape in shapes.items()]
    network = types.SimpleNamespace(num_inputs=len(values), get_input=values.__getitem__)
    profile = types.SimpleNamespace(set_shape=lambda name, *each: asked.append((name, each)))
    config = types.SimpleNamespace(
        clear_flag=lambda flag: asked.append(("clear", flag)), add_optimization_profile=lambda _: None
    )
    builder = types.SimpleNamespace(
        create_network=lambda flags: asked.append(("flags", flags)) or network,
        create_optimization_profile=lambda: profile,
        create_builder_config=lambda: config,
        build_serialized_network=lambda *_: b"engine",
    )
    package = types.SimpleNamespace(
        Logger=types.SimpleNamespace,
        Builder=lambda _: builder,
        NetworkDefinitionCreationFlag=Flag,
        BuilderFlag=Flag,
        OnnxParser=lambda *_: types.SimpleNamespace(parse_from_file=lambda name: Path(name).exists()),
    )
    package.Logger = type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None})
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    graph = tmp_path / "unet.onnx"
    graph.write_bytes(b"graph")
    for batches in (BATCHES, LARGE_BATCHES):
        asked.clear()
        assert tensorrt_engine.build(graph) == b"engine"
        assert asked[0] == ("flags", 1 << Flag.STRONGLY_TYPED)
        expected = [(name, tuple((batch, *shape[1:]) for batch in batches)) for name, shape in shapes.items()]
        assert asked[1:4] == expected
        assert asked[4] == ("clear", Flag.TF32)
        asked.clear()
        tensorrt_engine.build(graph, tf32=True)
        assert ("clear", Flag.TF32) not in asked
        monkeypatch.setattr(tensorrt_engine, "LARGE_BYTES", 4)  # then this graph is large
