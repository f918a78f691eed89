"""Metrics on features: closed forms, SciPy, brute force, and torchmetrics as it stands."""

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.multimodal.clip_score import CLIPScore

from models.judges import metrics


def features(count, dimensions, seed, scale=1.0, shift=0.0):
    """Correlated features with a mean of their own."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(dimensions, dimensions)) / math.sqrt(dimensions)
    return scale * random.normal(size=(count, dimensions)) @ mixing + shift


def frechet_by_scipy(x, y):
    """The formula as it is written in the paper, with SciPy's matrix square root."""
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * np.real(root))


class Passthrough(torch.nn.Module):
    """What torchmetrics takes for a feature extractor, on features already extracted."""

    def __init__(self, dimensions):
        super().__init__()
        self.num_features = dimensions

    def forward(self, x):
        return x


@pytest.mark.parametrize(("n", "m", "dimensions"), [(500, 300, 16), (200, 400, 64)])
def test_frechet_distance_equals_scipy(n, m, dimensions):
    x, y = features(n, dimensions, 1), features(m, dimensions, 2, scale=1.3, shift=0.4)
    assert metrics.frechet_distance(x, y) == pytest.approx(frechet_by_scipy(x, y), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "dimensions"), [(500, 300, 16), (40, 60, 100)])
def test_frechet_distance_equals_torchmetrics(n, m, dimensions):
    x, y = features(n, dimensions, 3), features(m, dimensions, 4, scale=0.7, shift=-0.2)
    metric = FrechetInceptionDistance(Passthrough(dimensions))
    metric.update(torch.from_numpy(y), real=True)
    metric.update(torch.from_numpy(x), real=False)
    # With fewer images than dimensions the covariances are singular, and theirs takes roots of eigenvalues near zero.
    assert metrics.frechet_distance(x, y) == pytest.approx(
        float(metric.compute()), rel=1e-6 if n > dimensions else 1e-4
    )


def test_the_frechet_distance_of_torchmetrics_equals_scipy():
    """On the features of a network, as torchmetrics accumulates them in batches."""
    x, y = features(900, 64, 21).astype(np.float32), features(700, 64, 22, scale=1.1, shift=0.2).astype(np.float32)
    metric = FrechetInceptionDistance(Passthrough(64)).set_dtype(torch.float64)
    for batch in np.array_split(y, 7):
        metric.update(torch.from_numpy(batch.astype(np.float64)), real=True)
    for batch in np.array_split(x, 9):
        metric.update(torch.from_numpy(batch.astype(np.float64)), real=False)
    by_scipy = frechet_by_scipy(x.astype(np.float64), y.astype(np.float64))
    assert float(metric.compute()) == pytest.approx(by_scipy, rel=1e-6)
    assert metrics.frechet_distance(x, y) == pytest.approx(by_scipy, rel=1e-6)


def test_frechet_distance_with_fewer_images_than_dimensions_is_that_in_the_space_they_span():
    x, y = features(30, 12, 5), features(20, 12, 6, shift=1.0)
    rotation = np.linalg.qr(np.random.default_rng(14).normal(size=(200, 200)))[0][:12]
    assert metrics.frechet_distance(x @ rotation, y @ rotation) == pytest.approx(frechet_by_scipy(x, y), rel=1e-9)


def test_frechet_distance_of_normals_in_one_dimension():
    x = np.array([[-1.0], [1.0]]) * 3 / math.sqrt(2) + 5  # mean 5, sample standard deviation 3
    y = np.array([[-1.0], [1.0]]) * 1 / math.sqrt(2) + 1  # mean 1, sample standard deviation 1
    assert metrics.frechet_distance(x, y) == pytest.approx((5 - 1) ** 2 + (3 - 1) ** 2, rel=1e-12)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_a_moved_set_the_square_of_the_move():
    x = features(100, 8, 7)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert metrics.frechet_distance(x, x + 2.0) == pytest.approx(8 * 2.0**2, rel=1e-9)


def test_distances_are_computed_in_float64_from_float32_features():
    x = (features(400, 8, 8) + 1000).astype(np.float32)
    assert metrics.frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9)


def kernel_by_hand(x, y):
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [(kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return sum(within) - 2 * kernel(x, y).mean()


def test_kernel_distance_equals_the_unbiased_estimate_by_hand():
    x, y = features(90, 10, 9), features(90, 10, 10, shift=0.3)  # of one size, so every subset is the whole
    assert metrics.kernel_distance(x, y) == pytest.approx(kernel_by_hand(x, y), rel=1e-9)
    assert metrics.squared_mmd(x, y[:40]) == pytest.approx(kernel_by_hand(x, y[:40]), rel=1e-9)


def test_kernel_distance_of_unequal_sizes_takes_subsets_by_the_seed_and_leaves_torch_alone():
    x, y = features(150, 10, 11), features(90, 10, 12, shift=0.3)
    state = torch.random.get_rng_state()
    first = metrics.kernel_distance(x, y, seed=3)
    assert first == metrics.kernel_distance(x, y, seed=3) != metrics.kernel_distance(x, y, seed=4)
    assert first == pytest.approx(kernel_by_hand(x, y), rel=0.2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_kernel_distance_is_unbiased():
    """Of equal distributions it is about zero at any size, where the Frechet distance rises as the sets shrink."""
    random = np.random.default_rng(13)
    found = np.array([metrics.kernel_distance(*random.normal(size=(2, 60, 4))) for _ in range(40)])
    assert abs(found.mean()) < 3 * found.std() / math.sqrt(len(found))


def cmmd_by_hand(x, y):
    """Jayasumana et al. 2024 with Gretton et al. 2012, equation 5, pair by pair."""
    unit_x, unit_y = ([row / np.linalg.norm(row) for row in side] for side in (x, y))

    def mean(a, b):
        return np.mean([math.exp(-np.square(p - q).sum() / (2 * 10**2)) for p in a for q in b])

    return 1000 * (mean(unit_x, unit_x) + mean(unit_y, unit_y) - 2 * mean(unit_x, unit_y))


def test_cmmd_equals_the_biased_estimate_pair_by_pair(monkeypatch):
    x, y = features(50, 6, 31), features(37, 6, 32, scale=2.0, shift=0.3)
    whole = metrics.cmmd(x, y)
    assert whole == pytest.approx(cmmd_by_hand(x, y), rel=1e-9)
    monkeypatch.setattr(metrics, "BLOCK", 8)
    assert metrics.cmmd(x, y) == pytest.approx(whole, rel=1e-9)


def test_cmmd_of_two_directions_in_closed_form():
    x, y = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[0.0, 2.0], [0.0, 5.0], [0.0, 1.0]])
    assert metrics.cmmd(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)), rel=1e-12)


def test_cmmd_reads_directions_alone_and_a_row_of_zeros_is_one():
    x, y = features(40, 5, 33), features(30, 5, 34, shift=0.5)
    lengths = np.random.default_rng(35).uniform(0.1, 9, (40, 1))
    assert metrics.cmmd(lengths * x, y) == pytest.approx(metrics.cmmd(x, y), rel=1e-9) != 0
    assert metrics.cmmd(x, x[::-1]) == pytest.approx(0, abs=1e-9)
    assert math.isfinite(metrics.cmmd(np.concatenate([x, np.zeros((1, 5))]), y))


@pytest.mark.parametrize(
    "distance", [metrics.frechet_distance, metrics.kernel_distance, metrics.squared_mmd, metrics.cmmd]
)
def test_distances_refuse_what_has_none(distance):
    with pytest.raises(ValueError, match="at least 2 images"):
        distance(np.zeros((1, 4)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="must be"):
        distance(np.zeros((5, 4)), np.zeros((5, 3)))


def manifold_by_hand(points, members, k):
    """Fraction of points inside the manifold of `members` (Kynkaanniemi et al. 2019, equation 1).

    A point is inside if it is at most as far from some member as that member's k-th neighbour.
    """
    radii = [np.sort([np.linalg.norm(member - other) for other in members])[k] for member in members]
    return np.mean([any(np.linalg.norm(p - m) <= r for m, r in zip(members, radii, strict=True)) for p in points])


def test_precision_and_recall_by_hand():
    x, y = features(60, 3, 23), features(50, 3, 24, scale=1.4, shift=0.3)
    expected = manifold_by_hand(x, y, 3), manifold_by_hand(y, x, 3)
    assert metrics.precision_recall(x, y) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected[1] < expected[0] < 1


def test_precision_sees_what_is_unreal_and_recall_what_is_missing():
    left, right = features(200, 4, 25), features(200, 4, 26, shift=50)
    real = np.concatenate([left, right])
    assert metrics.precision_recall(left + 1e-6, real) == (1, 0.5)
    assert metrics.precision_recall(real + 100, real) == (0, 0)
    assert metrics.precision_recall(real, real) == (1, 1)


def test_the_nearest_by_brute_force_over_several_blocks():
    x, y = features(2500, 3, 26), features(300, 3, 27)
    index, distance = metrics.nearest(x, y)
    everything = np.linalg.norm(x[:, None] - y[None], axis=2)
    assert np.array_equal(index, everything.argmin(1))
    assert distance == pytest.approx(everything.min(1), rel=1e-6)


def test_inception_style_score_lies_between_one_and_the_number_of_classes():
    certain = 100 * np.eye(5)[np.arange(50) % 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.inception_style_score(certain) == pytest.approx(5, rel=1e-9)
        assert metrics.inception_style_score(np.zeros((50, 5))) == pytest.approx(1, rel=1e-9)
        assert metrics.inception_style_score(certain[:1].repeat(50, 0)) == pytest.approx(1, rel=1e-9)


def test_inception_style_score_by_hand():
    logits = np.random.default_rng(15).normal(size=(40, 6)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    by_hand = math.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert metrics.inception_style_score(logits) == pytest.approx(by_hand, rel=1e-9)


class Embedding:
    """What torchmetrics takes for a CLIP and its processor: pixels and words are embeddings already."""

    def __init__(self, texts):
        self.texts = texts
        self.config = type("Config", (), {"text_config": type("Text", (), {"max_position_embeddings": 77})()})()

    def to(self, _):
        return self

    def __call__(self, images=None, text=None, **_):
        if images is not None:
            return {"pixel_values": torch.stack([image.flatten() for image in images])}
        rows = torch.stack([self.texts[word] for word in text])
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    def get_image_features(self, pixels):
        return pixels

    def get_text_features(self, ids, _):
        return ids


def test_clip_score_equals_torchmetrics():
    images, texts = np.random.default_rng(16).uniform(0.1, 1, size=(2, 12, 16)).astype(np.float32)
    words = [str(index) for index in range(12)]
    adapter = Embedding(dict(zip(words, torch.from_numpy(texts), strict=True)))
    metric = CLIPScore(lambda: (adapter, adapter))
    metric.update(torch.from_numpy(images).view(12, 1, 4, 4), words)
    assert metrics.clip_score(images, texts) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_clip_score_of_right_angles_and_opposites_is_zero():
    images = np.array([[1.0, 0], [1, 0], [3, 0], [0, 2]])
    texts = np.array([[0.0, 1], [-1, 0], [2, 0], [0, 1]])
    assert metrics.clip_score(images, texts) == pytest.approx(100 * (0 + 0 + 1 + 1) / 4)


def test_accuracy():
    assert metrics.accuracy(np.array([[1.0, 2], [3, 1], [0, 1]]), np.array([1, 0, 0])) == pytest.approx(2 / 3)
