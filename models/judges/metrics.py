"""Features to numbers. Extraction is the judge's; nothing here sees an image.

Legend: N, M numbers of images; D feature dimensions; K classes; E dimensions of CLIP's space.
All arithmetic is in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000
NEIGHBOURHOOD = 3
"""Neighbours that set the size of a ball in precision and recall; the paper's choice."""
BLOCK = 1024
"""Rows of distances in memory at once."""


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Squared Frechet distance between the normal distributions fitted to [N, D] and [M, D]
    (Heusel et al. 2017, equation 6).

        |m - m'|^2 + tr(S) + tr(S') - 2 tr((S S')^(1/2))

    With S = R^T R and S' = R'^T R' the last trace is the sum of the singular values of R R'^T. The QR
    decomposition gives R with at most min(N, D) rows: exact and quick whether N < D or not, and no complex root.
    Not negative. Raises ValueError for fewer than 2 images or different D.
    """
    x, y = _pair(features, reference)
    root_x, root_y = _covariance_root(x), _covariance_root(y)
    means = np.square(x.mean(0) - y.mean(0)).sum()
    cross = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    return max(0.0, float(means + np.square(root_x).sum() + np.square(root_y).sum() - 2 * cross))


def kernel_distance(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> float:
    """KID: unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), mean over random subsets.

    May be slightly negative. Raises ValueError for fewer than 2 images or different D.
    """
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = _pair(features, reference)
    subset = min(len(x), len(y), KERNEL_SUBSET_SIZE)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=KERNEL_SUBSETS, subset_size=subset)
        metric.update(torch.from_numpy(y), real=True)
        metric.update(torch.from_numpy(x), real=False)
        return float(metric.compute()[0])


def squared_mmd(features: np.ndarray, reference: np.ndarray) -> float:
    """The unbiased estimate that `kernel_distance` averages over subsets, once over all of [N, D] and [M, D]: for
    sets so small that each is a subset of its own.

    May be slightly negative. Raises ValueError for fewer than 2 images or different D.
    """
    x, y = _pair(features, reference)

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = 0.0
    for own in (x, y):
        among = kernel(own, own)
        within += float((among.sum() - np.trace(among)) / (len(own) * (len(own) - 1)))
    return within - 2 * float(kernel(x, y).mean())


def precision_recall(features: np.ndarray, reference: np.ndarray, k: int = NEIGHBOURHOOD) -> tuple[float, float]:
    """Shares of samples [N, D] within the manifold of real images [M, D], and of those within the samples' own
    (Kynkaanniemi et al. 2019, equations 1 and 2): precision says how lifelike, recall how varied.

    The manifold of a set is the union of balls around its members, each up to its `k`-th nearest other member.
    Raises ValueError for fewer than 2 images or different D.
    """
    x, y = _pair(features, reference)
    return _within(x, y, k), _within(y, x, k)


def _within(points: NDArray[np.float64], members: NDArray[np.float64], k: int) -> float:
    """Share of points [N, D] in a ball around one of the members [M, D]."""
    k = min(k, len(members) - 1)
    radii = np.concatenate([np.partition(squares, k, axis=1)[:, k] for squares in _squares(members, members)])
    return float(np.concatenate([np.any(squares <= radii, axis=1) for squares in _squares(points, members)]).mean())


def nearest(queries: np.ndarray, candidates: np.ndarray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of each query [N, D] the nearest of the candidates [M, D]: its index int64 [N], and its distance float64 [N]."""
    x, y = np.asarray(queries, np.float64), np.asarray(candidates, np.float64)
    found = [(squares.argmin(1), squares.min(1)) for squares in _squares(x, y)]
    return np.concatenate([index for index, _ in found]), np.sqrt(np.concatenate([square for _, square in found]))


def _squares(x: NDArray[np.float64], y: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Squared distances of rows of x [N, D] to all rows of y [M, D], in blocks [<= BLOCK, M]; not negative."""
    lengths = np.square(y).sum(1)
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK]
        yield np.maximum(np.square(block).sum(1)[:, None] + lengths - 2 * block @ y.T, 0)


def inception_style_score(logits: np.ndarray) -> float:
    """exp of the mean KL(p(class | image) || p(class)) over logits [N, K] (Salimans et al. 2016), in one split.

    Between 1 and K; "style", because the classes are the data's own and not Inception's. Label smoothing keeps it
    well below K for perfect images too: it is to be read beside the score of real ones.
    """
    import torch
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `InceptionScore`")
        # One split has no spread; torchmetrics warns that its standard deviation is not a number.
        warnings.filterwarnings("ignore", message="std\\(\\): degrees of freedom")
        metric = InceptionScore(torch.nn.Identity(), splits=1)
        metric.update(torch.from_numpy(np.asarray(logits, np.float64)))
        return float(metric.compute()[0])


def clip_score(images: np.ndarray, texts: np.ndarray) -> float:
    """100 max(cos, 0) between embeddings [N, E] of images and of their captions, mean over N (Hessel et al. 2021)."""
    x, y = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    cosine = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return float(100 * np.maximum(cosine, 0).mean())


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows of logits [N, K] whose largest entry is at labels [N]."""
    return float((np.argmax(logits, axis=1) == np.asarray(labels)).mean())


def _pair(features: np.ndarray, reference: np.ndarray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], not {features.shape} and {reference.shape}")
    if min(len(features), len(reference)) < 2:
        raise ValueError("a distance needs at least 2 images on each side")
    return np.asarray(features, np.float64), np.asarray(reference, np.float64)


def _covariance_root(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """R, [min(N, D), D], with R^T R = the sample covariance of x [N, D]."""
    return np.asarray(np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r"))
