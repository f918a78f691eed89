"""One evaluation of the network by ONNX Runtime and TensorRT, compared with PyTorch, eager and compiled.

All in float32 with TF32 where the device has it, on tensors that lie on the device. The graph is the one that the stage
`export` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from infra.bench.gpu import recipe
from infra.bench.gpu.plan import Row, Send, Setting
from infra.bench.gpu.timing import attempt, psnr, seconds_for, seconds_per_call, timed
from infra.bench.gpu.training import Form
from models import onnx_graph, tensorrt_engine
from models.device import set_arithmetic
from models.networks.unet import UNet
from models.noise.samplers import SchedulerConfig
from models.pipeline import Pipeline, PipelineInfo

PART = "runtimes"
OPSET = 20
BATCHES, TINY_BATCHES = (16, 256), (2,)
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}

Evaluate: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x float32 [B, C, S, S], t int64 [B]) -> network output float32 [B, C, S, S], all on the device."""


def measure(setting: Setting, send: Send) -> None:
    set_arithmetic(tf32=True)  # in matrix products too, which the others use by default
    network = _network(setting)
    graph = setting.work / "network.onnx"
    compiled = Form("fp32", compiled=True).compile(network, setting.tiny)
    expected: dict[int, Tensor] = {}
    for runtime in (
        Runtime("PyTorch, eager", lambda: network),
        Runtime("ONNX Runtime", lambda: _onnxruntime(network, graph, setting.device)),
        Runtime("TensorRT", lambda: _tensorrt(network, graph)),
        Runtime("PyTorch, compiled", lambda: compiled),
    ):
        if runtime.name == "TensorRT" and (reason := tensorrt_engine.unavailable_because()):
            send(Row(PART, runtime.name, skipped=reason))
            continue
        for batch in TINY_BATCHES if setting.tiny else BATCHES:
            case = f"{runtime.name}, batch {batch}"
            send(attempt(setting, PART, case, partial(_measured, setting, runtime, batch, expected)))


class Runtime:
    """A way to evaluate the network, made at its first use."""

    def __init__(self, name: str, make: Callable[[], Evaluate]) -> None:
        self.name, self._make = name, make
        self._made: Evaluate | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self._made is None:
            self._made = self._make()
        return self._made(x, t)


def _measured(setting: Setting, runtime: Runtime, batch: int, expected: dict[int, Tensor]) -> Row:
    """Measure one batch size; `expected` are the outputs of the first runtime by batch size."""
    size = recipe.config_of(setting.tiny).size
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(setting.device)
    t = torch.arange(batch, device=setting.device) % recipe.TIMESTEPS
    outputs: list[Tensor] = []
    with torch.inference_mode():
        first = timed(lambda: outputs.append(runtime(x, t).clone()), setting.device)
        reference = expected.setdefault(batch, outputs[0])
        seconds = seconds_per_call(lambda: runtime(x, t), setting.device, seconds_for(setting, 2.0))
    return Row(
        PART,
        f"{runtime.name}, batch {batch}",
        batch=batch,
        precision="fp32",
        img_s=batch / seconds,
        ms=1000 * seconds,
        first_s=first,
        psnr_db=psnr(outputs[0], reference, float(reference.max() - reference.min())),
    )


def _network(setting: Setting) -> UNet:
    """Build the network with random weights everywhere: a new one starts with zeros in its last layer."""
    torch.manual_seed(0)
    network = UNet(recipe.config_of(setting.tiny)).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return network.to(setting.device)


def _export(network: UNet, graph: Path) -> None:
    """Write the ONNX graph of the network."""
    config = network.config
    info = PipelineInfo(
        conditioning="none",
        channels=config.channels,
        size=config.size,
        schedule=recipe.SCHEDULE,
        timesteps=recipe.TIMESTEPS,
        prediction=recipe.PREDICTION,
        train_key="",
        classes=[],
    )
    copy = UNet(config).eval().requires_grad_(False)
    copy.load_state_dict({name: value.cpu() for name, value in network.state_dict().items()})
    pipeline = Pipeline(copy, SchedulerConfig(recipe.noise_path(), recipe.PREDICTION), info)
    onnx_graph.write(onnx_graph.to_onnx(pipeline, OPSET), graph)


def _onnxruntime(network: UNet, graph: Path, device: str) -> Evaluate:
    """Load the graph into ONNX Runtime, with inputs and outputs bound to tensors on the device.

    Raises:
        RuntimeError: if it would fall back to the CPU.
    """
    provider = PROVIDERS[device]
    if device == "cuda":
        onnxruntime.preload_dlls()
    _export(network, graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=[provider])
    if provider not in session.get_providers():
        raise RuntimeError(f"this onnxruntime has no {provider}")

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        output, binding = torch.empty_like(x), session.io_binding()
        for name, value, dtype in (("sample", x, np.float32), ("timestep", t, np.int64)):
            binding.bind_input(name, device, 0, dtype, tuple(value.shape), value.data_ptr())
        binding.bind_output(onnx_graph.OUTPUT, device, 0, np.float32, tuple(output.shape), output.data_ptr())
        if device == "cuda":
            torch.cuda.current_stream().synchronize()  # the session has a stream of its own
        session.run_with_iobinding(binding)
        return output

    return evaluate


def _tensorrt(network: UNet, graph: Path) -> Evaluate:
    """Build a TensorRT engine from the graph, which ONNX Runtime may have left."""
    if not graph.exists():
        _export(network, graph)
    engine = tensorrt_engine.Engine(tensorrt_engine.build(graph, tf32=True))
    return lambda x, t: engine.run({"sample": x, "timestep": t})
