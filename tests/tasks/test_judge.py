"""What measures: which networks are trained on which data, how good they are, and that they stay the same."""

import functools
import json
import threading

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from models.judges import classifier, clip, selfsupervised
from models.judges.classifier import Backbone, shift_and_flip
from models.judges.fit import Recipe
from models.judges.judge import load_judge
from tasks.judge import caption_choices, class_prompts
from tasks.pictures.images import load_pixels
from tasks.pictures.samples import Split
from tasks.runtime.errors import StageError
from tests.support import judge_inputs
from tests.support.data_inputs import contents


def held_out(root):
    return load_pixels(root / "data" / "images", "test", judge_inputs.IMAGE)


def test_labelled_and_captioned_images_give_a_classifier_and_a_clip_that_know_held_out_digits(judged):
    judge = load_judge(judged / "judge")
    images = held_out(judged)
    assert judge.kind == judge.info.features == "classifier"
    assert judge.info.classes == judge_inputs.CLASSES
    assert judge.info.prompts == ["a zero", "a one", "a two"]
    assert judge.info.classifier_accuracy >= 0.95
    assert judge.info.clip_accuracy >= 0.95
    assert judge.info.clip_choices == 3

    features = judge.features(images.pixels)
    assert features.shape == (len(images.keys), judge.info.feature_dim)
    assert features.dtype == np.float32
    right = judge.class_logits(images.pixels).argmax(1) == images.labels
    assert right.mean() == judge.info.classifier_accuracy
    texts = judge.clip_text_embeds(judge.info.prompts)
    chosen = (judge.clip_image_embeds(images.pixels) @ texts.T).argmax(1)
    assert (chosen == images.labels).mean() == judge.info.clip_accuracy
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-6)


def test_features_are_those_that_the_classifier_reads(judged):
    judge, images = load_judge(judged / "judge"), held_out(judged)
    logits = judge.class_logits_of(judge.features(images.pixels))
    np.testing.assert_allclose(logits, judge.class_logits(images.pixels), rtol=1e-4, atol=1e-5)


def test_a_rerun_gives_the_same_bytes_and_another_seed_others(judged, tmp_path):
    first = contents(judged / "judge")
    (tmp_path / "data").symlink_to(judged / "data")
    assert contents(judge_inputs.run_judge(tmp_path)) == first
    other = contents(judge_inputs.run_judge(tmp_path, judge_inputs.PARAMS.model_copy(update={"seed": 2})))
    assert {name for name in first if first[name] != other[name]} == {
        "classifier.safetensors",
        "clip.safetensors",
        "judge.json",
    }


def test_networks_that_are_trained_at_once_are_those_trained_one_after_the_other(judged, tmp_path, monkeypatch):
    """Each is trained by one thread, as on a machine with a single one."""
    (tmp_path / "data").symlink_to(judged / "data")
    both, fits = threading.Barrier(2, timeout=60), []

    def waiting(real, *arguments):
        both.wait()
        fits.append(torch.get_num_threads())
        return real(*arguments)

    for module in (classifier, clip):
        monkeypatch.setattr(module, "fit", functools.partial(waiting, module.fit))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        at_once = contents(judge_inputs.run_judge(tmp_path))
    finally:
        torch.set_num_threads(before)
    assert fits == [1, 1]
    assert at_once == contents(judged / "judge")


def test_training_does_not_disturb_torchs_random_state(judged, tmp_path):
    (tmp_path / "data").symlink_to(judged / "data")
    state = torch.random.get_rng_state()
    judge_inputs.run_judge(tmp_path, judge_inputs.BRIEF)
    assert torch.equal(state, torch.random.get_rng_state())


def test_captions_without_labels_give_the_image_tower_of_the_clip(tmp_path):
    judge_inputs.write_images(tmp_path, labels=False)
    judge = load_judge(judge_inputs.run_judge(tmp_path))
    assert judge.kind == "clip"
    assert judge.info.prompts is None
    assert judge.info.clip_accuracy >= 0.9
    assert judge.info.clip_choices == 10
    assert judge.info.classifier_accuracy is None
    assert judge.features(held_out(tmp_path).pixels).shape[1] == judge.info.feature_dim
    with pytest.raises(ValueError, match="no classifier"):
        judge.class_logits(held_out(tmp_path).pixels)


def test_images_alone_give_a_self_supervised_encoder_whose_features_separate_digits(tmp_path):
    from sklearn.neighbors import KNeighborsClassifier

    judge_inputs.write_images(tmp_path, labels=False, captions=None)
    longer = judge_inputs.PARAMS.model_copy(update={"classifier_steps": 120})
    judge = load_judge(judge_inputs.run_judge(tmp_path, longer))
    assert judge.kind == "self_supervised"
    assert sorted(judge.info.hashes) == ["self_supervised"]
    untrained = selfsupervised.train_encoder(held_out(tmp_path).pixels, Recipe(steps=1, batch_size=2))
    before = selfsupervised.twin_accuracy(untrained, held_out(tmp_path).pixels, seed=1)
    assert judge.info.self_supervised_accuracy >= max(0.1, 3 * before)  # chance is 1 in 134
    with pytest.raises(ValueError, match="no CLIP"):
        judge.clip_text_embeds(["a zero"])

    judge_inputs.write_images(tmp_path / "labelled")
    train = load_pixels(tmp_path / "labelled" / "data" / "images", "train", judge_inputs.IMAGE)
    tested = held_out(tmp_path / "labelled")
    neighbours = KNeighborsClassifier().fit(judge.features(train.pixels), train.labels)
    assert neighbours.score(judge.features(tested.pixels), tested.labels) >= 0.9


def test_labels_without_captions_give_no_clip(tmp_path):
    judge_inputs.write_images(tmp_path, captions=None)
    folder = judge_inputs.run_judge(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["classifier.safetensors", "judge.json"]


def test_images_that_were_not_accepted_train_nothing(tmp_path):
    judge_inputs.write_images(tmp_path)
    (tmp_path / "data" / "accepted.json").write_text('{"verdict": "refused"}')
    with pytest.raises(StageError, match="accepted"):
        judge_inputs.run_judge(tmp_path)
    assert not (tmp_path / "judge").exists()


def test_the_hash_of_the_clip_covers_its_tokenizer(judged, tmp_path):
    from models.judges.judge import save_judge

    judge = load_judge(judged / "judge")
    judge.tokenizer.enable_truncation(5)
    save_judge(tmp_path, judge)
    saved = json.loads((tmp_path / "judge.json").read_text())["hashes"]
    assert saved["clip"] != judge.info.hashes["clip"]
    assert saved["classifier"] == judge.info.hashes["classifier"]


def test_another_format_is_refused(judged, tmp_path):
    described = json.loads((judged / "judge" / "judge.json").read_text())
    (tmp_path / "judge.json").write_text(json.dumps(described | {"format": 0}))
    with pytest.raises(ValueError, match="format 0"):
        load_judge(tmp_path)


# Prompts and the examination of a CLIP


def samples(labels, captions):
    return Split(np.array(labels), captions, [str(n) for n in range(len(labels))])


def test_a_prompt_is_the_caption_that_most_images_of_a_class_carry_and_no_other_class():
    captions = [["red", "a colour"], ["red", "a colour"], ["green"], ["blue", "azure"], ["azure", "blue", "a colour"]]
    assert class_prompts(samples([0, 0, 0, 1, 1], captions), 2) == ["red", "azure"]
    assert class_prompts(samples([0, 0, 1], [["a"], [], ["b"]]), 2) == ["a", "b"]  # half of them is enough


@pytest.mark.parametrize(
    "captions",
    [
        [["a"], ["a"], ["a"], ["a"]],  # two classes share theirs
        [["a"], ["a"], ["b"], ["c"], ["d"]],  # no caption of the second class is on half of its images
        [["a"], ["a"], [], []],  # no caption in the second class
    ],
    ids=["shared", "different", "none"],
)
def test_captions_that_do_not_follow_from_the_class_give_no_prompts(captions):
    assert class_prompts(samples([0, 0] + [1] * (len(captions) - 2), captions), 2) is None


def test_without_prompts_each_image_chooses_between_its_caption_and_those_of_others():
    captions = [[f"caption {n}", "an image"] for n in range(30)] + [[]]
    rows, texts, right, others = caption_choices(samples([-1] * 31, captions), None, seed=0)
    assert rows == list(range(30))
    assert [texts[index] for index in right] == [texts[0] for texts in captions[:30]]
    assert others.shape == (30, 9)
    assert all(
        not {texts[index] for index in wrong} & set(captions[row]) for row, wrong in zip(rows, others, strict=True)
    )


def test_choice_accuracy_counts_images_that_prefer_their_own_caption():
    images = np.array([[1.0, 0], [0, 1], [1, 0]])
    texts = np.array([[1.0, 0], [0, 1]])
    assert clip.choice_accuracy(images, texts, np.array([0, 1, 1]), np.array([[1], [0], [0]])) == pytest.approx(2 / 3)
    ties = clip.choice_accuracy(images[:1], texts, np.array([0]), np.array([[0]]))
    assert ties == 0  # a caption no closer than a wrong one is not chosen


# The networks


def test_the_tokenizer_frames_lowers_and_cuts(tmp_path):
    tokenizer = clip.make_tokenizer(["The cat, the dog", "the bird"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("THE bird flies").tokens == ["[BOS]", "the", "bird", "[UNK]", "[EOS]"]
    assert tokenizer.token_to_id("[PAD]") == 0
    assert tokenizer.token_to_id("the") == 4  # the most frequent word comes first
    assert len(tokenizer.encode("the " * 100).ids) == clip.MAX_TOKENS
    ids = clip.tokenize(tokenizer, ["the", "the cat, the dog"])
    assert ids.shape == (2, 7)
    assert (ids[0, 3:] == 0).all()


def test_padding_does_not_change_a_text_embedding():
    torch.manual_seed(0)
    network = clip.Clip(1, 8, words=10).eval()
    alone = network.embed_text(torch.tensor([[2, 5, 6, 3]]))
    padded = network.embed_text(torch.tensor([[2, 5, 6, 3, 0, 0, 0], [2, 4, 5, 6, 7, 8, 3]]))[:1]
    torch.testing.assert_close(alone, padded)


def test_contrastive_loss_is_clips_where_captions_are_unique_and_forgives_shared_ones():
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    right = torch.arange(6)
    usual = (torch.nn.functional.cross_entropy(logits, right) + torch.nn.functional.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(clip.contrastive_loss(logits, torch.eye(6).bool()), usual)

    shared = torch.tensor([[True, False], [True, False], [False, True]])
    assert clip.contrastive_loss(torch.where(shared, 50.0, -50.0), shared) == pytest.approx(np.log(2) / 4, rel=1e-3)


def test_twin_loss_by_hand():
    projections = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = (projections / projections.norm(dim=1, keepdim=True)).numpy()
    similarity = np.exp(unit @ unit.T / selfsupervised.TEMPERATURE)
    losses = [-np.log(similarity[i, (i + 3) % 6] / sum(similarity[i, j] for j in range(6) if j != i)) for i in range(6)]
    assert float(selfsupervised.twin_loss(projections)) == pytest.approx(np.mean(losses), rel=1e-9)


@pytest.mark.parametrize(
    ("size", "channels", "width"), [(8, 1, 32), (16, 1, 64), (32, 3, 128), (64, 3, 128), (256, 3, 128), (20, 3, 128)]
)
def test_a_backbone_for_every_size(size, channels, width):
    backbone = Backbone(channels, size).eval()
    features = backbone(torch.zeros(2, channels, size, size))
    assert features.shape == (2, width) == (2, backbone.features)


def test_shifts_move_by_a_sixteenth_at_most_and_flips_mirror():
    images = torch.zeros(200, 1, 16, 16)
    images[:, :, 5, 7] = 1
    generator = torch.Generator().manual_seed(0)
    where = shift_and_flip(images, generator, flip=False).flatten(1).argmax(1)
    assert {(int(at) // 16, int(at) % 16) for at in where} == {(y, x) for y in (4, 5, 6) for x in (6, 7, 8)}
    mirrored = shift_and_flip(images, generator, flip=True).flatten(1).argmax(1) % 16
    assert set(mirrored.tolist()) == {6, 7, 8, 9}
    assert 60 < int((mirrored == 9).sum() + (mirrored == 8).sum() / 2) < 140


def test_views_keep_the_range_and_differ():
    images = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    generator = torch.Generator().manual_seed(1)
    first, second = (selfsupervised.view(images, generator, flip=True) for _ in range(2))
    assert first.shape == images.shape
    limit = 1 + selfsupervised.CONTRAST + selfsupervised.BRIGHTNESS
    assert first.abs().max() <= limit
    assert not torch.equal(first, second)
