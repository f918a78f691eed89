"""The exported network: any batch size, PyTorch's numbers, and a sampler that runs where nothing else is installed."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from models import masks, onnx_graph, tensorrt_engine
from models.bundle import CPU, Bundle, Session
from models.editing import edit
from models.images.pixels import to_uint8
from models.noise.samplers import OF_DIFFUSION, Sampling
from models.pipeline import load_pipeline
from models.request import label_of
from tasks import export as stage_export
from tasks.runtime.errors import StageError
from tests.support import model_outputs
from tests.support.model_outputs import PARAMS, SIZE, TIMESTEPS

ROOT = Path(__file__).parents[2]
LABELS = [0, 1, 2, 0, 1]


@pytest.fixture
def tree(exported) -> Path:
    return exported


@pytest.fixture(scope="module")
def bundle(exported) -> Bundle:
    return Bundle(exported / "outputs" / "onnx")


@pytest.fixture(scope="module")
def traced(exported) -> onnx.ModelProto:
    """What the exporter makes of the network, a second time; copy it before changing it."""
    trained = load_pipeline(exported / "outputs" / "pipeline")
    with pytest.MonkeyPatch.context() as patch:
        made: list[onnx.ModelProto] = []
        trace = onnx_graph._traced
        patch.setattr(onnx_graph, "_traced", lambda *given: made.append(trace(*given)) or copy.deepcopy(made[0]))
        onnx_graph.to_onnx(trained, PARAMS.opset)
    return made[0]


@pytest.fixture
def few_steps(monkeypatch):
    """Compare drawn images after two steps: for tests of what the stage does with the comparison."""
    monkeypatch.setattr(stage_export, "DRAWN_STEPS", 2)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """In dB, of images in [-1, 1]."""
    return 10 * math.log10(4 / max(float(((first - second) ** 2).mean()), 1e-20))


def shapes(graph: onnx.ModelProto) -> dict[str, list]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.graph.input, *graph.graph.output]
    }


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 16])
def test_every_batch_size_gives_pytorchs_numbers(tree, bundle, batch):
    import torch

    trained = load_pipeline(tree / "outputs" / "pipeline")
    x = np.random.default_rng(batch).standard_normal((batch, 1, SIZE, SIZE), dtype=np.float32)
    label = np.arange(batch) % 4
    for t in (0, TIMESTEPS - 1):
        with torch.inference_mode():
            expected = trained.network(torch.from_numpy(x), torch.full((batch,), t), torch.from_numpy(label)).numpy()
        np.testing.assert_allclose(bundle.predict(x, t, label), expected, atol=1e-5)
    assert np.abs(bundle.predict(x, 0, label) - bundle.predict(x, TIMESTEPS - 1, label)).max() > 1e-3
    assert np.abs(bundle.predict(x, 0, label) - bundle.predict(x, 0, (label + 1) % 4)).max() > 1e-3


def test_graph_has_a_free_batch_and_nothing_of_this_machine(tree):
    content = (tree / "outputs" / "onnx" / "unet.onnx").read_bytes()
    graph = onnx.load_model_from_string(content)
    onnx.checker.check_model(graph, full_check=True)
    image = ["batch", 1, SIZE, SIZE]
    assert shapes(graph) == {"sample": image, "timestep": ["batch"], "label": ["batch"], "output": image}
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    for trace in (str(ROOT), "site-packages", "unet.py"):
        assert trace.encode() not in content


def test_a_second_export_gives_the_same_bytes(tree, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_traced", lambda *_: copy.deepcopy(traced))
    again = onnx_graph.to_onnx(load_pipeline(tree / "outputs" / "pipeline"), PARAMS.opset)
    (written,) = onnx_graph.write(again, tmp_path / "unet.onnx")
    assert written.read_bytes() == (tree / "outputs" / "onnx" / "unet.onnx").read_bytes()


def test_weights_that_exceed_the_limit_of_protobuf_lie_beside_the_graph(tree, tmp_path):
    """The limit is lowered here to what this network exceeds; the folder is moved before anybody reads it."""
    from tasks.formats import model_folder

    whole = tree / "outputs" / "onnx"
    built = tmp_path / "built" / "onnx"
    shutil.copytree(whole, built)
    (built / "unet.onnx").unlink()
    graph, beside = onnx_graph.write(onnx.load(whole / "unet.onnx"), built / "unet.onnx", max_embedded_bytes=1000)
    assert beside.name == "unet.onnx.data"
    assert graph.stat().st_size < beside.stat().st_size < (whole / "unet.onnx").stat().st_size
    key = model_folder.content_key(built)
    moved = shutil.copytree(built, tmp_path / "moved" / "onnx")
    shutil.rmtree(built)
    assert model_folder.content_key(moved) == key
    drawn = [Bundle(folder, threads=1).sample([3, 4], [0, 1], Sampling(steps=4)) for folder in (whole, moved)]
    assert np.array_equal(*drawn)
    (moved / "unet.onnx.data").write_bytes((moved / "unet.onnx.data").read_bytes()[::-1])
    assert model_folder.content_key(moved) != key


def test_a_batch_that_the_exporter_fixed_is_noticed(tree, monkeypatch):
    fixed = onnx.load(tree / "outputs" / "onnx" / "unet.onnx")
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    monkeypatch.setattr(onnx_graph, "_traced", lambda *_: fixed)
    with pytest.raises(RuntimeError, match="fixed the batch size of 'sample'"):
        onnx_graph.to_onnx(load_pipeline(tree / "outputs" / "pipeline"), PARAMS.opset)


def test_unconditional_network_takes_no_label(exported_unconditional):
    unconditional = exported_unconditional
    graph = onnx.load(unconditional / "outputs" / "onnx" / "unet.onnx")
    assert set(shapes(graph)) == {"sample", "timestep", "output"}
    bundle = Bundle(unconditional / "outputs" / "onnx")
    trained = load_pipeline(unconditional / "outputs" / "pipeline")
    sampling = Sampling("dpm_solver_pp_2m", 5)
    assert psnr(bundle.sample([4, 5], sampling=sampling), trained.sample([4, 5], sampling=sampling)) > 50
    with pytest.raises(ValueError, match="unconditional"):
        bundle.sample([4], [0])
    with pytest.raises(ValueError, match="classifier-free guidance needs a conditional model"):
        bundle.sample([4], sampling=Sampling(guidance_scale=2.0))
    with pytest.raises(ValueError, match="has no guide for guidance 'auto'"):
        bundle.sample([4], sampling=Sampling(guidance_scale=2.0, guidance="auto"))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler_ancestral", "dpm_solver_pp_2m"])
def test_bundle_draws_pytorchs_images(tree, bundle, sampler):
    seeds = range(11, 16)
    sampling = Sampling(sampler, 7, guidance_scale=2.0)
    ours = bundle.sample(seeds, LABELS, sampling)
    theirs = load_pipeline(tree / "outputs" / "pipeline").sample(seeds, LABELS, sampling)
    assert psnr(ours, theirs) > 50
    assert psnr(ours[:1], ours[3:4]) < 30, "another seed gives another image"


def test_bundle_draws_pytorchs_images_with_autoguidance(tree, bundle):
    seeds, auto = range(11, 16), Sampling("ddim", 7, guidance_scale=2.0, guidance="auto")
    ours = bundle.sample(seeds, LABELS, auto)
    assert psnr(ours, load_pipeline(tree / "outputs" / "pipeline").sample(seeds, LABELS, auto)) > 50
    assert psnr(ours, bundle.sample(seeds, LABELS, Sampling("ddim", 7, guidance_scale=2.0))) < 30


@pytest.mark.parametrize("mask", [None, masks.half(SIZE, SIZE)])
def test_bundle_edits_as_pytorch_does(tree, bundle, mask):
    given = np.random.default_rng(0).integers(0, 256, (5, 1, SIZE, SIZE), dtype=np.uint8)
    draw = {"labels": LABELS, "sampling": Sampling("ddpm", 8, guidance_scale=2.0)}
    draw |= {} if mask is None else {"resampling": 2, "jump": 2}
    ours = bundle.edit(range(5), given, 0.7, mask, **draw)
    theirs = edit(load_pipeline(tree / "outputs" / "pipeline"), range(5), given, 0.7, mask, **draw)
    assert psnr(ours, theirs) > 50
    assert psnr(ours, bundle.sample(range(5), LABELS, draw["sampling"])) < 30
    if mask is not None:
        assert np.array_equal(to_uint8(ours)[..., ~mask], given[..., ~mask])
        with pytest.raises(ValueError, match="give a mask of the same size"):
            bundle.edit(range(5), given, 0.7, mask[1:], **draw)


def test_the_bundles_command_repaints_what_is_white_in_a_mask(tree, tmp_path):
    given = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    Image.fromarray(given).save(tmp_path / "given.png")
    Image.fromarray((masks.half(SIZE, SIZE) * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    shared = ("--label", "1", "--out", str(tmp_path / "out.png"), "--mask", str(tmp_path / "mask.png"))
    run = bare_run(tree / "outputs" / "onnx", *shared, "--image", str(tmp_path / "given.png"))
    assert (run.returncode, run.stderr) == (0, "")
    out = np.asarray(Image.open(tmp_path / "out.png"))
    assert np.array_equal(out[:, : SIZE // 2], given[:, : SIZE // 2])
    assert not np.array_equal(out[:, SIZE // 2 :], given[:, SIZE // 2 :])
    run = bare_run(tree / "outputs" / "onnx", *shared)
    assert run.returncode == 2 and "a mask changes an image; give one" in run.stderr


def test_inputs_that_stay_in_a_devices_memory_give_the_same_pixels(tree):
    """Here the memory is that of the CPU; on a GPU the bundle does so by itself."""
    folder, options = tree / "outputs" / "onnx", onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    copied, bound = Bundle(folder, threads=1), Bundle(folder, threads=1)
    bound.session = Session(folder / "unet.onnx", options, [CPU], bound="cpu")
    for sampling in (Sampling("ddpm", 4, guidance_scale=2.0), Sampling("dpm_solver_pp_2m", 3)):
        assert np.array_equal(*(each.sample(range(5), LABELS, sampling) for each in (copied, bound)))
    assert len(bound.session._places) == 1


def test_an_image_depends_on_its_seed_and_label_alone(bundle):
    sampling = Sampling("ddpm", TIMESTEPS, guidance_scale=1.5)
    together = bundle.sample([7, 8, 9], [0, 1, 2], sampling)
    alone = bundle.sample([8], [1], sampling)
    assert psnr(together[1:2], alone) > 80


def test_report_contains_the_measurements(tree):
    report = model_outputs.read(tree / "reports" / "export.json")
    assert 0 < report["max_abs_difference"] <= PARAMS.max_abs_difference
    assert report["max_abs_difference"] == max(report["abs_difference"].values())
    batches = {"batch 1", "batch 2", "batch 5", "batch 8"}
    assert {key.rsplit(",", 1)[0] for key in report["abs_difference"]} == batches | {f"guide, {n}" for n in batches}
    assert {key.split(" t ")[1] for key in report["abs_difference"]} == {"0", "10", "19"}
    assert set(report["psnr_db"]) == {*OF_DIFFUSION, "autoguidance"}
    assert {"ddpm", "ddim", "euler_ancestral", "dpm_solver_pp_2m", "consistency"} == set(OF_DIFFUSION)
    assert PARAMS.min_psnr < report["min_psnr_db"] == min(report["psnr_db"].values())
    assert report["providers"][-1] == CPU
    assert report["tensorrt"]["built"] or report["tensorrt"]["reason"] == tensorrt_engine.unavailable_because()
    latency = model_outputs.read(tree / "reports" / "timing" / "latency.json")
    assert latency["onnxruntime_providers"][-1] == CPU
    assert all(row["torch_ms"] > 0 and row["onnxruntime_ms"] > 0 for row in latency["rows"])


def test_a_network_that_differs_fails_the_stage_and_leaves_nothing(tree, tmp_path, few_steps, monkeypatch):
    """The exported graph is that of other weights: what the parity check is for."""
    graph = onnx.load(tree / "outputs" / "onnx" / "unet.onnx")
    for weights in graph.graph.initializer:
        if weights.data_type == onnx.TensorProto.FLOAT:
            weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) * 1.001, weights.name))
    model_outputs.write_pipeline(tmp_path / "outputs" / "pipeline")
    model_outputs.write_accepted(tmp_path / "data" / "accepted.json")
    own = onnx.load(tree / "outputs" / "onnx" / "unet.onnx")
    right = iter([own, own])  # the second is the guide's graph
    monkeypatch.setattr(onnx_graph, "to_onnx", lambda *_: next(right))
    with pytest.raises(StageError, match=r"differs from PyTorch's by .* \(guide, batch .* export\.max_abs_difference"):
        model_outputs.run_export(tmp_path)
    monkeypatch.setattr(onnx_graph, "to_onnx", lambda *_: graph)
    with pytest.raises(StageError, match=r"differs from PyTorch's by .* export\.max_abs_difference"):
        model_outputs.run_export(tmp_path)
    with pytest.raises(StageError, match=r"agree with PyTorch's to .* export\.min_psnr"):
        model_outputs.run_export(tmp_path, PARAMS.model_copy(update={"max_abs_difference": 1.0, "min_psnr": 100}))
    assert not (tmp_path / "outputs" / "onnx").exists()
    assert not (tmp_path / "reports").exists()


def test_a_network_in_float16_draws_nearly_the_same_images(tree, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_traced", lambda *_: copy.deepcopy(traced))
    trained = dataclasses.replace(load_pipeline(tree / "outputs" / "pipeline"), companions={})
    folder = shutil.copytree(tree / "outputs" / "onnx", tmp_path / "onnx")
    (folder / "guide.onnx").unlink()
    onnx_graph.write(onnx_graph.to_onnx(trained, PARAMS.opset, "fp16"), folder / "unet.onnx")
    graph, whole = onnx.load(folder / "unet.onnx"), onnx.load(tree / "outputs" / "onnx" / "unet.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert shapes(graph) == shapes(whole)
    kinds = [value.type.tensor_type.elem_type for value in [*graph.graph.input, *graph.graph.output]]
    assert kinds == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT]
    halves = {weight.name for weight in graph.graph.initializer if weight.data_type == onnx.TensorProto.FLOAT16}
    assert {"conv_in.weight", "conv_out.weight"} <= halves
    params = PARAMS.model_copy(update={"precision": "fp16", "max_abs_difference": 1e-9})
    found = stage_export._parity(trained, Bundle(folder, threads=1), params)
    assert found.precision == "fp16"
    assert 1e-5 < found.max_abs_difference < 1e-2, "its limit is that of the images"
    assert PARAMS.min_psnr < found.min_psnr_db < 90
    params = params.model_copy(update={"min_psnr": 90})
    with pytest.raises(StageError, match=r"not over export\.min_psnr 90; try export\.precision 'fp32'"):
        stage_export._parity(trained, Bundle(folder, threads=1), params)


@pytest.mark.parametrize("kind", ["transformer", "u-net of patches"])
def test_late_times_lose_no_digits_in_float16(kind):
    """The time of a rectified flow, rounded to float16, would be off by up to 0.25, and so would the angles of t."""
    import torch

    from models.networks.dit import DiTConfig
    from models.networks.network import build
    from models.networks.unet import UNetConfig
    from models.noise.paths import RectifiedFlow
    from models.noise.samplers import SchedulerConfig
    from models.pipeline import Pipeline, PipelineInfo
    from tests.support.networks import randomised

    config = {
        "transformer": DiTConfig(size=SIZE, channels=1, patch_size=2, width=16, depth=2, heads=2, conditions=4),
        "u-net of patches": UNetConfig(SIZE, 1, (8,), (True,), 1, 4, 8, conditions=4, patch_size=2),
    }[kind]
    network, flow = randomised(build(config)).requires_grad_(False), "flow_prediction"
    info = PipelineInfo("label", 1, SIZE, "rectified_flow", 1000, flow, "0" * 64, model_outputs.CLASSES, null_label=3)
    graph = onnx_graph.to_onnx(Pipeline(network, SchedulerConfig(RectifiedFlow(1000), flow), info), 20, "fp16")
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=[CPU])
    x, label = torch.randn(4, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    for time in (1.37, 777.37, 999.37):
        t = torch.full((4,), time)
        expected = network(x, t, label)
        inputs = {"sample": x.numpy(), "timestep": t.numpy(), "label": label.numpy()}
        error = torch.from_numpy(session.run(None, inputs)[0]) - expected
        assert 1e-5 < error.abs().max() / expected.abs().max() < 1.2e-3, time


def test_images_that_overflowed_agree_with_none():
    image = np.linspace(-0.01, 0.01, 16, dtype=np.float32).reshape(1, 1, 4, 4)
    plain, unknown = np.zeros_like(image), np.full_like(image, np.nan)
    assert stage_export._psnr(image, image) == 200
    assert stage_export._psnr(plain, image) == stage_export._psnr(unknown, image) == 0
    assert stage_export._psnr(plain, plain) == 200, "an image that is plain in PyTorch as well"


def test_a_large_network_is_compared_at_fewer_points(tree, tmp_path, few_steps, monkeypatch):
    trained = load_pipeline(tree / "outputs" / "pipeline")
    bundle = Bundle(tree / "outputs" / "onnx", threads=1)
    monkeypatch.setattr(stage_export, "LARGE_PARAMETERS", 1000)
    found = stage_export._parity(trained, bundle, PARAMS)
    assert {key.rsplit(",", 1)[0] for key in found.abs_difference if "guide" not in key} == {"batch 1", "batch 3"}
    assert len(found.abs_difference) == 2 * 2 * 2 and len(found.psnr_db) == 2 + 1


def test_the_limit_is_relative_where_outputs_are_large(tree, few_steps, monkeypatch):
    trained = load_pipeline(tree / "outputs" / "pipeline")
    bundle = Bundle(tree / "outputs" / "onnx", threads=1)
    for largest, allowed in ((0.5, False), (1.0, False), (3.0, True)):
        monkeypatch.setattr(stage_export, "_difference", lambda *_, at=largest: (2 * PARAMS.max_abs_difference, at))
        if allowed:
            stage_export._parity(trained, bundle, PARAMS)
        else:
            with pytest.raises(StageError, match=r"differs from PyTorch's by 2\.0e-04 \(.*; the largest output is"):
                stage_export._parity(trained, bundle, PARAMS)


@pytest.mark.slow
def test_the_reference_runs_on_the_gpu_and_the_trace_on_the_cpu(tmp_path, monkeypatch):
    opened = []

    def opening(folder, device="cpu"):
        opened.append(device)
        return load_pipeline(folder)

    monkeypatch.setattr("models.pipeline.load_pipeline", opening)
    monkeypatch.setattr("models.device.best_device", lambda: "cuda")
    model_outputs.exported(tmp_path)
    assert opened == ["cpu", "cuda"]


def test_an_engine_is_found_again_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_engine, "identity", lambda: "tensorrt 10 on a GPU")
    graph = tmp_path / "unet.onnx"
    graph.write_bytes(b"graph")
    keys = [tensorrt_engine.cache_key(graph)]
    assert tensorrt_engine.cache_key(graph) == keys[0]
    (tmp_path / "unet.onnx.data").write_bytes(b"weights")
    keys.append(tensorrt_engine.cache_key(graph))
    graph.write_bytes(b"another graph")
    keys.append(tensorrt_engine.cache_key(graph))
    monkeypatch.setattr(tensorrt_engine, "LARGE_BYTES", 10)
    keys.append(tensorrt_engine.cache_key(graph))
    monkeypatch.setattr(tensorrt_engine, "identity", lambda: "tensorrt 11 on a GPU")
    keys.append(tensorrt_engine.cache_key(graph))
    assert len(set(keys)) == len(keys)


def test_latencies_beyond_the_profile_of_tensorrt_are_refused_before_an_engine_is_built(tree, monkeypatch):
    monkeypatch.setattr(tensorrt_engine, "unavailable_because", lambda: None)
    params, graph = PARAMS.model_copy(update={"latency_batches": (1, 257)}), tree / "outputs" / "onnx" / "unet.onnx"
    trained = load_pipeline(tree / "outputs" / "pipeline")
    with pytest.raises(StageError, match=r"takes at most 256 images at a time; lower export\.latency_batches"):
        stage_export._tensorrt(trained, graph, params)
    monkeypatch.setattr(tensorrt_engine, "LARGE_BYTES", 10)
    with pytest.raises(StageError, match="takes at most 16 images at a time"):
        stage_export._tensorrt(trained, graph, PARAMS.model_copy(update={"latency_batches": (32,)}))


class StubEngine:
    """Computes by PyTorch what an engine of `unet.onnx` or `decoder.onnx` does, named by its bytes."""

    def __init__(self, trained, name: bytes) -> None:
        self.trained, self.name, self.decoded = trained, name.decode(), []

    def predict(self, x, t, condition):
        assert self.name == "unet.onnx"
        return stage_export._torch_predict(self.trained)(x, t, condition)

    def run(self, inputs):
        assert self.name == "decoder.onnx"
        self.decoded.append(tuple(inputs["latent"].shape))
        return self.trained.decode(inputs["latent"])


def test_images_of_latents_are_decoded_by_an_engine_of_tensorrt(tree, tmp_path, few_steps, monkeypatch):
    """The engines are stubs. Both are built once, every image passes the decoder, and a wrong one is refused."""
    import torch

    from models import autoencoder_training
    from models.autoencoder_training import AutoencoderConfig

    torch.manual_seed(0)
    config = AutoencoderConfig(channels=1, latent_channels=1, widths=(8, 16), layers_per_block=1)
    autoencoder = autoencoder_training.build(config).eval().requires_grad_(False)
    trained = dataclasses.replace(load_pipeline(tree / "outputs" / "pipeline"), autoencoder=autoencoder)
    for name in ("unet.onnx", "decoder.onnx"):
        (tmp_path / name).write_bytes(name.encode())
    built, engines = [], []
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(tensorrt_engine, "unavailable_because", lambda: None)
    monkeypatch.setattr(tensorrt_engine, "identity", lambda: "tensorrt 10 on a GPU")
    monkeypatch.setattr(tensorrt_engine, "build", lambda graph: built.append(graph.name) or graph.name.encode())
    monkeypatch.setattr(
        tensorrt_engine, "Engine", lambda content: engines.append(StubEngine(trained, content)) or engines[-1]
    )
    for _ in range(2):
        engine, report = stage_export._tensorrt(trained, tmp_path / "unet.onnx", PARAMS)
        assert report.built and min(report.psnr_db.values()) > 100 and engine.name == "unet.onnx"
        assert engines[-1].decoded == [(4, 1, SIZE, SIZE)] * len(report.psnr_db)
    assert built == ["unet.onnx", "decoder.onnx"]
    monkeypatch.setattr(StubEngine, "run", lambda engine, inputs: -engine.trained.decode(inputs["latent"]))
    with pytest.raises(StageError, match=r"images drawn from the TensorRT engine with \w+ agree with PyTorch's to"):
        stage_export._tensorrt(trained, tmp_path / "unet.onnx", PARAMS)


def test_a_condition_without_onnx_form_is_refused(tree, tmp_path):
    trained = load_pipeline(tree / "outputs" / "pipeline")
    other = dataclasses.replace(trained, info=dataclasses.replace(trained.info, conditioning="style"))
    with pytest.raises(ValueError, match="style"):
        onnx_graph.to_onnx(other, PARAMS.opset)


@pytest.mark.parametrize(
    ("prompt", "label"),
    [("a dog", 1), ("A photo of a HOT DOG!", 0), ("cat", 2), ("one cat, a grey cat", 2), ("hot-dog dog", 1)],
)
def test_a_prompt_means_the_class_that_it_names(prompt, label):
    assert label_of(prompt, model_outputs.CLASSES) == label


@pytest.mark.parametrize("prompt", ["", "a catalogue of dogs", "hotdog", "a cat and a dog", "a hot dog for a dog"])
def test_a_prompt_that_names_no_class_or_several_is_refused(prompt):
    with pytest.raises(ValueError, match="name exactly one of: hot dog, dog, cat"):
        label_of(prompt, model_outputs.CLASSES)


@pytest.mark.parametrize(
    ("labels", "settings", "complaint"),
    [
        (None, {}, "needs a label"),
        ([0, 1], {}, "needs a label for each"),
        ([4], {}, "between 0 and 2"),
        ([-1], {}, "between 0 and 2"),
        ([0], {"sampler": "plms"}, "unknown sampler"),
        ([0], {"steps": 0}, "steps 0"),
        ([0], {"steps": TIMESTEPS + 1}, "steps 21"),
    ],
)
def test_an_impossible_request_is_refused(bundle, labels, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        bundle.sample([0], labels, Sampling(**settings))


def bare_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the bundle's command where importing anything but NumPy, ONNX Runtime and Pillow is an error."""
    guard = (
        "import runpy, sys\n"
        "for name in ('torch', 'diffusers', 'mlflow', 'scipy', 'models', 'tasks', 'pydantic', 'onnx'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = ['bundle', *{list(arguments)!r}]\n"
        "runpy.run_module('afterimage_bundle.bundle', run_name='__main__')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-B", "-c", guard], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("out", "says"), [("missing/image.png", "lies in {}/missing, which is no folder"), (".", "is a folder")]
)
def test_the_bundles_command_refuses_a_place_that_cannot_hold_a_file(tree, tmp_path, out, says):
    run = bare_run(tree / "outputs" / "onnx", "--label", "0", "--out", str(tmp_path / out))
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert says.format(tmp_path) in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", [None, "auto"])
def test_the_bundles_command_draws_pytorchs_image_without_pytorch(tree, tmp_path, kind):
    out = tmp_path / "image.png"
    run = bare_run(
        tree / "outputs" / "onnx",
        *("--prompt", "a cat", "--seed", "5", "--steps", "6", "--sampler", "ddim", "--guidance", "1.5"),
        *(("--guidance-kind", kind) if kind else ()),
        *("--out", str(out)),
    )
    assert (run.returncode, run.stderr) == (0, "")
    sampling = Sampling("ddim", 6, guidance_scale=1.5, guidance=kind or "classifier_free")
    drawn = load_pipeline(tree / "outputs" / "pipeline").sample([5], [2], sampling)
    pixels = np.asarray(Image.open(io.BytesIO(out.read_bytes())))
    assert pixels.shape == (SIZE, SIZE)
    assert np.abs(pixels.astype(int) - to_uint8(drawn)[0, 0]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--label", "9"], "labels must lie between 0 and 2"),
        (["--prompt", "a bird"], "names no class"),
        ([], "needs a label"),
        (["--label", "0", "--steps", "999"], "sampling steps 999"),
    ],
)
def test_the_bundles_command_says_what_is_wrong(tree, tmp_path, arguments, complaint):
    run = bare_run(tree / "outputs" / "onnx", *arguments, "--out", str(tmp_path / "image.png"))
    assert run.returncode == 2
    assert complaint in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "image.png").exists()


def test_pixels_are_rounded_and_clipped():
    import torch

    values = np.array([-1.2, -1.0, 0.0, 1.0, 1.2], np.float32).reshape(1, 1, 1, 5)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.from_numpy(values)).ravel().tolist() == to_uint8(values).ravel().tolist()


@pytest.mark.gpu
def test_tensorrt_engine_draws_pytorchs_images(tree):
    reason = tensorrt_engine.unavailable_because()
    if reason:
        pytest.skip(reason)
    trained = load_pipeline(tree / "outputs" / "pipeline")
    engine = tensorrt_engine.Engine(tensorrt_engine.build(tree / "outputs" / "onnx" / "unet.onnx"))
    bundle = Bundle(tree / "outputs" / "onnx")
    for batch in (1, 5, 64):
        x = np.random.default_rng(batch).standard_normal((batch, trained.info.channels, SIZE, SIZE), dtype=np.float32)
        label = np.arange(batch) % 4
        assert psnr(engine.predict(x, 3, label), bundle.predict(x, 3, label)) > 35
