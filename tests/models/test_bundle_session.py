"""ONNX Runtime with inputs and outputs that keep their place in a device's memory, here that of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from models import bundle
from models.bundle import CPU, CUDA, GRAPH_ID, MOST_SHAPES, Session


@pytest.mark.parametrize("module", ["models.bundle", "models.onnx_graph"])
def test_onnx_runtime_reports_nothing_to_its_maker(tmp_path, module):
    """It keeps an identifier and its events in the home folder, and a session in the temporary folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    kept |= {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    command = [sys.executable, "-B", "-c", f"import {module}, onnxruntime; onnxruntime.SessionOptions()"]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=kept, check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A graph of the sum of `sample` and `timestep`, for any batch."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("sample", "timestep")]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])
    nodes = [helper.make_node("Add", ["sample", "timestep"], ["output"])]
    model = helper.make_model(
        helper.make_graph(nodes, "sum", inputs, [output]), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 9
    onnx.save(model, tmp_path / "sum.onnx")
    return tmp_path / "sum.onnx"


def opened(graph: Path, **options) -> Session:
    return Session(graph, onnxruntime.SessionOptions(), [CPU], **options)


def feed(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng((batch, seed))
    return {name: random.standard_normal((batch, 2), dtype=np.float32) for name in ("sample", "timestep")}


def test_bound_calls_give_the_bytes_of_copied_calls(graph):
    bound, copied = opened(graph, bound="cpu"), opened(graph)
    assert copied.device is None, "on a CPU there is nothing to keep"
    given = [feed(batch, seed) for batch in (1, 3, 1, 3) for seed in range(3)]
    given.append({name: value[::-1] for name, value in feed(3).items()})  # not contiguous
    found = [bound.run(each) for each in given]
    assert all(np.array_equal(a, copied.run(each)) for a, each in zip(found, given, strict=True))
    assert len(bound._places) == 2, "one place for each shape"


def test_an_output_is_not_overwritten_by_the_next_call(graph):
    session = opened(graph, bound="cpu")
    outputs = [session.run(feed(2, seed)) for seed in range(3)]
    assert all(np.array_equal(output, sum(feed(2, seed).values())) for seed, output in enumerate(outputs))


def test_further_shapes_are_copied(graph):
    session = opened(graph, bound="cpu")
    for batch in range(1, MOST_SHAPES + 3):
        for _ in range(2):
            assert np.array_equal(session.run(feed(batch)), sum(feed(batch).values()))
    assert len(session._places) == MOST_SHAPES


class Stub:
    """An InferenceSession of a GPU that refuses CUDA graphs, or fails otherwise."""

    def __init__(self, providers: list, complaint: str = "") -> None:
        self.options = dict(entry if isinstance(entry, tuple) else (entry, {}) for entry in providers)
        if complaint and self.options[CUDA].get("enable_cuda_graph"):
            raise RuntimeError(complaint)

    def get_providers(self) -> list[str]:
        return list(self.options)


@pytest.mark.parametrize("complaint", ["", "This session cannot use the graph capture feature"])
def test_a_graph_that_cannot_be_captured_is_launched_operator_by_operator(monkeypatch, complaint):
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, providers: Stub(providers, complaint))
    session = Session(Path("x"), onnxruntime.SessionOptions(), [(CUDA, {"use_tf32": 0}), CPU], captured=True)
    expected = {"use_tf32": 0} if complaint else {"use_tf32": 0, "enable_cuda_graph": "1"}
    assert session.session.options == {CUDA: expected, CPU: {}}
    assert (session.captured, session.device) == (not complaint, "cuda")


def test_another_error_is_raised(monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, providers: Stub(providers, "out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        Session(Path("x"), onnxruntime.SessionOptions(), [(CUDA, {}), CPU], captured=True)


def test_every_shape_has_a_cuda_graph_of_its_own_and_the_first_call_none(graph, monkeypatch):
    session = opened(graph, bound="cpu")
    session.captured = True  # the CPU ignores the option
    numbers = []
    options = bundle._run_options
    monkeypatch.setattr(bundle, "_run_options", lambda number: numbers.append(number) or options(number))
    for batch in (1, 1, 4, 4):
        session.run(feed(batch))
    assert numbers == ["-1", "1", "-1", "2"]
    assert options("2").get_run_config_entry(GRAPH_ID) == "2"
