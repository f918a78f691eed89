"""KID and the Inception score as torchmetrics computes them, from the features and logits of any judge.

Separate from `metrics.py`, because importing torchmetrics takes longer than importing torch.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from models.judges.metrics import pair

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000


def kernel_distance(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> float:
    """Return KID, the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    The mean over random subsets of [N, D] and [M, D]; slightly negative values are possible.

    Raises:
        ValueError: for fewer than 2 images or different D.
    """
    x, y = pair(features, reference)
    subset = min(len(x), len(y), KERNEL_SUBSET_SIZE)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=KERNEL_SUBSETS, subset_size=subset)
        metric.update(torch.from_numpy(y), real=True)
        metric.update(torch.from_numpy(x), real=False)
        return float(metric.compute()[0])


def inception_style_score(logits: np.ndarray) -> float:
    """Return exp of the mean KL(p(class | image) || p(class)) over logits [N, K] (Salimans et al. 2016), in one split.

    The result lies between 1 and K. It is not the published Inception score, because the classes are those of the data.
    The judge's label smoothing keeps it well below K for perfect images too; compare it with the score of real images.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `InceptionScore`")
        # torchmetrics warns that the standard deviation over one split is not a number.
        warnings.filterwarnings("ignore", message="std\\(\\): degrees of freedom")
        metric = InceptionScore(torch.nn.Identity(), splits=1)
        metric.update(torch.from_numpy(np.asarray(logits, np.float64)))
        return float(metric.compute()[0])
