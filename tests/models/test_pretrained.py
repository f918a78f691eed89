"""Published networks that measure: Inception, CLIP and DINOv2 from their files, and a judge that uses them.

The published weights are not here; networks of the same form with random weights are.
"""

import json

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from models.hashing import file_sha256
from models.judges import inception, metrics, pretrained
from models.judges.judge import load_judge
from models.pipeline import load_pipeline
from tasks.evaluation.protocol import declare
from tasks.evaluation.summary import measure
from tasks.params import JudgeParams
from tasks.runtime.errors import StageError
from tests.support import judge_inputs
from tests.tasks.test_evaluate import PARAMS

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 20, 20), np.uint8)


def write_processor(folder, size):
    declared = {"size": {"shortest_edge": size}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(declared))


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "a", "the", "digit", *judge_inputs.CLASSES]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 8, "max_position_embeddings": 6, "eos_token_id": 1, "bos_token_id": 1}
    vision = {**small, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    write_processor(folder, 16)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    write_processor(folder, 28)
    return folder


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(2)
    return inception.Inception().eval()


def test_inception_has_the_weights_of_the_published_one(network):
    """23,834,568 of Inception v3 without its auxiliary head, and 8 classes more."""
    assert sum(weights.numel() for weights in network.parameters()) == 23_834_568 + 8 * 2049
    shapes = {name: tuple(weights.shape) for name, weights in network.state_dict().items()}
    assert shapes["fc.weight"] == (1008, 2048)
    assert shapes["Mixed_6b.branch7x7dbl_2.conv.weight"] == (128, 128, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert len({name.split(".")[0] for name in shapes}) == 17


def test_images_are_stretched_as_the_first_tensorflow_did():
    image = torch.arange(4, dtype=torch.uint8).mul(64).repeat(4, 1)[None, None]
    row = inception.to_input(image)[0, 2, 7] * 128 + 128
    place = np.minimum(np.arange(299) * 4 / 299, 3)  # beyond the last sample it is repeated
    assert row.numpy() == pytest.approx(64 * place, abs=1e-3)
    assert inception.to_input(image).shape == (1, 3, 299, 299)


def test_inception_is_read_from_both_forms_of_its_file(tmp_path, network):
    from safetensors.torch import save_file

    weights = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    torch.save(weights, tmp_path / "published.pth")
    save_file(pretrained.read_inception(tmp_path / "published.pth"), tmp_path / pretrained.INCEPTION_FILE)
    extractor = pretrained.load_extractor("inception", tmp_path)
    features = extractor.features(IMAGES[:2])
    assert (features.shape, features.dtype) == ((2, 2048), np.float32)
    with torch.inference_mode():
        direct = network(inception.to_input(torch.from_numpy(IMAGES[:2])))
        logits = network.fc(direct) - network.fc.bias
    assert features == pytest.approx(direct.numpy(), abs=1e-5)
    assert extractor.class_logits(features) == pytest.approx(logits.numpy(), abs=1e-4)


def test_what_is_no_inception_is_refused_in_a_sentence(tmp_path, network):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    weights = dict(network.state_dict())
    weights["fc.weight"] = weights["fc.weight"][:1000]
    for content, expected in (
        (weights, "fc.weight is not as expected"),
        (Evil(), "can be read"),
        ([1], "is not the Inc"),
    ):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=expected):
            pretrained.read_inception(tmp_path / "file.pth")
    (tmp_path / "file.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="can be read"):
        pretrained.read_inception(tmp_path / "file.pth")


def test_features_are_those_of_transformers_after_its_processor_s_numbers(clip, dinov2):
    prepared = torch.nn.functional.interpolate(
        torch.from_numpy(IMAGES).float(), (28, 28), mode="bicubic", antialias=True
    ).clamp(0, 255)
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.inference_mode():
        direct = Dinov2Model.from_pretrained(dinov2)(pixel_values=(prepared / 255 - mean) / std).pooler_output
    assert pretrained.load_extractor("dinov2", dinov2).features(IMAGES) == pytest.approx(direct.numpy(), abs=1e-5)
    extractor = pretrained.load_extractor("clip", clip)
    assert (extractor.dimensions, extractor.features(IMAGES).shape) == (12, (5, 12))
    grey = extractor.features(IMAGES[:, :1])
    assert grey == pytest.approx(extractor.features(IMAGES[:, :1].repeat(3, 1)), abs=1e-6)


def test_cmmd_in_clip_features_is_that_of_the_paper_on_unit_embeddings(clip):
    extractor, embed = pretrained.load_extractor("clip", clip), pretrained.load_clip(clip).embed_images
    assert np.linalg.norm(extractor.features(IMAGES), axis=1).max() > 1.001, "features are not scaled"
    inverted = 255 - IMAGES
    found = metrics.cmmd(extractor.features(IMAGES), extractor.features(inverted))
    assert found == pytest.approx(metrics.cmmd(embed(IMAGES), embed(inverted)), rel=1e-4) != 0


def test_a_clip_embeds_images_and_texts_of_any_length(clip):
    scoring = pretrained.load_clip(clip)
    texts = scoring.embed_texts(["a digit", "the digit zero " * 20, ""])
    assert np.linalg.norm(texts, axis=1) == pytest.approx(1)
    assert np.linalg.norm(scoring.embed_images(IMAGES), axis=1) == pytest.approx(1)


@pytest.mark.parametrize(("name", "what"), [("clip", "dinov2"), ("dinov2", "clip")])
def test_another_network_is_named(clip, dinov2, name, what):
    folder = {"clip": clip, "dinov2": dinov2}[what]
    with pytest.raises(ValueError, match="and not"):
        pretrained.load_extractor(name, folder)


def judged(root, extractor=None, clip=None):
    def named(kind, folder):
        own = {"weights": str(folder), "pin": file_sha256(folder / "model.safetensors")}
        return own | ({"kind": kind} if kind else {})

    sections = {"extractor": named(*extractor)} if extractor else {}
    sections |= {"clip": named(None, clip)} if clip else {}
    steps = {"classifier_steps": 20, "clip_steps": 10}
    return judge_inputs.run_judge(root, JudgeParams.model_validate(steps | sections))


def test_a_judge_of_published_networks_measures_and_its_fingerprint_names_them(tmp_path, clip, dinov2):
    images = judge_inputs.write_images(tmp_path)
    pipeline = load_pipeline(judge_inputs.write_pipeline(tmp_path))
    judge = load_judge(judged(tmp_path, ("dinov2", dinov2), clip))
    declared = declare(pipeline, images, judge, PARAMS)
    assert (judge.kind, judge.info.feature_dim, judge.clip) == ("pretrained dinov2", 24, None)
    assert set(judge.info.hashes) == {"classifier", "extractor", "pretrained_clip"}
    measured = measure(pipeline, images, judge, declared)
    assert measured.extractor == "pretrained dinov2"
    assert measured.measures["frechet_distance"].value > measured.measures["frechet_distance"].floor > 0
    assert measured.measures["cmmd"].value > measured.measures["cmmd"].floor > 0
    assert 0 <= measured.measures["clip_score"].value <= 100 and measured.clip_score_note is None
    (tmp_path / "judge").rename(tmp_path / "other")
    other = load_judge(judged(tmp_path, ("clip", clip), None))
    assert declare(pipeline, images, other, PARAMS).fingerprint != declared.fingerprint


def test_a_score_by_the_weights_that_condition_the_model_says_so(tmp_path, clip):
    from dataclasses import replace

    from transformers import CLIPTextModel, CLIPTokenizer

    from models.networks.text_encoder import TextEncoder

    images = judge_inputs.write_images(tmp_path)
    judge = load_judge(judged(tmp_path, None, clip))
    pipeline = load_pipeline(judge_inputs.write_pipeline(tmp_path))
    text = TextEncoder(CLIPTextModel.from_pretrained(clip), CLIPTokenizer())
    declared = replace(pipeline, text=text)
    assert declare(declared, images, judge, PARAMS).clip_is_condition is True
    torch.nn.init.normal_(text.model.get_input_embeddings().weight)
    assert declare(declared, images, judge, PARAMS).clip_is_condition is False
    declared = replace(declare(pipeline, images, judge, PARAMS), clip_is_condition=True)
    assert "flatters" in measure(pipeline, images, judge, declared).clip_score_note


def test_weights_that_are_not_there_or_not_as_pinned_end_in_a_sentence(tmp_path, clip, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    judge_inputs.write_images(tmp_path)
    cases = {
        "not a local folder": {"kind": "clip", "weights": str(tmp_path / "nowhere"), "pin": "0" * 64},
        "and not the pinned": {"kind": "clip", "weights": str(clip), "pin": "0" * 64},
        "private address": {"kind": "inception", "weights": "http://127.0.0.1:9/inception.pth", "pin": "0" * 64},
    }
    (tmp_path / "inception.pth").write_bytes(b"is no weights")
    own = {"weights": str(tmp_path / "inception.pth"), "pin": file_sha256(tmp_path / "inception.pth")}
    cases["can be read"] = {"kind": "inception", **own}
    for sentence, extractor in cases.items():
        params = {"classifier_steps": 1, "clip_steps": 1, "extractor": extractor}
        with pytest.raises(StageError, match=sentence):
            judge_inputs.run_judge(tmp_path, JudgeParams.model_validate(params))
        assert not (tmp_path / "judge").exists()


@pytest.mark.parametrize(
    ("extractor", "sentence"),
    [
        ({"kind": "inception"}, "needs judge.extractor.weights, the file pt_inception-2015-12-05-6726825d.pth"),
        ({"kind": "clip", "weights": "openai/clip"}, "judge.extractor.weights needs judge.extractor.pin"),
        ({"weights": "openai/clip", "pin": "0"}, "not read by kind 'in_domain'"),
    ],
)
def test_an_extractor_without_a_source_is_refused(extractor, sentence):
    with pytest.raises(ValueError, match=sentence):
        JudgeParams.model_validate({"classifier_steps": 1, "clip_steps": 1, "extractor": extractor})
