"""The agreement with control maps: how it is measured, reported and gated."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.images.pixels import from_uint8
from models.networks.control_maps import ControlSpec, maps_of
from models.noise.samplers import Sampling
from tasks.evaluation.control import measure_control
from tasks.registration import gates
from tasks.registration.gates import Judged
from tasks.report import control as report
from tasks.runtime.measures import ControlMeasured, Measurements

SPEC = ControlSpec("colour", colour_cells=4)
PIXELS = np.random.default_rng(0).integers(0, 2, (12, 1, 4, 4), np.uint8).repeat(2, axis=2).repeat(2, axis=3) * 255
PROTOCOL = SimpleNamespace(
    measurement=SimpleNamespace(seed=5, seed_blocks=3), guided=None, unguided=Sampling("ddim", 2), batch_size=4
)
SCORER = SimpleNamespace(
    held_out_for=lambda conditioning, count: (PIXELS, {"prompts": ["a digit"] * len(PIXELS)}),
    held_out_rows=lambda conditioning, count: np.arange(len(PIXELS)),
    control_maps=lambda spec, rows: maps_of(spec, PIXELS[rows]),
)


def pipeline(reads_maps: bool) -> SimpleNamespace:
    """A model that paints its map, or ignores it."""

    def sample(seeds, labels, sampling, *, prompts, batch_size, callback, control) -> np.ndarray:
        assert len(prompts) == len(seeds)
        noise = np.stack([np.random.default_rng(seed).uniform(-1, 1, (1, 8, 8)) for seed in seeds])
        if control is None or not reads_maps:
            return noise
        return from_uint8(control[:, :1].repeat(2, axis=2).repeat(2, axis=3))

    info = SimpleNamespace(control_spec=SPEC, conditioning="text")
    return SimpleNamespace(
        info=info, control=object(), sample=sample, encode=lambda x: torch.from_numpy(from_uint8(x)), decode=lambda x: x
    )


def test_a_model_that_reads_its_map_has_a_margin_and_one_that_ignores_it_has_none():
    found = measure_control(pipeline(reads_maps=True), SCORER, PROTOCOL)
    measured = found.measured
    assert (measured.value, measured.real, measured.n) == (1, 1, 12)
    assert measured.shuffled < 0.7 and measured.base < 0.7 and measured.margin > 0.3
    assert found.rows.shape == (5, 8, 1, 8, 8)
    assert np.array_equal(found.rows[0], found.rows[1]) and np.array_equal(found.rows[2], PIXELS[:8])
    ignorant = measure_control(pipeline(reads_maps=False), SCORER, PROTOCOL).measured
    assert ignorant.value == ignorant.shuffled == ignorant.base and ignorant.margin == 0
    plain = SimpleNamespace(info=SimpleNamespace(control_spec=None, conditioning="text"), control=None)
    assert measure_control(plain, SCORER, PROTOCOL) is None


MEASURED = ControlMeasured(kind="canny", n=64, value=0.6, spread=0.01, shuffled=0.3, base=0.35, real=0.9)
JUDGED = Judged("f", "frechet_distance", 2.0, 0.1, 1.0, control=0.6, control_margin=0.25, control_spread=0.01)
PARAMS = SimpleNamespace(max_distance_over_floor=3.0, min_label_accuracy=0.0, min_control_margin=0.1)


def test_the_gates_ask_for_a_margin_and_compare_two_control_nets_by_their_agreement():
    assert gates.not_good_enough(JUDGED, PARAMS) is None
    refused = gates.not_good_enough(replace(JUDGED, control_margin=0.05), PARAMS)
    assert refused.startswith("agreement with control maps 0.600 is only 0.050 above what it is")
    assert gates.not_better(replace(JUDGED, control=0.63), JUDGED) is None
    assert "does not beat the champion's 0.600" in gates.not_better(replace(JUDGED, control=0.605), JUDGED)
    assert gates.from_tags(JUDGED.tags(), "frechet_distance") == JUDGED
    plain = replace(JUDGED, control=None, control_margin=None, control_spread=None)
    assert gates.from_tags(plain.tags(), "frechet_distance") == plain
    assert not any(name.startswith("control") for name in plain.tags())


def test_the_numbers_reach_files_and_report():
    fields = {"fingerprint": "f", "sampler": "ddim", "steps": 2, "seed_blocks": 3, "extractor": "e"}
    counts = dict.fromkeys(("n_samples", "n_reference", "n_floor", "n_searched"), 1)
    measured = Measurements(**fields, **counts, measures={}, not_applicable={}, control=MEASURED)
    assert measured.flat()["control_agreement"] == 0.6
    assert measured.headline_numbers()["control_agreement_margin"] == pytest.approx(0.25)
    (table,) = report.tables(measured)
    assert [row[1] for row in table.rows] == ["0.600 ± 0.01", "0.300", "0.350", "0.900"]
    assert report.tables(measured.model_copy(update={"control": None})) == []
