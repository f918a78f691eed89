"""The PSNR between two sets of images."""

from __future__ import annotations

import math

import numpy as np

EQUAL = 200.0
"""Decibel of equal images, and the largest value."""


def psnr_db(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Return the PSNR in dB of each pair of images, float [N, C, H, W] in [-1, 1], a range of 2."""
    return [decibel(error) for error in squared_errors(first, second)]


def squared_errors(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Return the mean squared error of each pair of images [N, C, H, W]."""
    errors: list[float] = ((first.astype(np.float64) - second) ** 2).mean(axis=(1, 2, 3)).tolist()
    return errors


def decibel(error: float) -> float:
    """Return the PSNR in dB of a mean squared error of values in [-1, 1]; NaN stays NaN."""
    return EQUAL if error == 0 else min(10 * math.log10(4 / error), EQUAL)
