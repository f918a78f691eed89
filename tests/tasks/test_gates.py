"""The gates of the registry: when a model version may become champion."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tasks.registration import gates
from tasks.runtime.measures import Measure
from tests.support import model_outputs
from tests.support.registry import PARAMS

JUDGED = gates.Judged("f", "frechet_distance", 20.0, 1.0, 10.0, 0.96, 1.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"distance": 30.0}, None),
        ({"distance": 30.1}, "30.1 (unguided) is 3.01 times its floor 10"),
        ({"distance": float("nan")}, "frechet_distance nan"),
        ({"floor": 0.0}, "cannot be expressed as a multiple of its floor 0; set evaluate.headline"),
        ({"headline": "kid", "distance": 0.02, "floor": -0.001}, "kid 0.02 (unguided) cannot be expressed"),
        ({"headline": "cmmd", "distance": 0.4, "floor": 0.1}, "cmmd 0.4 (unguided) is 4.00 times its floor 0.1"),
        ({"label_accuracy": 0.95}, None),
        ({"label_accuracy": 0.949}, "label_accuracy 0.949 (guidance 1.5) is under"),
        ({"clip": 70.0, "clip_real": 100.0}, None),
        ({"clip": 69.0, "clip_real": 100.0}, "clip_score 69 is under 70, register.min_clip_over_real 0.7 times"),
        ({"near_copies": 0.2}, None),
        ({"near_copies": 0.25}, "25.0% of the samples are near copies of training images, over"),
        ({"near_copies": float("nan")}, "near copies"),
        ({"onnx_psnr_db": 50.0}, None),
        ({"onnx_psnr_db": 31.0}, "images of the ONNX bundle agree with PyTorch's to 31 dB, under register.min_onnx"),
        ({"seed_blocks": 2}, "2 seed blocks give no interval; measure with at least 3"),
        ({"label_accuracy": 0.949, "guided_kind": "auto"}, "label_accuracy 0.949 (guidance 1.5, auto) is under"),
    ],
)
def test_absolute_gates(changes, reason):
    said = gates.not_good_enough(replace(JUDGED, **changes), PARAMS)
    assert said is None if reason is None else reason in said


def test_label_accuracy_is_not_a_gate_without_labels():
    assert gates.not_good_enough(replace(JUDGED, label_accuracy=None), PARAMS) is None


@pytest.mark.parametrize(
    ("distance", "spread", "champions_spread", "wins"),
    [
        (18.2, 1.0, 1.0, True),
        (18.3, 1.0, 1.0, False),
        (18.9, 0.1, 1.5, False),
        (18.9, 1.5, 0.1, False),
        (20.0, 0.0, 0.0, False),
        (19.99, 0.0, 0.0, True),
        (float("nan"), 0.0, 0.0, False),
    ],
)
def test_a_challenger_must_win_by_more_than_chance_explains(distance, spread, champions_spread, wins):
    challenger = replace(JUDGED, distance=distance, spread=spread)
    champion = replace(JUDGED, spread=champions_spread)
    assert (gates.not_better(challenger, champion) is None) == wins


@pytest.mark.parametrize(
    ("spreads", "blocks"), [((1.0, 1.0), (3, 3)), ((2.0, 0.5), (4, 6)), ((0.0, 1.0), (3, 5)), ((1.0, 1.0), (20, 20))]
)
def test_the_interval_is_that_of_welchs_test(spreads, blocks):
    """The difference at which SciPy's one-sided test gives p = 0.05; the degrees of freedom are rounded down."""
    from scipy import stats

    width = gates.interval(spreads, blocks)
    means = (0.0, width)
    p = stats.ttest_ind_from_stats(
        means[0], spreads[0], blocks[0], means[1], spreads[1], blocks[1], equal_var=False, alternative="less"
    ).pvalue
    assert 0.035 < p < 0.0505
    assert gates.interval((0.0, 0.0), (3, 3)) == 0


def test_numbers_with_different_fingerprints_are_never_compared():
    with pytest.raises(ValueError, match="not comparable"):
        gates.not_better(JUDGED, replace(JUDGED, fingerprint="g"))
    with pytest.raises(ValueError, match="not comparable"):
        gates.not_better(JUDGED, replace(JUDGED, headline="cmmd"))


def test_the_gates_compare_the_headline_of_the_protocol():
    cmmd = Measure(value=0.4, spread=0.02, drawn="unguided", guidance_scale=1.0, n=64, floor=0.1)
    measured = model_outputs.measurements()
    both = measured.model_copy(update={"measures": {**measured.measures, "cmmd": cmmd}})
    found = gates.judged(both.model_copy(update={"headline": "cmmd"}))
    assert (found.headline, found.distance, found.spread, found.floor) == ("cmmd", 0.4, 0.02, 0.1)
    assert gates.judged(both) == gates.judged(measured)
    assert {"cmmd_unguided", "cmmd_spread", "cmmd_floor", "label_accuracy_guided"} < found.tags().keys()


def test_judged_numbers_survive_the_tags_and_earlier_tags_are_ignored():
    assert gates.from_tags(JUDGED.tags(), "frechet_distance") == JUDGED
    auto = replace(JUDGED, guided_kind="auto")
    assert gates.from_tags(auto.tags(), "frechet_distance") == auto
    assert gates.from_tags(JUDGED.tags(), "cmmd") is None, "another headline"
    full = replace(JUDGED, clip=30.0, clip_real=33.0, near_copies=0.01, onnx_psnr_db=61.0, seed_blocks=5)
    assert gates.from_tags(full.tags(), "frechet_distance") == full
    unconditional = replace(JUDGED, label_accuracy=None, guided_scale=None)
    assert gates.from_tags(unconditional.tags(), "frechet_distance") == unconditional
    earlier = {"fingerprint": "f", "frechet_distance": "20.0", "frechet_distance_floor": "10.0"}
    assert gates.from_tags(earlier, "frechet_distance") is None
