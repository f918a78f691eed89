"""`python -m infra.bench gpu` in its tiny form, and what of it can be shown without a GPU. No timing."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from infra.bench import __main__ as bench
from infra.bench.gpu.plan import PARTS, REFERENCE_DEFAULTS, Plan, Row, Setting
from tests.support import few_packages
from tests.support.commands import call
from tests.support.shared import made_once

PACKAGES = ("torch", "diffusers", "numpy", "safetensors", "pydantic")


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """A folder with the few packages that the benchmark needs."""
    return made_once(tmp_path_factory, "few", lambda folder: few_packages.link(folder, PACKAGES))


def started(few: Path, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    options = ("--work", str(folder / "work"), "--reports", str(folder), "gpu", "--device", "cpu", *arguments)
    command, environment = few_packages.python(few, "-m", "infra.bench", *options)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=few_packages.ROOT, env=environment, **pipes)


def stored(folder: Path) -> dict:
    return json.loads((folder / "bench_gpu.json").read_text(encoding="utf-8"))


def setting(tmp_path: Path, seconds: float = 60.0) -> Setting:
    return Setting("cpu", True, tmp_path, time.monotonic() + seconds)


@pytest.fixture(scope="module")
def measured(few, tmp_path_factory) -> Path:
    """The reports of a run of the tiny form with few packages, and its `output`."""
    folder = tmp_path_factory.mktemp("tiny")
    process = started(few, folder, "--skip", "ceilings")
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    (folder / "output").write_text(output, encoding="utf-8")
    return folder


@pytest.mark.slow
class TestTinyForm:
    def test_every_part_runs_with_five_packages(self, measured):
        rows = stored(measured)["rows"]
        assert not [row for row in rows if "failed" in row]
        assert list(dict.fromkeys(row["part"] for row in rows)) == list(PARTS)
        reasons = {row["part"]: row["skipped"] for row in rows if "skipped" in row}
        assert reasons == {"ceilings": "left out by --skip", "runtimes": "package onnx is not installed"}
        trained = [row for row in rows if row["part"] == "training"]
        assert [row["case"] for row in trained] == [
            "fp32, NCHW, batch 4", "bf16, NCHW, batch 4", "bf16, NHWC, batch 4", "bf16, NHWC, compiled, batch 4",
        ]  # fmt: skip
        assert all(row["img_s"] > 0 and row["host_ms"] > 0 and "launches" not in row for row in trained)
        theirs = [row for row in rows if row["part"] == "reference"]
        assert theirs[0]["case"] == REFERENCE_DEFAULTS
        assert all(row["note"].endswith("; accelerate is not installed") for row in theirs)

    def test_bf16_is_compared_with_fp32(self, measured):
        for part in ("sampling", "encoding"):
            rows = [row for row in stored(measured)["rows"] if row["part"] == part]
            assert all(("psnr_db" in row) == (row["precision"] == "bf16") for row in rows)
            assert all(row["psnr_db"] > 30 for row in rows if "psnr_db" in row)

    def test_report_and_terminal_say_that_the_numbers_are_meaningless(self, measured):
        report = (measured / "bench_gpu.md").read_text(encoding="utf-8")
        output = (measured / "output").read_text(encoding="utf-8")
        assert stored(measured)["tiny"] is True and report in output
        assert "its numbers are meaningless" in report and "| 10,000 |" in report
        assert report.count("for an H100") == 3
        assert "| runtimes" not in report and "skipped: package onnx is not installed" in report


@pytest.mark.slow
def test_a_killed_run_keeps_its_rows_and_leaves_no_process(few, tmp_path):
    process = started(few, tmp_path, "--only", "training", "encoding")
    measured = []
    while process.poll() is None and not measured:
        time.sleep(0.05)
        if (tmp_path / "bench_gpu.json").exists():
            measured = [row for row in stored(tmp_path)["rows"] if "img_s" in row]
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert stored(tmp_path)["rows"][: 1 + len(measured)] == [
        {"part": "ceilings", "case": "all", "skipped": "left out by --only"}, *measured,
    ]  # fmt: skip
    assert len(children) > 1 and not psutil.wait_procs(children, timeout=20)[1]


def test_without_a_gpu_one_sentence_names_the_option(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = call(bench.main, "--work", str(tmp_path), "--reports", str(tmp_path), "gpu")
    assert found.returncode == 1
    assert found.stderr.strip().splitlines() == [
        "bench: error: this machine has no GPU that PyTorch can use; --device cpu runs a tiny form of every part"
    ]
    assert not (tmp_path / "bench_gpu.json").exists()


def test_the_time_is_shared_out_among_the_parts_that_are_left(tmp_path):
    plan = Plan(tmp_path, minutes=10, skip=("training",))
    assert plan.seconds_of("runtimes", 77.0) == 77.0
    assert plan.seconds_of("sampling", 100.0) == pytest.approx(100 * 4 / (4 + 3 + 4))
    assert plan.seconds_of("sampling", -5.0) == 0
    assert Plan(tmp_path, seconds=30).seconds_of("ceilings", 600.0) == 30
    assert Plan(tmp_path, seconds=30).seconds_of("runtimes", 12.0) == 12
    assert [Plan(tmp_path, only=("encoding",)).excluded(part) for part in ("encoding", "sampling")] == [None, "--only"]


class TestParts:
    """The processes of the parts."""

    @pytest.mark.slow
    def test_one_that_hangs_is_ended(self, tmp_path, monkeypatch):
        from infra.bench.gpu import runner

        monkeypatch.setattr(runner, "GRACE", 0.0)
        rows = list(runner._part(Plan(tmp_path, "cpu"), "training", 0.0))
        # On an idle machine the part may notice by itself that no time is left.
        assert (rows[-1].failed or rows[-1].skipped).endswith("raise --seconds or --minutes")
        servers = psutil.Process().children()
        assert servers and not [part for server in servers for part in server.children()]

    def test_one_that_crashes_costs_only_its_own_rows(self, tmp_path):
        from infra.bench.gpu import runner

        (row,) = runner._part(Plan(tmp_path, "cpu"), "no_such_part", 10.0)
        assert row.failed == "its process ended with exit code 1, see above"

    def test_a_case_that_cannot_be_measured_is_a_row(self, tmp_path):
        import torch

        from infra.bench.gpu.timing import attempt

        def failing(error: Exception):
            def measure():
                raise error

            return attempt(setting(tmp_path), "training", "case", measure)

        assert failing(ModuleNotFoundError("no", name="triton")).skipped == "package triton is not installed"
        assert failing(torch.OutOfMemoryError("3 GiB")).failed == "out of memory"
        assert failing(ValueError("first\nsecond")).failed == "ValueError: first"
        late = attempt(setting(tmp_path, -1.0), "training", "case", lambda: pytest.fail("it was started"))
        assert late.skipped == "no time is left; raise --seconds or --minutes"


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(name, bf16):
    from infra.bench.gpu.peaks import peak_of

    assert peak_of(name).of("bf16") == bf16


def test_a_device_that_is_not_listed_has_no_peak():
    from infra.bench.gpu.peaks import peak_of

    for name in ("NVIDIA L40S", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10"):
        assert peak_of(name) is None, name
    assert peak_of("Tesla T4").of("bf16") is None and peak_of("Tesla T4").of("fp32") == 8.1


def test_goals_are_judged_on_an_h100_alone():
    from infra.bench.gpu.goals import goals_of

    rows = [
        Row("training", "a", img_s=9_000.0),
        Row("training", "b", img_s=12_000.0),
        Row("reference", REFERENCE_DEFAULTS, precision="fp32", img_s=2_000.0),
        Row("reference", "c", precision="bf16", img_s=7_000.0),
        Row("sampling", "d", precision="bf16", img_s=1.0),
    ]
    h100 = goals_of(rows, "NVIDIA H100 80GB HBM3")
    assert [goal.verdict for goal in h100] == ["met", "met", "not met"]
    assert [round(goal.reached, 2) for goal in h100] == [12_000, 6, 1.71]
    assert [goal.verdict for goal in goals_of(rows, "NVIDIA L4")] == ["for an H100"] * 3
    assert [goal.verdict for goal in goals_of(rows[:2], "NVIDIA H100 PCIe")] == ["met", *["not measured"] * 2]


def profiled_events(monkeypatch, events: list[SimpleNamespace]):
    """Let torch.profiler record `events` in two calls, as on a GPU."""
    from infra.bench.gpu import timing

    @contextmanager
    def profile(activities):
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(timing, "profile", profile)
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    return timing.profiled(lambda: None, "cuda", calls=2)


def event(name: str, microseconds: float, device: str = "CPU", parent=None) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        cpu_time_total=microseconds if device == "CPU" else 0.0,
        self_device_time_total=microseconds if device == "CUDA" else 400.0,
        is_user_annotation=name == "annotation",
        cpu_parent=parent,
    )


def test_waiting_for_the_gpu_is_no_work_of_the_host(monkeypatch):
    calls = [event("bench: call", 10_000.0), event("bench: call", 500.0)]
    launches = [event("cudaLaunchKernel", time, parent=calls[0]) for time in (5.0, 5.0, 5.0, 9_005.0)]
    reading = event("aten::item", 520.0, parent=calls[0])
    waits = [event("cudaStreamSynchronize", 500.0, parent=reading), event("cudaDeviceSynchronize", 50_000.0)]
    kernels = [event("gemm", 400.0, "CUDA"), event("annotation", 7_000.0, "CUDA")]
    found = profiled_events(monkeypatch, [*calls, *launches, reading, *waits, *kernels])
    assert (found.launches, found.host_ms, found.device_ms) == (2, pytest.approx(0.5), pytest.approx(0.2))


def test_without_cupti_launches_are_not_counted(monkeypatch):
    found = profiled_events(monkeypatch, [event("bench: call", 100.0), event("aten::conv2d", 60.0)])
    assert found.launches is None and found.device_ms is None and found.host_ms == pytest.approx(0.05)
    assert found.note == "launches are not counted: torch.profiler found no CUPTI"


def test_the_profiler_has_the_events_that_are_read():
    import torch

    from infra.bench.gpu.timing import profiled

    x = torch.ones(64, 64)
    found = profiled(lambda: x @ x, "cpu", calls=2)
    assert found.launches is None and found.device_ms is None and 0 < found.host_ms < 5_000 and found.note is None


def test_each_form_has_its_arithmetic(tmp_path, monkeypatch):
    """fp32 of the ladder is that of a training: full float32."""
    import torch

    from infra.bench.gpu import ceilings, encoding, runtimes, sampling, training
    from models import device

    def found() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before, seen = (*found(), torch.backends.cudnn.benchmark), {}
    assert training.TF32 in [form for form, _ in training.LADDER]
    monkeypatch.setattr(training, "TINY_LADDER", ((training.TF32, 4), (training.FP32, 4)))
    try:
        for part in (training, ceilings):
            part.measure(setting(tmp_path), lambda row: seen.update({row.case: found()}))
        assert seen["tf32, NCHW, batch 4"] == seen["matrix product tf32"] == (True, True)
        assert seen["fp32, NCHW, batch 4"] == seen["matrix product fp32"] == (False, False)
        for part, expected in ((sampling, False), (encoding, False), (runtimes, True)):
            device.set_arithmetic(tf32=not expected, search=False)
            monkeypatch.setattr(part, "attempt", lambda *_: None)
            part.measure(setting(tmp_path), lambda row: None)
            assert (*found(), torch.backends.cudnn.benchmark) == (expected, expected, True)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = before


class TestRecipe:
    def test_it_is_the_preset_cifar10_ddpm(self):
        from infra.bench.gpu import recipe
        from infra.bench.inputs import parameters
        from infra.bench.paired import network

        params = parameters("cifar10_ddpm", None)
        train, diffusion = params.train, params.diffusion
        assert network(params) == recipe.CIFAR
        assert (diffusion.schedule, diffusion.timesteps) == (recipe.SCHEDULE, recipe.TIMESTEPS)
        assert (diffusion.prediction, diffusion.loss_weighting) == (recipe.PREDICTION, "plain")
        assert (train.learning_rate, train.weight_decay) == (recipe.LEARNING_RATE, recipe.WEIGHT_DECAY)
        assert (train.clip_norm, tuple(train.ema), train.batch_size) == (
            recipe.CLIP_NORM,
            recipe.AVERAGES,
            recipe.BATCH,
        )
        assert train.ema_every == recipe.EMA_EVERY
        assert (train.horizontal_flip, train.optimizer, train.lr_schedule) == (recipe.FLIP, "adamw", "constant")

    def test_a_step_is_that_of_the_chain(self, tmp_path, monkeypatch):
        """The same weights and averages after the same batches, without accelerate."""
        import torch

        from infra.bench.gpu import recipe
        from infra.bench.gpu.training import FP32, Trainer
        from infra.bench.inputs import Inputs, parameters
        from infra.bench.ours import Ours
        from tests.support.train_inputs import write_inputs

        monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
        write_inputs(tmp_path, "none")
        params = parameters(
            "cifar10_ddpm", None, "image.resolution=8", "image.channels=1", "model.block_out_channels=[8,16]",
            "model.attention=[false,true]", "model.norm_num_groups=4", "model.dropout=0", "train.precision='no'",
            "train.batch_size=8", "train.warmup_steps=0", "train.channels_last=false", "train.log_every=1000",
            "train.steps=1000",
        )  # fmt: skip
        run = Ours(params, Inputs(tmp_path, tmp_path, tmp_path / "judge")).run
        trainer = Trainer(run.network.config, FP32, "cpu", tiny=True)
        trainer.network.load_state_dict(run.network.state_dict())
        for average in trainer.averages:
            average.load_state_dict(dict(trainer.network.named_parameters()))
        batches = [run.batches.draw(step) for step in range(recipe.EMA_EVERY + 1)]
        before = trainer.network.conv_in.weight.detach().clone()
        start = [parameter.detach().clone() for parameter in trainer.parameters]
        for batch in batches:
            trainer.step(batch.x0, batch.eps, batch.t)
        from tasks import train

        train.fit(run, None, [], until=len(batches))
        flat = torch.nn.utils.parameters_to_vector
        assert (before - trainer.network.conv_in.weight).abs().mean() > 1e-4
        assert (flat(trainer.network.parameters()) - flat(run.network.parameters())).abs().mean() < 1e-6
        first = torch.cat([values.flatten() for values in start])
        for mine in trainer.averages:
            theirs = run.averages[mine.profile]
            assert (flat(mine.weights) - first).abs().mean() > 1e-5
            assert (flat(mine.weights) - flat(theirs.weights)).abs().mean() < 1e-6


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_reference_without_accelerate_is_the_reference(tmp_path, monkeypatch, precision):
    import torch

    from infra.bench import peer, without_accelerate
    from infra.bench.gpu.recipe import TINY
    from infra.bench.gpu.reference import write_images

    write_images(tmp_path, 8, TINY.size)
    settings = peer.PeerSettings(TINY, 4, precision)

    def weights() -> torch.Tensor:
        run = peer.Peer(settings, tmp_path)
        run.batches = iter([torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)])
        torch.manual_seed(1)
        run.advance(3)
        return torch.nn.utils.parameters_to_vector(run.averaged().values()).detach()

    theirs = weights()
    monkeypatch.setattr(peer, "Accelerator", without_accelerate.Accelerator)
    assert torch.equal(weights(), theirs)


@pytest.mark.slow
def test_runtimes_agree(tmp_path):
    """With every package: ONNX Runtime and compiled PyTorch compute what eager PyTorch does; TensorRT needs a GPU."""
    options = ("--work", str(tmp_path), "--reports", str(tmp_path), "gpu", "--device", "cpu", "--only", "runtimes")
    found = call(bench.main, *options)
    assert found.returncode == 0, found.stderr
    rows = {row["case"]: row for row in stored(tmp_path)["rows"] if row["part"] == "runtimes"}
    assert rows["ONNX Runtime, batch 2"].get("psnr_db", 100) > 80
    assert rows["PyTorch, compiled, batch 2"].get("psnr_db", 100) > 80
    assert rows["TensorRT"]["skipped"] == "no NVIDIA GPU that this PyTorch can use"
