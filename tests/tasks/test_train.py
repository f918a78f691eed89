"""Training: what names a run, what it leaves behind, what it refuses, the batches, the averages."""

import copy
import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.runtime.stage import StageError
from tests.support.train_inputs import checkpoints, prepare_here, results, train_here, write_inputs, write_params

SHORT = {"steps": 12, "warmup_steps": 2, "log_every": 3, "checkpoint_every": 6, "sample_every": 6}
RARELY = {"steps": 100, "log_every": 100, "checkpoint_every": 100, "sample_every": 100}
WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def trained(tmp_path, monkeypatch, migrated_database):
    """Call it with parameters of `train` to run a training; gives its folder."""

    def call(folder: Path = tmp_path, conditioning: str = "label", **train) -> Path:
        if not (folder / "latents").exists():
            folder.mkdir(exist_ok=True)
            write_inputs(folder, conditioning)
        write_params(folder, conditioning, **SHORT | train)
        train_here(folder, monkeypatch, migrated_database)
        return folder

    return call


@pytest.fixture
def prepared(tmp_path, monkeypatch, migrated_database):
    """Call it with parameters of `train` for a run that has made no step yet."""

    def call(conditioning: str = "label", **train):
        if not (tmp_path / "latents").exists():
            write_inputs(tmp_path, conditioning)
        write_params(tmp_path, conditioning, **train)
        return prepare_here(tmp_path, monkeypatch, migrated_database)

    return call


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "report" / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_longer_constant_run_continues_a_shorter_one(trained, tmp_path, capsys):
    """Also its history, although the shorter run ended between two rows and closed with one of its own."""
    options = {"lr_schedule": "constant", "log_every": 7, "sample_every": 21}
    whole = trained(tmp_path / "whole", steps=24, **options)
    parts = trained(tmp_path / "parts", steps=10, **options)
    assert [row["step"] for row in history(parts)] == ["7", "10"]
    trained(parts, steps=24, **options)
    assert "continues at step 10 of 24" in capsys.readouterr().out
    assert [row["step"] for row in history(parts)] == ["7", "14", "21", "24"]
    assert results(whole) == results(parts)


def test_a_changed_parameter_starts_anew_and_says_which(trained, capsys):
    folder = trained()
    assert "starts anew" not in capsys.readouterr().out
    trained(learning_rate=0.001, log_every=4)
    said = capsys.readouterr().out
    assert "continues" not in said
    (line,) = re.findall(r"starts anew: (.*)", said)
    assert line.startswith("train.learning_rate 0.002 -> 0.001; the checkpoints made before that stay in ")
    assert Path(line.rsplit(" ", 1)[1]).parent == folder / "scratch" / "train"
    trained(learning_rate=0.001, log_every=5, data_on_device="stream")
    assert "continues at step 12 of 12" in capsys.readouterr().out


def test_another_number_of_threads_starts_anew_and_says_so(trained, capsys):
    """Sums are divided among the threads, so the weights differ, and neither continues the other's checkpoints."""
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        folder = trained(steps=6)
        two = results(folder)
        torch.set_num_threads(1)
        capsys.readouterr()
        trained(steps=6)
        said = capsys.readouterr().out
        assert "continues at" not in said
        (line,) = re.findall(r"starts anew: (.*)", said)
        assert re.fullmatch(
            r"threads 2 -> 1; the checkpoints made before that stay in \S+, and OMP_NUM_THREADS=2 continues them", line
        )
        torch.set_num_threads(2)
        trained(steps=6)
        assert "continues at step 6 of 6" in capsys.readouterr().out
        assert results(folder)["report/run.json"] == two["report/run.json"]
    finally:
        torch.set_num_threads(before)


def test_the_threads_of_the_key_are_those_that_train(prepared, monkeypatch):
    """Accelerate may set another number for several processes on one CPU."""
    import torch

    from tasks.training import key as training_key

    before = torch.get_num_threads()
    real = training_key.facts

    def facts(*arguments):
        found = real(*arguments)
        torch.set_num_threads(found["trajectory"]["threads"] + 1)
        return found

    monkeypatch.setattr(training_key, "facts", facts)
    try:
        prepared(**RARELY)
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


def test_another_average_for_the_pipeline_trains_no_step(trained, tmp_path, capsys):
    first = trained(ema=["decay-0.9", "std-0.10", "gamma-6.94"], pipeline_ema="decay-0.9")
    before = results(first)
    losses = json.loads((first / "report" / "run.json").read_text())["averages"]
    assert set(losses) == {"decay-0.9", "std-0.10", "gamma-6.94"}
    rows = history(first)
    assert float(rows[-1]["held_out_loss"]) == losses["decay-0.9"]
    assert float(rows[-1]["held_out_loss/std-0.10"]) == losses["std-0.10"]
    trained(ema=["decay-0.9", "std-0.10", "gamma-6.94"], pipeline_ema="std-0.10")
    assert "continues at step 12 of 12" in capsys.readouterr().out
    after = results(first)
    assert after[WEIGHTS] != before[WEIGHTS]
    assert after["step-00000012/std-0.10.safetensors"] == after[WEIGHTS] or after["step-00000012/manifest.json"]
    assert float(history(first)[-1]["held_out_loss"]) == losses["std-0.10"]
    whole = trained(tmp_path / "whole", ema=["decay-0.9", "std-0.10", "gamma-6.94"], pipeline_ema="std-0.10")
    assert results(whole) | {"step-00000012/manifest.json": ""} == after | {"step-00000012/manifest.json": ""}


def test_mlflow_holds_every_curve_and_grid(trained):
    import mlflow

    averages = {"ema": ["decay-0.9", "std-0.10"], "pipeline_ema": "decay-0.9"}
    folder = trained(steps=4, warmup_steps=1, log_every=2, sample_every=2, **averages)
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    by_timestep = {"loss_t0_12", "loss_t13_24", "loss_t25_37", "loss_t38_49"}
    losses = {"loss", "held_out_loss", "held_out_loss_std-0.10", *by_timestep}
    speed = {"img_per_s", "model_flops_utilisation", "peak_memory_mb"}
    held = {name for name in run.data.metrics if not name.startswith("system/")}
    assert held == {f"train/{name}" for name in (*losses, *speed, "learning_rate", "grad_norm")}
    assert not held & set(run.data.params), "the comparison page shows one of two that share a name"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/grad_norm")] == [2, 4]
    assert 0 < run.data.metrics["train/model_flops_utilisation"] < 1 and run.data.metrics["train/img_per_s"] > 0
    grids = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert len(grids) == 2


@pytest.mark.parametrize("conditioning", ["none", "text"])
def test_other_conditionings_train(trained, conditioning):
    from models.pipeline import load_pipeline
    from models.samplers import Sampling

    folder = trained(conditioning=conditioning)
    info = json.loads((folder / "pipeline" / "afterimage.json").read_text())
    assert info["conditioning"] == conditioning
    assert (folder / "pipeline" / "model_index.json").exists() == (conditioning == "none")
    if conditioning == "none":
        drawn = load_pipeline(folder / "pipeline").sample([1, 2], sampling=Sampling("ddim", 5))
        assert drawn.shape == (2, 1, 8, 8)


def test_unconditional_pipeline_runs_in_diffusers(trained):
    import torch
    from diffusers import DDPMPipeline

    from models.pipeline import load_pipeline

    folder = trained(conditioning="none")
    theirs = DDPMPipeline.from_pretrained(str(folder / "pipeline"))
    drawn = theirs(batch_size=2, num_inference_steps=10, output_type="np", generator=torch.Generator().manual_seed(0))
    assert drawn.images.shape == (2, 8, 8, 1)
    ours = load_pipeline(folder / "pipeline")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 40])
    assert torch.allclose(ours.unet(x, t), theirs.unet(x, t).sample, atol=1e-5)


def test_every_way_to_save_memory_or_time_trains_the_same(trained, tmp_path):
    """Accumulated parts draw noise of their own, so they are compared with themselves."""
    plain = trained(tmp_path / "plain", dropout=0.2, data_on_device="device")
    for name, options in {
        "streamed": {"data_on_device": "stream"},
        "recomputed": {"gradient_checkpointing": True},
    }.items():
        other = trained(tmp_path / name, dropout=0.2, **options)
        assert results(other)[WEIGHTS] == results(plain)[WEIGHTS], name
    last = trained(tmp_path / "channels_last", dropout=0.2, channels_last=True)
    assert float(history(last)[-1]["loss"]) == pytest.approx(float(history(plain)[-1]["loss"]), rel=5e-3)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}, {"gradient_accumulation": 4}])
def test_resume_is_exact_in_other_modes(trained, tmp_path, options):
    """A run that lost its last checkpoint makes it again; the mode is the only thing that differs."""
    folder = trained(dropout=0.2, **options)
    whole = results(folder)
    newest = checkpoints(folder / "scratch")[-1]
    shutil.rmtree(newest)
    trained(dropout=0.2, **options)
    assert results(folder) == whole


def test_the_best_checkpoint_is_kept_beside_the_newest(trained, tmp_path):
    """Under a learning rate so high that the averages soon get worse."""
    folder = trained(steps=60, sample_every=6, learning_rate=0.3, clip_norm=100.0, lr_schedule="constant")
    rows = {int(row["step"]): float(row["held_out_loss"]) for row in history(folder) if row["held_out_loss"]}
    best = min(rows, key=lambda step: rows[step])
    assert best < 54, "the learning rate was not high enough to show anything"
    assert [int(path.name[5:]) for path in checkpoints(folder / "scratch")] == [best, 54, 60]


class TestRefused:
    def test_batch_that_processes_cannot_share(self, trained, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "3")
        with pytest.raises(StageError, match="cannot be shared among 3 processes in 1 accumulated parts; make it a mu"):
            trained()

    def test_more_processes_than_gpus(self, trained, monkeypatch):
        """Without this each would train alone, on the whole of the batch."""
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "16")
        with pytest.raises(StageError, match=r"16 processes were started on a machine with \d+ GPUs; lower num_proc"):
            trained()

    def test_memory_that_ran_out(self, trained, monkeypatch):
        import torch

        from tasks.training.batches import Batches

        def draw(self, step, part=0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(Batches, "draw", draw)
        with pytest.raises(StageError, match=r"ran out with train.batch_size 16 in 1 part\(s\); raise train.gradient"):
            trained()

    def test_fp16_without_a_gpu(self, trained):
        with pytest.raises(StageError, match="'fp16' needs a GPU; use 'bf16' or 'no'"):
            trained(precision="fp16")

    def test_a_checkpoint_of_another_network(self, trained):
        folder = trained()
        newest = checkpoints(folder / "scratch")[-1]
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["network"]["layers_per_block"] = 3
        (newest / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(StageError, match=r"was made by another network \(layers_per_block 3 -> 1\); remove that"):
            trained()

    def test_a_loss_that_is_no_number(self, trained):
        with pytest.raises(StageError, match=r"is (nan|inf) at step \d+; lower train.learning_rate .*no checkpoint"):
            trained(learning_rate=0.99, clip_norm=1e30, warmup_steps=0, weight_decay=1e30)

    def test_a_loss_that_explodes(self, tmp_path):
        from tasks.training.log import refuse_divergence

        for step in (30, 60):
            (tmp_path / f"step-{step:08d}").mkdir()
        usual = [{"step": 10 * n, "loss": 0.1 + 0.02 * (n % 2)} for n in range(1, 6)]
        one_bad_row = [*usual, {"step": 60, "loss": 5.0}, {"step": 70, "loss": 0.1}]
        for end in range(1, len(one_bad_row) + 1):
            refuse_divergence(one_bad_row[:end], tmp_path)
        exploded = [*usual, *({"step": step, "loss": 5.0} for step in (60, 70, 80))]
        refuse_divergence(exploded[:-1], tmp_path)
        with pytest.raises(StageError, match=r"exploded: 5 at step 80, 42 times .*checkpoint is \S+step-00000030\)"):
            refuse_divergence(exploded, tmp_path)


class TestWarmStart:
    def test_first_weights_are_those_of_the_pipeline(self, trained, tmp_path, capsys):
        """With a learning rate of nearly nothing they stay what they were."""
        from safetensors.torch import load_file

        first = trained(tmp_path / "first")
        quiet = {"learning_rate": 1e-12, "weight_decay": 0.0, "init_from": str(first / "pipeline")}
        second = trained(tmp_path / "second", **quiet)
        assert f"starts from the weights in {first / 'pipeline'}" in capsys.readouterr().out
        ours, theirs = (load_file(folder / WEIGHTS) for folder in (second, first))
        assert all(np.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)

    def test_other_weights_in_the_same_folder_make_another_run(self, trained, tmp_path, capsys):
        first = trained(tmp_path / "first")
        second = trained(tmp_path / "second", init_from=str(first / "pipeline"))
        weights = first / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
        trained(second, init_from=str(first / "pipeline"))
        assert "starts anew: data init_from; " in capsys.readouterr().out

    def test_published_weights_keep_what_they_have_otherwise(self, trained, tmp_path):
        """As google/ddpm-cifar10-32: another epsilon of the norms, other padding, other features of time."""
        import torch
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        otherwise = {"norm_eps": 1e-2, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
        torch.manual_seed(0)
        theirs = UNet2DModel(
            8,
            1,
            1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            **otherwise,
        )
        scheduler = DDPMScheduler(50, prediction_type="v_prediction")
        DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path / "published")
        quiet = {"learning_rate": 1e-12, "weight_decay": 0.0, "condition_dropout": 0.0}
        trained(tmp_path / "run", "none", init_from=str(tmp_path / "published"), **quiet)
        ours = UNet2DModel.from_pretrained(str(tmp_path / "run" / "pipeline" / "unet"))
        assert {name: ours.config[name] for name in otherwise} == otherwise
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 40])
        with torch.no_grad():
            assert torch.allclose(ours(x, t).sample, theirs.eval()(x, t).sample, atol=1e-5)

    def test_another_network_or_prediction_is_refused(self, trained, tmp_path):
        first = trained(tmp_path / "first")
        config = first / "pipeline" / "unet" / "config.json"
        sound = config.read_text()
        config.write_text(sound.replace('"layers_per_block": 1', '"layers_per_block": 2'))
        options = {"init_from": str(first / "pipeline")}
        with pytest.raises(StageError, match=r"is another network \(layers_per_block 2 -> 1\); set the section model"):
            trained(tmp_path / "second", **options)
        config.write_text(sound.replace('"norm_eps": 1e-05', '"act_fn": "gelu"'))
        with pytest.raises(StageError, match=r"cannot be trained here: the network's act_fn is 'gelu'"):
            trained(tmp_path / "second", **options)
        config.write_text(sound)
        scheduler = first / "pipeline" / "scheduler" / "scheduler_config.json"
        scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
        with pytest.raises(StageError, match=r"predicts epsilon, not v_prediction; set diffusion.prediction"):
            trained(tmp_path / "second", **options)
        with pytest.raises(StageError, match=r"holds no pipeline .* correct it"):
            trained(tmp_path / "second", init_from=str(tmp_path / "nowhere"))


class TestAverages:
    @pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
    def test_exponents_of_the_paper(self, std, gamma):
        from models.ema import gamma_of_std

        assert gamma_of_std(std) == pytest.approx(gamma, abs=0.01)

    def test_power_law_weighs_the_past_as_its_profile_says(self):
        """The weight of step t in an average at T is proportional to t^gamma (Karras et al. 2024, eq. 1)."""
        import torch

        from models.ema import EMA

        steps, gamma = 2000, 3.0
        module = torch.nn.Linear(1, steps, bias=False)
        average = EMA(module, f"gamma-{gamma}")
        for step in range(1, steps + 1):
            with torch.no_grad():
                module.weight.zero_()[step - 1] = 1
            average.update(step)
        weights = average.state_dict()["weight"][:, 0].double().numpy()
        assert weights.sum() == pytest.approx(1, abs=1e-4)
        profile = np.arange(1, steps + 1) ** gamma
        assert np.allclose(weights[500:], (profile / profile.sum())[500:], rtol=0.01)
        centre = (weights * np.arange(1, steps + 1)).sum() / steps
        width = math.sqrt((weights * (np.arange(1, steps + 1) / steps - centre) ** 2).sum())
        assert width == pytest.approx(math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2), rel=0.01)

    def test_names_without_a_meaning(self):
        from models.ema import decay_at

        assert decay_at(10**6, "decay-0.999") == 0.999
        assert decay_at(1, "decay-0.999") == pytest.approx(2 / 11)
        with pytest.raises(ValueError, match="unknown average"):
            decay_at(1, "mean-0.5")


def test_losses_are_told_apart_by_timestep():
    import torch

    from tasks.training.log import Tally, bucket_names

    tally = Tally(10, torch.device("cpu"))
    tally.add_losses(torch.tensor([0, 2, 3, 9]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    tally.add_losses(torch.tensor([9]), torch.tensor([9.0]))
    for norm in (2.0, math.inf, 4.0):
        tally.add_gradient_norm(torch.tensor(norm))
    assert bucket_names(10) == ["loss_t0_2", "loss_t3_4", "loss_t5_7", "loss_t8_9"]
    expected = {"loss": 5.0, "loss_t0_2": 2.0, "loss_t3_4": 5.0, "loss_t8_9": 8.0, "grad_norm": 3.0}
    assert tally.row(tally.sums) == expected


def test_operations_of_a_network_are_counted():
    """A 3x3 convolution over 8x8 pixels and attention over 16 tokens, by hand."""
    import torch
    from torch import nn

    from models.flops import forward_flops, matmul_ceiling
    from models.networks.unet import Attention, UNetConfig

    config = UNetConfig(8, 1, (8,), (True,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)
    convolution = forward_flops(nn.Conv2d(3, 5, 3, padding=1), torch.randn(4, 3, 8, 8))
    assert convolution == 2 * 64 * 5 * 3 * 9
    attention = forward_flops(Attention(config, 8), torch.randn(2, 8, 4, 4))
    assert attention == 2 * (4 * 16 * 8 * 8 + 2 * 16 * 16 * 8)
    assert matmul_ceiling(torch.device("cpu"), torch.float32, 1) > 1e8


def test_the_loop_is_the_one_of_the_textbook(prepared):
    """Written out without accelerate: AdamW on the mean loss of both accumulated parts, a warm-up, half a cosine, a
    norm of the gradient that is cut, and an average after each step."""
    import torch

    from tasks import train

    options = {"gradient_accumulation": 2, "clip_norm": 1.0, "learning_rate": 0.01, "weight_decay": 0.1}
    run = prepared(ema=["decay-0.5"], pipeline_ema="decay-0.5", **RARELY | options | {"steps": 8, "warmup_steps": 3})
    plain = copy.deepcopy(run.network)
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.1)
    rates = [0.01 / 3, 0.02 / 3, 0.01, *(0.005 * (1 + math.cos(math.pi * n / 5)) for n in range(3))]
    average = [parameter.detach().clone() for parameter in plain.parameters()]
    norms = []
    for step, rate in enumerate(rates):
        torch.cat([run.objective(plain, run.batches.draw(step, part)) for part in range(2)]).mean().backward()
        gradients = [parameter.grad for parameter in plain.parameters()]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        for gradient in gradients:
            gradient *= min(1.0, 1.0 / norms[-1])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.5, (2 + step) / (11 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, plain.parameters(), strict=True)]
    train.fit(run, None, [], until=len(rates))
    assert min(norms) < 1.0 < max(norms), "some gradients are cut and some are not"
    own = torch.nn.utils.parameters_to_vector
    # Where a gradient is nearly nothing AdamW divides its rounding by itself: the mean tells, not the largest.
    assert (own(run.network.parameters()) - own(plain.parameters())).abs().mean() < 2e-5
    assert (own(run.averages["decay-0.5"].weights) - own(average)).abs().mean() < 2e-5


@pytest.mark.parametrize(("schedule", "last"), [("constant", 0.002), ("cosine", 0.0)])
def test_learning_rates(schedule, last):
    from tasks import params
    from tasks.train import learning_rate_at

    given = params.load(Path("params.yaml")).train
    given = given.model_copy(update={"lr_schedule": schedule, "steps": 110, "warmup_steps": 10, "learning_rate": 0.002})
    rates = [learning_rate_at(step, given) for step in (0, 4, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.0002, 0.001, 0.002, 0.002, (0.002 + last) / 2, last])


class Waits(TorchFunctionMode):
    """Counts what would have the host wait for a GPU: a value that is asked for, a copy to the host's memory."""

    ASKED = ("cpu", "tolist", "numpy")
    OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count, outer = 0, self

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                outer.count += func._schema.name in outer.OPERATORS
                return func(*args, **kwargs or {})

        self.operators = Operators()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.ASKED
        return func(*args, **kwargs or {})

    def during(self, call) -> int:
        before = self.count
        with self, self.operators:
            call()
        return self.count - before


@pytest.mark.parametrize(
    ("conditioning", "options"), [("label", {"gradient_accumulation": 2, "precision": "bf16"}), ("text", {})]
)
def test_a_step_never_waits_for_the_device(prepared, conditioning, options):
    """Between two rows of the history nothing asks for a value, so that a GPU always has its next step before it."""
    from tasks import train

    run = prepared(conditioning, data_on_device="device", **RARELY, **options)
    waits = Waits()
    few = waits.during(lambda: train.fit(run, None, [], until=1))
    many = waits.during(lambda: train.fit(run, None, [], until=3))
    assert few == many > 0, "each call ends in a checkpoint, which waits; the steps before it must not"


def test_the_scale_of_a_loss_in_fp16_is_restored(prepared):
    import torch

    from tasks.training import checkpoint
    from tasks.training import run as training_run

    run, other = prepared(**RARELY), prepared(**RARELY)
    run.accelerator.scaler, other.accelerator.scaler = (torch.amp.GradScaler("cpu", growth_interval=3) for _ in "12")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], fused=True)
    for _ in range(4):  # the scale doubles once, and is one step on its way to double again
        run.accelerator.scaler.scale(weight.sum()).backward()
        run.accelerator.scaler.step(optimizer)
        run.accelerator.scaler.update()
    checkpoint.save(run.folder, training_run.snapshot(run, training_run.gathered(run)))
    training_run.restore(other, checkpoint.load_newest(run.folder, 100))
    assert other.accelerator.scaler.state_dict() == run.accelerator.scaler.state_dict()
    assert other.accelerator.scaler.state_dict()["scale"] == 2**17
    assert other.accelerator.scaler.state_dict()["_growth_tracker"] == 1


@pytest.mark.gpu
def test_fp16_resumes_with_its_loss_scale(trained, tmp_path):
    folder = trained(precision="fp16")
    extra = json.loads((checkpoints(folder / "scratch")[-1] / "extra.json").read_text())
    assert extra["scaler"]["scale"] > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_network_trains_the_same(trained, tmp_path):
    plain = trained(tmp_path / "plain")
    compiled = trained(tmp_path / "compiled", compile=True)
    assert float(history(compiled)[-1]["loss"]) == pytest.approx(float(history(plain)[-1]["loss"]), rel=1e-3)


class TestBatches:
    def batches(self, tmp_path, where="auto", conditioning="label", **options):
        import torch

        from tasks.training.batches import Batches, conditioning_of, open_store

        if not (tmp_path / "latents").exists():
            write_inputs(tmp_path, conditioning)
        defaults = {"batch_size": 16, "timesteps": 50, "condition_dropout": 0.25, "horizontal_flip": False, "seed": 1}
        device = torch.device("cpu")
        given = conditioning_of(tmp_path / "latents", where, device)
        store = open_store(tmp_path / "latents", "train", where, device)
        return Batches(store, device=device, **given, **defaults | options)

    def test_an_epoch_visits_every_image_once_across_processes(self, tmp_path):
        rows = [
            row
            for step in range(6)
            for process in range(2)
            for row in self.batches(tmp_path, batch_size=8, process=process, processes=2).rows(step).tolist()
        ]
        assert sorted(rows) == list(range(96))

    def test_accumulated_parts_make_the_whole_batch(self, tmp_path):
        whole = self.batches(tmp_path).rows(3).tolist()
        parts = self.batches(tmp_path, parts=4)
        assert [row for part in range(4) for row in parts.rows(3, part).tolist()] == whole

    def test_batch_larger_than_an_epoch_wraps_into_the_next(self, tmp_path):
        rows = self.batches(tmp_path, batch_size=200).rows(0).tolist()
        assert sorted(rows[:96]) == list(range(96)) and rows[96:192] != rows[:96]

    def test_dropped_set_changes_every_epoch_at_its_rate(self, tmp_path):
        batches = self.batches(tmp_path)

        def dropped(epoch):
            steps = range(epoch * 6, epoch * 6 + 6)
            return {
                int(row)
                for step in steps
                for row, condition in zip(batches.rows(step), batches.draw(step).condition, strict=True)
                if condition == 2
            }

        epochs = [dropped(epoch) for epoch in range(20)]
        assert len({frozenset(epoch) for epoch in epochs}) == 20
        assert np.mean([len(epoch) for epoch in epochs]) / 96 == pytest.approx(0.25, abs=0.04)

    @pytest.mark.parametrize("conditioning", ["none", "label", "text"])
    def test_streamed_shards_draw_the_same_bits(self, tmp_path, conditioning):
        import torch

        write_inputs(tmp_path, conditioning, shard_size=17)
        options = {"horizontal_flip": True, "parts": 2, "conditioning": conditioning}
        kept, streamed = (self.batches(tmp_path, where, **options) for where in ("device", "stream"))
        assert type(kept.store) is not type(streamed.store)
        # in order, as training draws them, then as a resumed run and a measurement in between do
        for step, part in [(0, 0), (0, 1), (1, 0), (1, 1), (9, 1), (3, 0), (10, 0)]:
            a, b = kept.draw(step, part), streamed.draw(step, part)
            for name in ("x0", "eps", "t", "condition"):
                ours, theirs = getattr(a, name), getattr(b, name)
                assert (ours is None and theirs is None) or torch.equal(ours, theirs), name

    def test_what_does_not_fit_is_streamed(self, tmp_path, monkeypatch):
        from tasks.training import batches

        write_inputs(tmp_path)
        size = 96 * (64 + 8)
        for free, where in ((size / batches.SHARE - 1, "streamed"), (size / batches.SHARE + 1, "on the device")):
            monkeypatch.setattr(batches, "free_memory", lambda device, free=free: free)
            assert self.batches(tmp_path).store.where == where
