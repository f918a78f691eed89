"""Training: exact resume, what names a run, the batches, and what ends in the pipeline."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parent.parent
KILLED = -signal.SIGKILL


def write_inputs(folder: Path, conditioning: str = "label", count: int = 96) -> None:
    """Latents, codec and verdict of a tiny data set, in the forms that the stages before write."""
    import torch

    from tasks import atomic, latents

    rng = np.random.default_rng(0)
    classes = [] if conditioning == "none" else ["light", "dark"]
    codec = {"kind": "identity", "conditioning": conditioning, "size": 8, "channels": 1, "classes": classes}

    def split(name, n):
        labels = rng.integers(0, 2, n)
        pixels = (rng.integers(0, 100, (n, 1, 8, 8)) + 150 * (1 - labels)[:, None, None, None]).astype(np.uint8)
        columns = {"pixels": pixels}
        if conditioning == "label":
            columns["labels"] = labels
        if conditioning == "text":
            columns["captions"] = np.where(rng.random((n, 3)) < 0.3, -1, rng.integers(0, 4, (n, 3))).astype(np.int32)
            columns["captions"][:, 0] = labels
        shards = latents.write_shards(
            folder / "latents", name, n, lambda part: {key: column[part] for key, column in columns.items()}, 1000
        )
        return {"count": n, "keys_sha256": "keys", "shards": shards}

    (folder / "latents").mkdir(parents=True)
    splits = {"train": split("train", count), "test": split("test", 32)}
    texts = prompts = None
    if conditioning == "text":
        embeddings = torch.from_numpy(rng.standard_normal((4, 5, 32))).to(torch.bfloat16)
        texts = latents.write_shards(
            folder / "latents", "texts", 4, lambda part: {"embeddings": embeddings[part]}, 1000
        )
        prompts = latents.write_prompts(
            folder / "latents", torch.cat([embeddings[:2], torch.zeros_like(embeddings[:1])])
        )
        codec |= {"text": {"width": 32, "length": 5}, "prompts": ["a light", "a dark"]}
    latents.write_index(folder / "latents", codec, splits, texts, prompts)
    atomic.write_json(folder / "codec" / "codec.json", {"format": 1, **codec})
    atomic.write_json(folder / "accepted.json", {"verdict": "accepted", "sha256": "0" * 64})


def write_params(folder: Path, conditioning: str = "label", **train) -> None:
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    document["image"] = {"size": 8, "channels": 1}
    document["codec"]["conditioning"] = conditioning
    if conditioning == "none":
        document["evaluate"]["guidance_scale"] = 1.0
        document["visualize"]["guidance_scales"] = [1.0]
    document["model"] |= {"block_out_channels": [8, 16], "attention": [False, True], "norm_num_groups": 4}
    document["diffusion"]["timesteps"] = 50
    document["evaluate"]["steps"] = document["visualize"]["steps"] = 10
    document["train"] |= {
        "steps": 60,
        "batch_size": 16,
        "warmup_steps": 5,
        "log_every": 7,
        "checkpoint_every": 10,
        "sample_every": 25,
    } | train
    (folder / "params.yaml").write_text(yaml.safe_dump(document))


def command(folder: Path) -> list[str]:
    paths = ["latents", "codec", "accepted.json", "pipeline", "report"]
    arguments = [str(folder / path) for path in paths]
    return [sys.executable, "-m", "tasks.train", *arguments, "--params", str(folder / "params.yaml")]


def environment(folder: Path, database: Path) -> dict[str, str]:
    """A scratch folder of its own and the migrated MLflow database of the session, copied."""
    uri = folder / "mlflow.db"
    if not uri.exists():
        uri.write_bytes(database.read_bytes())
    return os.environ | {
        "AFTERIMAGE_SCRATCH": str(folder / "scratch"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{uri}",
        "OMP_NUM_THREADS": "1",
    }


def run(folder: Path, database: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder), cwd=ROOT, env=environment(folder, database), capture_output=True, text=True, timeout=300
    )


def results(folder: Path) -> dict[str, str]:
    files = sorted(path for part in ("pipeline", "report") for path in (folder / part).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, migrated_database):
    folder = tmp_path_factory.mktemp("undisturbed")
    write_inputs(folder)
    write_params(folder)
    done = run(folder, migrated_database)
    assert done.returncode == 0, done.stderr
    return folder


def copy_of(undisturbed: Path, folder: Path) -> None:
    import shutil

    for name in ("latents", "codec"):
        shutil.copytree(undisturbed / name, folder / name)
    for name in ("accepted.json", "params.yaml"):
        shutil.copy(undisturbed / name, folder / name)


def kill_when(process: subprocess.Popen, happens) -> None:
    """kill -9 as soon as `happens()`, unless the process ends before."""
    while process.poll() is None and not happens():
        time.sleep(0.002)
    process.kill()
    process.wait()


def test_killed_five_times_ends_in_the_same_bytes(undisturbed, tmp_path, migrated_database):
    copy_of(undisturbed, tmp_path)
    checkpoints = tmp_path / "scratch" / "train"

    def writes_a_checkpoint():
        return any(checkpoints.glob("*/.step-*.tmp"))

    def has(step):
        return lambda: any(checkpoints.glob(f"*/step-{step:08d}/manifest.json"))

    codes = []
    for moment in (writes_a_checkpoint, has(10), writes_a_checkpoint, has(30), has(40)):
        process = subprocess.Popen(
            command(tmp_path),
            cwd=ROOT,
            env=environment(tmp_path, migrated_database),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        kill_when(process, moment)
        codes.append(process.returncode)
    assert codes == [KILLED] * 5
    done = run(tmp_path, migrated_database)
    assert done.returncode == 0, done.stderr
    assert "continues at step" in done.stdout
    assert results(tmp_path) == results(undisturbed)


def test_sigterm_saves_and_leaves_with_its_own_code(undisturbed, tmp_path, migrated_database):
    copy_of(undisturbed, tmp_path)
    process = subprocess.Popen(
        command(tmp_path),
        cwd=ROOT,
        env=environment(tmp_path, migrated_database),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not any((tmp_path / "scratch" / "train").glob("*/step-00000010/manifest.json")):
        time.sleep(0.005)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "the same command continues" in output
    done = run(tmp_path, migrated_database)
    assert int(re.search(r"continues at step (\d+)", done.stdout)[1]) > 10
    assert results(tmp_path) == results(undisturbed)


def test_damaged_newest_checkpoint_falls_back(undisturbed, tmp_path, migrated_database):
    import shutil

    copy_of(undisturbed, tmp_path)
    shutil.copytree(undisturbed / "scratch", tmp_path / "scratch")
    newest = sorted((tmp_path / "scratch" / "train").glob("*/step-*"))[-1] / "model.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    done = run(tmp_path, migrated_database)
    assert "step-00000060 is damaged" in done.stderr
    assert "continues at step 50 of 60" in done.stdout
    assert results(tmp_path) == results(undisturbed)


def test_longer_constant_run_continues_a_shorter_one(undisturbed, tmp_path, migrated_database):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        copy_of(undisturbed, folder)
    write_params(whole, lr_schedule="constant", steps=20)
    write_params(parts, lr_schedule="constant", steps=10)
    for folder in (whole, parts):
        assert run(folder, migrated_database).returncode == 0
    write_params(parts, lr_schedule="constant", steps=20)
    done = run(parts, migrated_database)
    assert "continues at step 10 of 20" in done.stdout
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert results(whole)[weights] == results(parts)[weights]


def test_another_learning_rate_starts_anew(undisturbed, tmp_path, migrated_database):
    import shutil

    copy_of(undisturbed, tmp_path)
    shutil.copytree(undisturbed / "scratch", tmp_path / "scratch")
    write_params(tmp_path, steps=10, warmup_steps=2, learning_rate=0.001)
    done = run(tmp_path, migrated_database)
    assert done.returncode == 0, done.stderr
    assert "continues" not in done.stdout


@pytest.mark.parametrize("conditioning", ["none", "text"])
def test_other_conditionings_train(tmp_path, migrated_database, conditioning):
    from models.pipeline import load_pipeline

    write_inputs(tmp_path, conditioning)
    write_params(tmp_path, conditioning, steps=8, warmup_steps=2)
    done = run(tmp_path, migrated_database)
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "pipeline" / "afterimage.json").read_text())
    assert info["conditioning"] == conditioning
    assert (tmp_path / "pipeline" / "model_index.json").exists() == (conditioning == "none")
    if conditioning == "none":
        assert load_pipeline(tmp_path / "pipeline").sample([1, 2], steps=5).shape == (2, 1, 8, 8)


def test_unconditional_pipeline_runs_in_diffusers(tmp_path, migrated_database):
    import torch
    from diffusers import DDPMPipeline

    from models.pipeline import load_pipeline

    write_inputs(tmp_path, "none")
    write_params(tmp_path, "none", steps=8, warmup_steps=2)
    assert run(tmp_path, migrated_database).returncode == 0
    theirs = DDPMPipeline.from_pretrained(str(tmp_path / "pipeline"))
    drawn = theirs(batch_size=2, num_inference_steps=10, output_type="np", generator=torch.Generator().manual_seed(0))
    assert drawn.images.shape == (2, 8, 8, 1)
    ours = load_pipeline(tmp_path / "pipeline")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 40])
    assert torch.allclose(ours.unet(x, t), theirs.unet(x, t).sample, atol=1e-5)


def test_batch_larger_than_the_data_is_refused(tmp_path, migrated_database):
    write_inputs(tmp_path, count=12)
    write_params(tmp_path)
    done = run(tmp_path, migrated_database)
    assert done.returncode == 1
    assert "train.batch_size 16 exceeds the 12 training images; lower it" in done.stderr
    assert "Traceback" not in done.stderr


def test_diverging_loss_stops_the_run(tmp_path, migrated_database):
    write_inputs(tmp_path)
    write_params(tmp_path, learning_rate=0.99, clip_norm=1e30, warmup_steps=0, weight_decay=1e30)
    done = run(tmp_path, migrated_database)
    assert done.returncode == 1
    assert re.search(r"the loss is (nan|inf) at step \d+; lower train.learning_rate", done.stderr)


class TestBatches:
    def batches(self, tmp_path, where="auto", conditioning="label", **options):
        import torch

        from tasks.batches import Batches, conditioning_of, open_store

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
