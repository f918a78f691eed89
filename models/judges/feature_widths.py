"""Widths of the networks that measure, without PyTorch: parameters are checked against them before anything runs."""

FIRST_WIDTH = 16
MAX_FEATURES = 128
MAX_RESOLUTION = 32
INCEPTION = 2048
"""Features of the published FID's Inception."""


def stage_widths(resolution: int, width: int = FIRST_WIDTH) -> list[int]:
    """Width of each stage of `models.judges.classifier.Backbone`; the last one is the number of features.

    The width is doubled whenever the resolution is halved, until the resolution is at most 4.
    """
    side, widths = resolution // max(1, resolution // MAX_RESOLUTION), [width]
    while side > 4:
        side //= 2
        widths.append(min(2 * widths[-1], MAX_FEATURES))
    return widths
