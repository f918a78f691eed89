"""DreamBooth: the stage `prior`, the mixed batches, and the measures."""

from __future__ import annotations

import csv
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.device import emulates_bf16
from models.json_files import read_json
from tasks.formats.prior import FILE, Prior, pictures
from tasks.runtime.errors import StageError
from tests.support import dream_inputs, text_inputs
from tests.support.data_inputs import contents
from tests.support.dream_inputs import run_prior


@pytest.fixture(scope="module")
def made(tmp_path_factory, migrated_database):
    """The images, codec, latents and base; and what `prior` drew. Read them only."""
    root = tmp_path_factory.mktemp("dreambooth")
    dream_inputs.make(root, migrated_database)
    with pytest.MonkeyPatch.context() as patch:
        text_inputs.at_home(root, patch)
        run_prior(root)
    return root


@pytest.fixture
def root(made, monkeypatch):
    text_inputs.at_home(made, monkeypatch)
    return made


def batches(root, weight=1.0, size=8, text=False):
    from tasks.training.batches import DrawConfig
    from tasks.training.prior_mix import Subject, open_mix
    from tests.support.train_inputs import uniform

    config = DrawConfig(batch_size=size, timesteps=uniform(20), seed=0, condition_dropout=1.0)
    return open_mix(
        Subject(root / "prior", root / "codec" if text else None), config, weight, "device", torch.device("cpu")
    )


def test_the_subject_is_left_out_of_the_data_of_the_base(root):
    counts = {name: split["count"] for name, split in read_json(root / "latents" / "index.json")["splits"].items()}
    assert counts == {"train": 24, "test": 6}


def test_it_writes_the_subject_and_the_class_images_of_the_base(root):
    from models.images.pixels import to_uint8
    from models.pipeline import load_pipeline

    prior, found = Prior.load(root / "prior"), pictures(root / "prior")
    assert (prior.images, len(found["subject"]), len(found["class"]), len(found["before"])) == (6, 4, 6, 4)
    assert found["subject"].max() < 80 and found["subject"].shape[1:] == (3, 16, 16)
    base, sampling = load_pipeline(root / "base"), dream_inputs.PriorParams(**dream_inputs.PRIOR).sampling
    drawn = to_uint8(base.sample(range(500, 504), sampling=sampling, prompts=["a photo of thing"] * 4))
    assert np.abs(drawn.astype(int) - found["class"][:4]).max() <= 1


def test_known_images_are_not_drawn_again_and_more_are_added(root, capsys):
    before = contents(root / "prior")
    assert contents(run_prior(root, "again")) == before
    assert "to draw" not in capsys.readouterr().out
    more = pictures(run_prior(root, "more", images=9))["class"]
    assert np.array_equal(more[:6], pictures(root / "prior")["class"]) and len(more) == 9
    assert capsys.readouterr().out.count("to draw") == 1


def test_two_devices_draw_blocks_with_the_bytes_of_one_and_continue(root, two_devices, monkeypatch, capsys):
    from models import parallel
    from models.networks import guidance
    from models.pipeline import Pipeline

    monkeypatch.setattr(guidance, "joins", lambda device: False)  # as on the CPU that the stubs stand for
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(root / "divided"))
    copied, real, sample = [], Pipeline.on, Pipeline.sample

    def noted(model, name):
        if name != model.device:
            copied.append(name)
        return real(model, name)

    monkeypatch.setattr(Pipeline, "on", noted)
    both = threading.Barrier(2, timeout=30)

    def together(model, seeds, *rest, **named):
        if seeds[0] == 504 and named["prompts"] == ["a photo of thing"] * 2:
            raise KeyboardInterrupt
        if named["prompts"] == ["a photo of thing"] * 2 and seeds[0] < 504:
            both.wait()
        return sample(model, seeds, *rest, **named)

    with monkeypatch.context() as killed:
        killed.setattr(Pipeline, "sample", together)
        with pytest.raises(KeyboardInterrupt):
            run_prior(root, "divided-prior", batch_size=2)
    assert sorted(copied) == ["cpu:0", "cpu:1"], "once for each device, and not for each block"
    capsys.readouterr()
    divided = contents(run_prior(root, "divided-prior", batch_size=2))
    assert "2 images of 'a photo of thing' to draw, 4 known" in capsys.readouterr().out
    monkeypatch.setattr(parallel, "devices_of", lambda device: (device,))
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(root / "alone"))
    assert contents(run_prior(root, "alone-prior", batch_size=2)) == divided


@pytest.mark.skipif(emulates_bf16("cpu"), reason="takes long where bfloat16 is emulated")
def test_class_images_of_another_precision_are_drawn_anew_and_near(root, capsys):
    lower = pictures(run_prior(root, "lower", precision="bf16"))["class"]
    assert capsys.readouterr().out.count("to draw") == 2
    exact = pictures(root / "prior")["class"]
    assert 25 < 10 * np.log10(4 / np.mean(((lower / 127.5) - (exact / 127.5)) ** 2)) < 100
    assert contents(run_prior(root, "again")) == contents(root / "prior")
    assert "to draw" not in capsys.readouterr().out, "those in float32 are still known"


def test_without_a_subject_there_is_nothing_to_do(root):
    off = dict.fromkeys(("instance_prompt", "class_prompt", "subject")) | {"contexts": ()}
    folder = run_prior(root, "off", base="no/such/base", **off)
    assert [path.name for path in folder.iterdir()] == [FILE] and Prior.load(folder) is None


def test_a_batch_is_half_subject_and_half_class_by_weight(root):
    mix = batches(root, weight=0.25)
    batch = mix.draw(3)
    assert batch.x0.shape == (8, 2, 8, 8) and mix.size == 8
    assert batch.weight.tolist() == [2.0] * 4 + [0.5] * 4
    instance, null = mix.subject.conditions(1)[0], mix.classes.null
    assert (batch.condition[:4] == instance).all(), "the subject keeps its prompt"
    assert (batch.condition[4:] == null).all(), "the class loses it"
    assert [half.weight.tolist() for half in batch.split(4)] == [[2.0] * 4, [0.5] * 4]
    again = batches(root, weight=0.25).draw(3)
    assert all(torch.equal(getattr(batch, name), getattr(again, name)) for name in ("x0", "eps", "t", "condition"))


def test_with_its_text_encoder_the_conditions_are_tokens(root):
    batch, mix = batches(root, text=True).draw(3), batches(root, text=True)
    assert batch.condition.dtype == torch.int64 and batch.condition.shape == (8, 12)
    assert not torch.equal(batch.condition[0], batch.condition[4]) and (batch.condition[4:] == mix.classes.null).all()


def test_the_trained_text_encoder_is_in_the_pipeline(root):
    from diffusers import DiffusionPipeline

    from models.pipeline import load_pipeline
    from tasks.subjects import checkpoints

    keep = {"ema": ("std-0.10",), "pipeline_ema": "std-0.10", "ema_snapshots": 2}
    text_inputs.run_train(root, "worded", prior="prior", init_from="base", text_encoder=True, **keep)
    base, tuned = (load_pipeline(root / name) for name in ("base", "worded"))
    prompts = ["a photo of sks thing", ""]
    before, after = (pipeline.text.encode(prompts) for pipeline in (base, tuned))
    assert not torch.allclose(before, after, atol=1e-3)
    (_, early), *_ = checkpoints.earlier(tuned, root / "averages-worded")
    between = early.text.encode(prompts)
    assert 0 < (between - before).norm() < (after - before).norm()
    assert early.sample([1], prompts=prompts[:1]).shape == (1, 3, 16, 16)
    theirs = DiffusionPipeline.from_pretrained(root / "worded", local_files_only=True)
    ids = tuned.text.token_ids(prompts)
    with torch.inference_mode():
        assert torch.allclose(theirs.text_encoder(ids).last_hidden_state, after, atol=1e-5)


def test_weight_zero_trains_on_the_subject_alone(root):
    batch = batches(root, weight=0.0).draw(0)
    assert batch.weight is None and len(batch.x0) == 8
    assert not torch.equal(batch.condition[0], batches(root).classes.null)


def test_the_loss_is_that_of_the_subject_plus_the_weighted_one_of_the_class(root):
    from tasks.training.run import Objective

    mix = batches(root, weight=0.5)
    objective = Objective(text_inputs.DIFFUSION, mix.subject.config.timesteps)
    batch = mix.draw(0)

    def network(x, t, condition):
        return 0.1 * x

    ours, theirs = (objective(network, replace(part, weight=None)).mean() for part in batch.split(4))
    assert torch.allclose(objective(network, batch).mean(), ours + 0.5 * theirs)


@pytest.mark.parametrize(
    ("count", "says"),
    [(1, "1 picture of the subject"), (6, ""), (1000, "1,000 pictures are a data set")],
)
def test_an_unusual_number_of_pictures_is_stated(count, says):
    from tasks.priors.subject import unsuited

    assert says in unsuited(count) and bool(unsuited(count)) == bool(says)


def test_bad_input_is_refused_in_one_sentence(root, tmp_path):
    with pytest.raises(StageError, match=r"prior\.subject names the class 'cat', and the data has sks thing, thing"):
        run_prior(root, "bad", subject="cat")
    long = "a photo of sks thing " + "that is very long " * 4
    with pytest.raises(StageError, match=r"the prompt 'a photo of sks thing that .* has \d+ tokens, .* reads 12"):
        run_prior(root, "bad", instance_prompt=long)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match=r"train.init_from .*empty cannot draw class images: .*choose another"):
        run_prior(root, "bad", base=str(tmp_path / "empty"))
    other = shutil.copytree(root / "base", tmp_path / "other")
    file = other / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(StageError, match=r"other was trained with another text_encoder than .*codec"):
        run_prior(root, "bad", base=str(other))
    assert not (root / "bad").exists()


def test_a_token_of_several_pieces_is_stated_and_trained(root, capsys):
    prompts = {"instance_prompt": "a photo of xqzv thing", "contexts": (), "token": "xqzv"}
    run_prior(root, "pieces", images=0, **prompts)
    assert "prior.token 'xqzv' is 4 tokens (x, q, z, v)" in capsys.readouterr().out
    run_prior(root, "pieces", images=0)
    assert "tokens" not in capsys.readouterr().out


@pytest.mark.parametrize("lora", [None, 2])
def test_it_trains_and_every_checkpoint_is_measured(root, lora, tmp_path):
    from models.judges.classifier import Classifier
    from models.judges.judge import Judge, JudgeInfo
    from models.pipeline import load_pipeline
    from tasks.report import tables
    from tasks.subjects import checkpoints, measures

    model, name = text_inputs.MODEL.model_copy(update={"lora_rank": lora}), f"tuned-{lora}"
    keep = {"ema": ("std-0.10",), "pipeline_ema": "std-0.10", "ema_snapshots": 2}
    text_inputs.run_train(root, name, model, prior="prior", init_from="base", **keep)
    tuned, averages, prior = load_pipeline(root / name), root / f"averages-{name}", Prior.load(root / "prior")
    torch.manual_seed(0)
    judge = Judge(JudgeInfo(["a", "b"], None, {"channels": 3, "size": 16}, 4), Classifier(3, 16, 2).eval())
    result = measures.measure(tuned, averages, root / "prior", prior, judge, 4)
    assert [row.step for row in result.rows] == [None, 0, 2, None]
    assert {"subject_similarity", "class_similarity", "class_diversity"} <= result.headlines().keys()
    with (tmp_path / "subject.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, measures.COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.cells() for row in result.rows)
    assert str(tables.subject_table(tmp_path / "subject.csv").rows).count(measures.BEST) == 1

    (step, early), *_ = checkpoints.earlier(tuned, averages)
    base, final = (load_pipeline(root / folder).network.state_dict() for folder in ("base", name))
    weights = early.network.state_dict()
    changed = [key for key in final if not torch.allclose(final[key], base[key], atol=1e-6)]
    moved, whole = (sum(float((each[key] - base[key]).norm()) for key in changed) for each in (weights, final))
    assert step == 2 and 0 < moved < whole
    same = [key for key in final if key not in changed]
    assert all(torch.allclose(weights[key], base[key], atol=1e-3) for key in same)


def test_similarity_leakage_and_diversity_are_what_they_say():
    from tasks.evaluation.extraction import Images
    from tasks.subjects.measures import SubjectScorer, without_token

    class Colours:
        """A judge whose features are the mean colours."""

        extractor = object()
        reads_captions = False

        def features(self, pixels):
            return pixels.mean((2, 3)).astype(np.float32)

    red, green = (np.zeros((3, 3, 4, 4), np.uint8) for _ in range(2))
    red[:, 0] = green[:, 1] = 200
    both = Images.of(np.concatenate([red[:1], green[:1]]))
    red, green = Images.of(red), Images.of(green)
    scorer = SubjectScorer(Colours(), red, green)
    assert scorer.similarity(red) == pytest.approx(1) and scorer.similarity(green) == pytest.approx(0)
    assert scorer.own_similarity() == pytest.approx(1) and scorer.diversity(green) == pytest.approx(0)
    assert scorer.diversity(both) == pytest.approx(1)
    assert scorer.fidelity(red, ["x"] * 3) is None
    assert without_token("a sks dog in snow", "sks") == "a dog in snow"


def test_adapters_are_drawn_at_each_pair_of_weights(root, tmp_path):
    from models.images.pixels import to_uint8
    from models.noise.samplers import Sampling
    from models.pipeline import load_pipeline
    from tasks.lora_sweep import load, sweep

    lora = text_inputs.MODEL.model_copy(update={"lora_rank": 2})
    for seed in (0, 1):
        text_inputs.run_train(
            root, f"adapted-{seed}", lora, init_from="base", prior="prior", seed=seed, learning_rate=0.02
        )
    places = [root / f"adapted-{seed}" for seed in (0, 1)]
    asked, sampling = "a photo of sks thing", Sampling(steps=3, guidance_scale=2.0)
    images = sweep(*load(root / "base", places), [0.0, 1.0], asked, [3, 4], sampling)

    def drawn(folder):
        return to_uint8(load_pipeline(folder).sample([3], None, sampling, prompts=[asked]))[0].astype(int)

    assert images.shape == (2, 2, 3, 16, 16)
    for (row, column), folder in {(0, 0): root / "base", (1, 0): places[0], (0, 1): places[1]}.items():
        assert np.abs(drawn(folder) - images[row, column]).max() <= 1, folder
    assert np.abs(images[1, 1].astype(int) - images[1, 0]).max() > 1
    assert sweep(*load(root / "base", places[:1]), [0.5], asked, [3, 4], sampling).shape == (1, 2, 3, 16, 16)

    wide = text_inputs.MODEL.model_copy(update={"block_out_channels": (8, 24)})
    text_inputs.run_train(root, "wide", wide, prior="nothing")
    with pytest.raises(StageError, match="made for another base"):
        load(root / "wide", places)
    with pytest.raises(StageError, match="and not 3; name fewer"):
        load(root / "base", [*places, places[0]])
    with pytest.raises(StageError, match=r"base holds no pytorch_lora_weights\.safetensors"):
        load(root / "base", [root / "base"])
