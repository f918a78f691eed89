"""Training: what identifies a run, what it writes, what it refuses, and the weights that it starts from."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tasks.runtime.errors import StageError
from tests.support.train_inputs import WEIGHTS, checkpoints, history, results


def test_longer_constant_run_continues_a_shorter_one(trained, tmp_path, capsys):
    """The history as well, although the shorter run ended between two rows with an extra row."""
    options = {"lr_schedule": "constant", "log_every": 7, "sample_every": 21}
    whole = trained(tmp_path / "whole", steps=24, **options)
    parts = trained(tmp_path / "parts", steps=10, **options)
    assert [row["step"] for row in history(parts)] == ["7", "10"]
    trained(parts, steps=24, **options)
    assert "continues at step 10 of 24" in capsys.readouterr().out
    assert [row["step"] for row in history(parts)] == ["7", "14", "21", "24"]
    assert results(whole) == results(parts)


def test_a_changed_parameter_starts_anew_and_is_named(trained, capsys):
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


def test_the_history_has_the_learning_rate_of_muon(trained):
    rows = history(trained(optimizer="muon", learning_rate=0.002, muon_learning_rate=0.03))
    rates = [(float(row["learning_rate"]), float(row["muon_learning_rate"])) for row in rows]
    assert rates[0][0] > rates[-1][0] > 0
    assert [muon / adamw for adamw, muon in rates] == pytest.approx([15] * len(rates))


def test_another_number_of_threads_starts_anew_and_is_named(trained, capsys):
    """Sums are divided among the threads, so the weights differ and no run continues the other's checkpoints."""
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
    """Accelerate may set another number of threads for several processes on one CPU."""
    import torch

    from tasks.training import key as training_key

    before = torch.get_num_threads()
    real = training_key.run_facts

    def run_facts(*arguments):
        found = real(*arguments)
        torch.set_num_threads(found.trajectory["threads"] + 1)
        return found

    monkeypatch.setattr(training_key, "run_facts", run_facts)
    try:
        prepared(steps=100)
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
    from models.noise.samplers import Sampling
    from models.pipeline import load_pipeline

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
    assert torch.allclose(ours.network(x, t), theirs.unet(x, t).sample, atol=1e-5)


def test_every_way_to_save_memory_or_time_trains_the_same(trained, tmp_path):
    """Accumulated parts draw different noise, so `test_resume_is_exact_in_other_modes` covers them."""
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
@pytest.mark.slow
def test_resume_is_exact_in_other_modes(trained, tmp_path, options):
    """A run that lost its last checkpoint makes it again, bit for bit."""
    folder = trained(dropout=0.2, **options)
    whole = results(folder)
    newest = checkpoints(folder / "scratch")[-1]
    shutil.rmtree(newest)
    trained(dropout=0.2, **options)
    assert results(folder) == whole


def test_the_best_checkpoint_is_kept_beside_the_newest(trained, tmp_path):
    """Learning rate and weight decay are so high that the averages soon get worse."""
    high = {"learning_rate": 0.9, "weight_decay": 1.0, "clip_norm": 100.0}
    folder = trained(steps=60, sample_every=6, lr_schedule="constant", **high)
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
        """Without the check each process would train alone on the whole batch."""
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "16")
        with pytest.raises(StageError, match=r"16 processes were started on a machine with \d+ GPUs; lower num_proc"):
            trained()

    def test_an_engine_that_is_not_supported(self, trained, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(StageError, match="accelerate is configured for DEEPSPEED, which training does not support"):
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

    def test_a_loss_that_is_not_finite(self, trained):
        with pytest.raises(StageError, match=r"is (nan|inf) at step \d+; lower train.learning_rate .*no checkpoint"):
            trained(learning_rate=0.99, clip_norm=1e30, warmup_steps=0, weight_decay=1e30)

    def test_a_loss_that_explodes(self, tmp_path):
        from tasks.training.checkpoint import Writer
        from tasks.training.log import HistoryRow, refuse_divergence

        def row(step, loss):
            return HistoryRow(step, 0.001, loss, {}, None)

        for step in (30, 60):
            (tmp_path / f"step-{step:08d}").mkdir()
        saved = Writer(tmp_path)
        usual = [row(10 * n, 0.1 + 0.02 * (n % 2)) for n in range(1, 6)]
        one_bad_row = [*usual, row(60, 5.0), row(70, 0.1)]
        for end in range(1, len(one_bad_row) + 1):
            refuse_divergence(one_bad_row[:end], saved)
        exploded = [*usual, *(row(step, 5.0) for step in (60, 70, 80))]
        refuse_divergence(exploded[:-1], saved)
        with pytest.raises(StageError, match=r"exploded: 5 at step 80, 42 times .*checkpoint is \S+step-00000030\)"):
            refuse_divergence(exploded, saved)


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


class TestWarmStart:
    def test_first_weights_are_those_of_the_pipeline(self, trained, tmp_path, capsys):
        """With a learning rate near zero they do not change."""
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

    def test_published_weights_keep_properties_that_have_no_parameter(self, trained, tmp_path):
        """As in google/ddpm-cifar10-32: another norm epsilon, padding and timestep embedding."""
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
