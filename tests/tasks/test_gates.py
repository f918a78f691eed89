"""The gates of the registry: when a model version may become champion."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tasks.registration import gates
from tests.support.registry import PARAMS

JUDGED = gates.Judged("f", 20.0, 1.0, 10.0, 0.96, 1.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"frechet_distance_unguided": 30.0}, None),
        ({"frechet_distance_unguided": 30.1}, "30.1 (unguided) is 3.01 times its floor 10"),
        ({"frechet_distance_unguided": float("nan")}, "frechet_distance nan"),
        ({"label_accuracy_guided": 0.95}, None),
        ({"label_accuracy_guided": 0.949}, "label_accuracy 0.949 (guidance 1.5) is under"),
    ],
)
def test_absolute_gates(changes, reason):
    said = gates.not_good_enough(replace(JUDGED, **changes), PARAMS)
    assert said is None if reason is None else reason in said


def test_label_accuracy_is_no_gate_where_it_does_not_apply():
    assert gates.not_good_enough(replace(JUDGED, label_accuracy_guided=None), PARAMS) is None


@pytest.mark.parametrize(
    ("distance", "spread", "champions_spread", "wins"),
    [
        (18.9, 1.0, 1.0, True),
        (19.0, 1.0, 1.0, False),
        (18.9, 0.1, 1.5, False),
        (18.9, 1.5, 0.1, False),
        (20.0, 0.0, 0.0, False),
        (19.99, 0.0, 0.0, True),
        (float("nan"), 0.0, 0.0, False),
    ],
)
def test_a_challenger_must_win_by_more_than_the_larger_spread(distance, spread, champions_spread, wins):
    challenger = replace(JUDGED, frechet_distance_unguided=distance, frechet_distance_spread=spread)
    champion = replace(JUDGED, frechet_distance_spread=champions_spread)
    assert (gates.not_better(challenger, champion) is None) == wins


def test_numbers_with_different_fingerprints_are_never_compared():
    with pytest.raises(ValueError, match="not comparable"):
        gates.not_better(JUDGED, replace(JUDGED, fingerprint="g"))


def test_the_gates_read_back_what_they_wrote_on_a_version_and_nothing_of_an_earlier_form():
    assert gates.from_tags(JUDGED.tags()) == JUDGED
    unconditional = replace(JUDGED, label_accuracy_guided=None, guided_scale=None)
    assert gates.from_tags(unconditional.tags()) == unconditional
    assert gates.from_tags({"fingerprint": "f", "frechet_distance": "20.0", "frechet_distance_floor": "10.0"}) is None
