"""Stage `export`: write the network as an ONNX bundle with a sampler that needs no PyTorch, and verify it.

Nothing is written to `outputs/` unless the bundle agrees with PyTorch. Latencies go to a separate file, which no stage
reads, because they differ between runs.
"""

from __future__ import annotations

import functools
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tasks.formats.model_folder import ExportReport, TensorRTReport
from tasks.formats.verdict import require_accepted
from tasks.params import ExportParams
from tasks.runtime import atomic, closure, integrity, stage, workspace
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    import numpy as np

    from models.bundle import Bundle
    from models.noise.samplers import Sampling
    from models.pipeline import Pipeline
    from models.tensorrt_engine import Engine

Predict: TypeAlias = "Callable[[np.ndarray, float, np.ndarray | None], np.ndarray]"
"""`predict(x, t, condition)` returns the raw network output, float32 [N, *input_shape]."""
Sample: TypeAlias = "Callable[[Sequence[int], Sequence[int] | None, Sampling], np.ndarray]"
"""`sample(seeds, labels, sampling)` draws images, float32 [N, C, H, W]."""

PACKAGE = "afterimage_bundle"
GIVEN = "given.py"
"""In `tasks/drawing`: what reads the images of users; the bundle contains it as well."""
_FROM_TASKS = re.compile(r"^from tasks\.\w+ import", re.MULTILINE)
PARITY_BATCHES, PARITY_TIMES = (1, 2, 5, 8), 3
"""Batch sizes, and timesteps of each, at which raw outputs are compared."""
LARGE_PARAMETERS, LARGE_BATCHES, LARGE_TIMES, LARGE_SAMPLERS = 200_000_000, (1, 3), 2, 2
"""The same for a network with more parameters than the first, and the number of
samplers whose images are compared."""
DRAWN_IMAGES = 4
DRAWN_STEPS = 10
GUIDANCE = 1.5
NO_CONTROL = (
    "the bundle holds the U-Net and not the ControlNet, so that it draws without control maps; with them, draw from "
    "the pipeline, whose folder controlnet/ diffusers loads"
)
TENSORRT_MIN_PSNR = 35
"""Decibel; TensorRT may use TF32 and other kernels than PyTorch."""
TIMING_SECONDS = 0.25
MIN_REPEATS, MAX_REPEATS = 3, 50
"""A timing repeats for `TIMING_SECONDS`, but within these limits."""


def export(pipeline: Path, accepted: Path, onnx: Path, report: Path, latency: Path, params: ExportParams) -> None:
    """Export the network to ONNX with a dynamic batch size, and compare the bundle with PyTorch.

    Writes the bundle (graph, sampler for NumPy and ONNX Runtime, constants) to `onnx`, the comparison to `report`, and
    latencies in milliseconds to `latency`. With an NVIDIA GPU and the extra `tensorrt` an engine is built and compared
    as well; otherwise `report` contains the reason. Fails if a difference exceeds its limit.
    """
    from models.bundle import Bundle
    from models.device import best_device
    from models.parallel import single_thread
    from models.pipeline import load_pipeline

    require_accepted(accepted)
    with integrity.loading(pipeline, "afterimage.json", "train"):
        trained = load_pipeline(pipeline)
    with atomic.writing_folder(onnx) as folder:
        print("export: tracing the network (about 10 s, longer for a large one)", flush=True)
        _write_bundle(folder, trained, params)
        if (device := best_device()) != "cpu":  # tracing needs a copy on the CPU, and the reference is much faster here
            trained = load_pipeline(pipeline, device)
        with single_thread():  # the order of summation, and so the report, is then the same every time
            parity = _parity(trained, Bundle(folder, threads=1), params)
        engine, tensorrt = _tensorrt(trained, folder / "unet.onnx", params)
        table = _latencies(trained, Bundle(folder), engine, params)
    replace(parity, tensorrt=tensorrt, control=NO_CONTROL if trained.control else None).write(report)
    atomic.write_json(latency, table)
    print(
        f"export: max abs difference {parity.max_abs_difference:.1e}, images agree to {parity.min_psnr_db:.0f} dB, "
        f"{parity.providers[0]}"
    )
    print(f"export: tensorrt: {tensorrt.reason or 'engine built and measured'}")
    if trained.control:
        print(f"export: control: {NO_CONTROL}")


def _write_bundle(folder: Path, trained: Pipeline, params: ExportParams) -> None:
    from models import onnx_graph
    from models.bundle_info import BundleInfo, BundleText

    try:
        onnx_graph.write(onnx_graph.to_onnx(trained, params.opset, params.precision), folder / "unet.onnx")
        if guide := _guide_of(trained):
            onnx_graph.write(onnx_graph.to_onnx(guide, params.opset, params.precision), folder / "guide.onnx")
    except ValueError as error:
        raise StageError(str(error)) from None
    text = None
    if trained.autoencoder is not None:
        onnx_graph.write(onnx_graph.decoder_to_onnx(trained, params.opset), folder / "decoder.onnx")
        onnx_graph.write(onnx_graph.encoder_to_onnx(trained, params.opset), folder / "encoder.onnx")
    if trained.text is not None:
        from models.networks.text_encoder import SUFFIXES

        onnx_graph.write(onnx_graph.text_to_onnx(trained, params.opset), folder / "text_encoder.onnx")
        text = BundleText(trained.text.length, {}, trained.text.pooled, trained.info.sizes)
        for tower, suffix in zip(trained.text.towers, SUFFIXES, strict=False):
            tokenizer = tower.tokenizer.backend_tokenizer.to_str()
            (folder / f"tokenizer{suffix}.json").write_text(tokenizer, encoding="utf-8")
            text.pads[suffix] = tower.tokenizer.pad_token_id
    BundleInfo.of(trained.info, trained.scheduler, text).write(folder / "bundle.json")
    for name in closure.closure("models/bundle.py", plumbing=()):
        copied = folder / PACKAGE / Path(name).relative_to("models")
        copied.parent.mkdir(parents=True, exist_ok=True)
        (copied.parent / "__init__.py").touch()
        shutil.copyfile(closure.ROOT / name, copied)
    for name in closure.closure(f"tasks/drawing/{GIVEN}", plumbing=()):  # in the bundle they are neighbours
        code = (closure.ROOT / name).read_text(encoding="utf-8")
        (folder / PACKAGE / Path(name).name).write_text(_FROM_TASKS.sub("from . import", code), encoding="utf-8")


def _guide_of(trained: Pipeline) -> Pipeline | None:
    """Return the pipeline with the weights of its guide as the network; None without a guide."""
    guide = trained.companions.get("guide")
    return replace(trained, network=guide) if guide else None


def _parity(trained: Pipeline, bundle: Bundle, params: ExportParams) -> ExportReport:
    """Compare raw outputs of the network, and of its guide if it has one, and drawn images.

    Raises:
        StageError: if any of them differs too much.
    """
    differences = {}
    batches, times = (LARGE_BATCHES, LARGE_TIMES) if _is_large(trained) else (PARITY_BATCHES, PARITY_TIMES)
    points = [(batch, t) for batch in batches for t in trained.path.spread(times)]
    guide = _guide_of(trained)
    for batch, t in progress(points, desc="parity", unit="batch"):
        compared: dict[str, tuple[Pipeline, Predict]] = {f"batch {batch}, t {t}": (trained, bundle.predict)}
        if guide and bundle.guide:
            compared[f"guide, batch {batch}, t {t}"] = guide, bundle.guide
        for where, (network, predict) in compared.items():
            differences[where], largest = _difference(network, predict, batch, t, params.seed)
            limit = params.max_abs_difference * max(1.0, largest)
            if params.precision == "fp32" and not differences[where] <= limit:
                raise StageError(
                    f"the ONNX network differs from PyTorch's by {differences[where]:.1e} ({where}; the largest output "
                    f"is {largest:.1e}), which exceeds export.max_abs_difference {params.max_abs_difference:.1e}; try "
                    "another export.opset, or raise the limit"
                )
    settings = _drawn_settings(trained)
    if guide:
        plain = next(iter(settings.values()))
        settings["autoguidance"] = replace(plain, guidance_scale=GUIDANCE, guidance="auto")
    decibel = _drawn_psnr(trained, bundle.sample, settings, params.seed)
    lowest = min(decibel, key=lambda name: decibel[name])
    if not decibel[lowest] > params.min_psnr:
        other = "another export.opset" if params.precision == "fp32" else "export.precision 'fp32'"
        raise StageError(
            f"images drawn from the bundle with {lowest} agree with PyTorch's to {decibel[lowest]:.1f} dB, not "
            f"over export.min_psnr {params.min_psnr}; try {other}, or lower the limit"
        )
    return ExportReport(
        opset=params.opset,
        max_abs_difference=max(differences.values()),
        abs_difference=differences,
        min_psnr_db=decibel[lowest],
        psnr_db=decibel,
        providers=bundle.providers,
        tensorrt=TensorRTReport(built=False),
        precision=None if params.precision == "fp32" else params.precision,
    )


def _noisy_inputs(trained: Pipeline, batch: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return standard normal x, float32 [batch, *input_shape], and conditions that cycle through labels or prompts."""
    import numpy as np

    x = np.random.default_rng(seed).standard_normal((batch, *trained.info.input_shape), dtype=np.float32)
    if trained.info.conditioning == "none":
        return x, None
    condition, _ = trained.condition([row * 3 % (len(trained.info.classes) + 1) for row in range(batch)])
    assert condition is not None, "the model is conditional"
    return x, condition.cpu().numpy()


def _torch_predict(trained: Pipeline) -> Predict:
    import torch

    from models.networks.network import predictor

    evaluate = predictor(trained.network)

    def predict(x: np.ndarray, t: float, condition: np.ndarray | None) -> np.ndarray:
        on_device = None if condition is None else torch.from_numpy(condition).to(trained.device)
        with torch.inference_mode():
            output: np.ndarray = evaluate(torch.from_numpy(x).to(trained.device), t, on_device).cpu().numpy()
        return output

    return predict


def _is_large(trained: Pipeline) -> bool:
    return sum(weights.numel() for weights in trained.network.parameters()) > LARGE_PARAMETERS


def _difference(trained: Pipeline, predict: Predict, batch: int, t: float, seed: int) -> tuple[float, float]:
    """Return the largest difference between the outputs, and the largest value of PyTorch's."""
    import numpy as np

    x, condition = _noisy_inputs(trained, batch, seed)
    expected = _torch_predict(trained)(x, t, condition)
    return float(np.abs(predict(x, t, condition) - expected).max()), float(np.abs(expected).max())


def _drawn_settings(trained: Pipeline) -> dict[str, Sampling]:
    """Return settings by sampler, with classifier-free guidance where the model has it."""
    from models.noise.samplers import Sampling, samplers_of

    steps = min(DRAWN_STEPS, trained.info.timesteps)
    scale = GUIDANCE if trained.info.conditioning != "none" else 1.0
    names = samplers_of(trained.path)[: LARGE_SAMPLERS if _is_large(trained) else None]
    return {name: Sampling(name, steps, guidance_scale=scale) for name in names}


def _drawn_psnr(trained: Pipeline, sample: Sample, settings: dict[str, Sampling], seed: int) -> dict[str, float]:
    """Return for each of `settings` the PSNR in dB of its worst image against PyTorch's for the same noise."""
    from models.parallel import on_devices

    seeds = range(seed, seed + DRAWN_IMAGES)
    conditional = trained.info.conditioning != "none"
    labels = [i % len(trained.info.classes) for i in range(DRAWN_IMAGES)] if conditional else None

    def compared(sampling: Sampling) -> float:
        both: list[Callable[[str], np.ndarray]] = [
            lambda _: sample(seeds, labels, sampling),
            lambda device: trained.on(device).sample(seeds, labels, sampling),
        ]
        return _psnr(*on_devices(both, trained.device))  # with two GPUs at once

    return {name: compared(settings[name]) for name in progress(settings, desc="draw", unit="sampler")}


def _psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Return the PSNR in dB of the worst pair of images in [-1, 1]; equal images give 200.

    Images that are not finite, or of one value where the image of `second` has several, give 0: they could be near a
    plain image, and show that a lower precision overflowed.
    """
    import numpy as np

    from models.images.pictures import decibel, squared_errors

    flat = [np.ptp(image) == 0 and np.ptp(expected) > 0 for image, expected in zip(first, second, strict=True)]
    if any(flat) or not np.isfinite(first).all():
        return 0.0
    return decibel(max(squared_errors(first, second)))


def _tensorrt(trained: Pipeline, graph: Path, params: ExportParams) -> tuple[Engine | None, TensorRTReport]:
    """Build the engines, or take them from the scratch folder, and compare their images with PyTorch's.

    There is one engine of the network, which is returned, and for latents one of the decoder. Returns none without GPU
    and without the package.

    Raises:
        StageError: if the images differ too much, or `latency_batches` exceed the engine's.
    """
    import torch

    from models import tensorrt_engine
    from models.noise.samplers import SeededNoise, denoiser, sample

    if reason := tensorrt_engine.unavailable_because():
        return None, TensorRTReport(built=False, reason=reason)
    largest = tensorrt_engine.batches_of(graph)[-1]
    if max(params.latency_batches, default=0) > largest:
        raise StageError(
            f"the TensorRT engine takes at most {largest} images at a time; lower export.latency_batches to that, or "
            "uninstall the extra 'tensorrt'"
        )
    engine = _engine_of(graph)
    decoder = _engine_of(graph.with_name("decoder.onnx")) if trained.autoencoder is not None else None

    def draw(seeds: Sequence[int], labels: Sequence[int] | None, sampling: Sampling) -> np.ndarray:
        condition, null = (None if value is None else value.cpu().numpy() for value in trained.condition(labels))
        denoise = denoiser(engine.predict, trained.scheduler, sampling, condition, null)
        drawn: np.ndarray = sample(denoise, SeededNoise(seeds, trained.info.input_shape), trained.scheduler, sampling)
        return decoder.run({"latent": torch.from_numpy(drawn)}).cpu().numpy() if decoder else drawn

    decibel = _drawn_psnr(trained, draw, _drawn_settings(trained), params.seed)
    lowest = min(decibel, key=lambda sampler: decibel[sampler])
    if not decibel[lowest] >= TENSORRT_MIN_PSNR:
        raise StageError(
            f"images drawn from the TensorRT engine with {lowest} agree with PyTorch's to {decibel[lowest]:.1f} dB, "
            f"fewer than {TENSORRT_MIN_PSNR}; uninstall the extra 'tensorrt' to export without it"
        )
    return engine, TensorRTReport(
        built=True,
        identity=tensorrt_engine.identity(),
        batches=list(tensorrt_engine.batches_of(graph)),
        # TensorRT chooses its kernels by timing them, so the decimals differ from build to build.
        psnr_db={sampler: round(value) for sampler, value in decibel.items()},
    )


def _engine_of(graph: Path) -> Engine:
    """Build the engine of an ONNX file, or take it from the scratch folder."""
    from models import tensorrt_engine

    path = workspace.scratch() / "tensorrt" / f"{tensorrt_engine.cache_key(graph)}.engine"
    if not path.exists():
        print(f"export: building the TensorRT engine of {graph.name} (minutes)", flush=True)
        atomic.write_bytes(path, tensorrt_engine.build(graph))
    return tensorrt_engine.Engine(path.read_bytes())


def _latencies(trained: Pipeline, bundle: Bundle, engine: Engine | None, params: ExportParams) -> dict[str, object]:
    """Return the median milliseconds of one network evaluation by batch size, each runtime on its fastest device."""
    import os

    import torch

    runners: dict[str, Predict] = {"torch": _torch_predict(trained), "onnxruntime": bundle.predict}
    if engine:
        runners["tensorrt"] = engine.predict
    rows = []
    for batch in progress(params.latency_batches, desc="latency", unit="batch"):
        (t,) = trained.path.spread(1)
        x, condition = _noisy_inputs(trained, batch, params.seed)
        row: dict[str, float] = {"batch": batch}
        for name, predict in runners.items():
            row[f"{name}_ms"] = round(_median_ms(functools.partial(predict, x, t, condition)), 3)
        row["onnxruntime_speedup"] = round(row["torch_ms"] / row["onnxruntime_ms"], 2)
        rows.append(row)
    return {
        "unit": "median milliseconds of one network evaluation, copies between host and device included",
        "torch_device": trained.device,
        "torch_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "onnxruntime_providers": bundle.providers,
        "rows": rows,
    }


def _median_ms(call: Callable[[], object]) -> float:
    call()  # the first call allocates memory
    times: list[float] = []
    while len(times) < MIN_REPEATS or (sum(times) < TIMING_SECONDS and len(times) < MAX_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


if __name__ == "__main__":
    stage.main(export)
