"""Metrics of image quality from features, logits and embeddings, in float64; the judge extracts those from images.

torchmetrics takes longer to import than torch, so only the metrics that it computes import it.

Legend: N, M numbers of images; D feature dimensions; K classes; E dimensions of CLIP's embedding space.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000
NEIGHBOURHOOD = 3
"""k of precision and recall, as in the paper."""
BLOCK = 1024
"""Rows of the distance matrix in memory at once."""
CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0
"""Sigma of the Gaussian kernel, and the factor of the result, as in the paper."""


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Return the squared Frechet distance of the normal distributions fitted to [N, D] and [M, D].

    Heusel et al. 2017, equation 6:

        |m - m'|^2 + tr(S) + tr(S') - 2 tr((S S')^(1/2))

    With S = R^T R and S' = R'^T R' the last trace is the sum of the singular values of R R'^T. The QR decomposition
    gives R with at most min(N, D) rows, so this is exact and fast for N < D too, without complex square roots.

    Raises:
        ValueError: for fewer than 2 images or different D.
    """
    x, y = _pair(features, reference)
    root_x, root_y = _covariance_root(x), _covariance_root(y)
    means = np.square(x.mean(0) - y.mean(0)).sum()
    cross = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    return max(0.0, float(means + np.square(root_x).sum() + np.square(root_y).sum() - 2 * cross))


def kernel_distance(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> float:
    """Return KID, the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    The mean over random subsets of [N, D] and [M, D]; slightly negative values are possible.

    Raises:
        ValueError: for fewer than 2 images or different D.
    """
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
    """Return the unbiased squared MMD of `kernel_distance` over all of [N, D] and [M, D], without subsets.

    For sets that are too small to draw subsets from; slightly negative values are possible.

    Raises:
        ValueError: for fewer than 2 images or different D.
    """
    x, y = _pair(features, reference)

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = 0.0
    for own in (x, y):
        among = kernel(own, own)
        within += float((among.sum() - np.trace(among)) / (len(own) * (len(own) - 1)))
    return within - 2 * float(kernel(x, y).mean())


def cmmd(features: np.ndarray, reference: np.ndarray) -> float:
    """Return CMMD, 1000 times the squared MMD with the Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)), sigma = 10.

    Jayasumana et al. 2024, section 4, on unit vectors: the paper's are CLIP embeddings; the rows of [N, D] and [M, D]
    are scaled to unit length here, whatever extracted them. The estimate is the biased one, as in the paper's code
    (Gretton et al. 2012, equation 5): never negative, and larger for fewer images. Values in the features of different
    extractors cannot be compared. Memory grows with `BLOCK` times the larger of N and M.

    Raises:
        ValueError: for fewer than 2 images or different D.
    """
    x, y = (_unit(side) for side in _pair(features, reference))
    within = _mean_gaussian(x, x) + _mean_gaussian(y, y)
    return CMMD_SCALE * max(0.0, within - 2 * _mean_gaussian(x, y))


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale the rows of x [N, D] to unit length; a row of zeros stays."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(lengths > 0, lengths, 1.0)


def _mean_gaussian(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the mean of `cmmd`'s kernel over all pairs of a row of x [N, D] and one of y [M, D]."""
    total = sum(float(np.exp(squares / (-2 * CMMD_BANDWIDTH**2)).sum()) for squares in _squares(x, y))
    return total / (len(x) * len(y))


def precision_recall(features: np.ndarray, reference: np.ndarray, k: int = NEIGHBOURHOOD) -> tuple[float, float]:
    """Return improved precision and recall of samples [N, D] against real images [M, D].

    Kynkäänniemi et al. 2019, equations 1 and 2. Precision is the fraction of samples inside the manifold of the real
    images; recall is the fraction of real images inside the manifold of the samples. The manifold of a set is the union
    of balls around its members, each reaching its `k`-th nearest neighbour in the set.

    Raises:
        ValueError: for fewer than 2 images or different D.
    """
    x, y = _pair(features, reference)
    return _within(x, y, k), _within(y, x, k)


def _within(points: NDArray[np.float64], members: NDArray[np.float64], k: int) -> float:
    """Return the fraction of points [N, D] inside the manifold of the members [M, D]."""
    k = min(k, len(members) - 1)
    radii = np.concatenate([np.partition(squares, k, axis=1)[:, k] for squares in _squares(members, members)])
    return float(np.concatenate([np.any(squares <= radii, axis=1) for squares in _squares(points, members)]).mean())


def nearest(queries: np.ndarray, candidates: np.ndarray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the nearest candidate [M, D] of each query [N, D]: index int64 [N] and distance float64 [N]."""
    x, y = np.asarray(queries, np.float64), np.asarray(candidates, np.float64)
    found = [(squares.argmin(1), squares.min(1)) for squares in _squares(x, y)]
    return np.concatenate([index for index, _ in found]), np.sqrt(np.concatenate([square for _, square in found]))


def _squares(x: NDArray[np.float64], y: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield the squared distances of the rows of x [N, D] to those of y [M, D], in blocks [<= BLOCK, M]."""
    lengths = np.square(y).sum(1)
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK]
        yield np.maximum(np.square(block).sum(1)[:, None] + lengths - 2 * block @ y.T, 0)


def inception_style_score(logits: np.ndarray) -> float:
    """Return exp of the mean KL(p(class | image) || p(class)) over logits [N, K] (Salimans et al. 2016), in one split.

    The result lies between 1 and K. It is not the published Inception score, because the classes are those of the data.
    The judge's label smoothing keeps it well below K for perfect images too; compare it with the score of real images.
    """
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `InceptionScore`")
        # torchmetrics warns that the standard deviation over one split is not a number.
        warnings.filterwarnings("ignore", message="std\\(\\): degrees of freedom")
        metric = InceptionScore(torch.nn.Identity(), splits=1)
        metric.update(torch.from_numpy(np.asarray(logits, np.float64)))
        return float(metric.compute()[0])


def clip_score(images: np.ndarray, texts: np.ndarray) -> float:
    """Return the mean of 100 max(cos, 0) between the embeddings [N, E] of images and captions (Hessel et al. 2021)."""
    x, y = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    cosine = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return float(100 * np.maximum(cosine, 0).mean())


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of logits [N, K] whose largest entry is at labels [N]."""
    return float((np.argmax(logits, axis=1) == np.asarray(labels)).mean())


def _pair(features: np.ndarray, reference: np.ndarray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], not {features.shape} and {reference.shape}")
    if min(len(features), len(reference)) < 2:
        raise ValueError("a distance needs at least 2 images on each side")
    return np.asarray(features, np.float64), np.asarray(reference, np.float64)


def _covariance_root(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return R, [min(N, D), D], with R^T R = the sample covariance of x [N, D]."""
    centred = torch.from_numpy((x - x.mean(0)) / np.sqrt(len(x) - 1))
    # NumPy's threads wait for each other in a loop, which takes hundreds of times as long where cores are busy.
    root: NDArray[np.float64] = torch.linalg.qr(centred, mode="r").R.numpy()
    return root
