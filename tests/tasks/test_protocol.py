"""The protocol of an evaluation as a file: read back unchanged, and with a fingerprint that stays stable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from models.noise.samplers import Sampling
from tasks.evaluation.protocol import FILE, Measurement, Protocol, Reference
from tasks.runtime.errors import StageError

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MEASUREMENT = Measurement(
    n_distance=512,
    n_accuracy=256,
    seed=1000,
    seed_blocks=3,
    reference=Reference(356, "0750e5b68de7a014c751356b1f2704b0aba5d9028f8af92de5e133ebae8f7e85"),
    judge={
        "classifier": "2dc97be0e62895fc9498a6381693d35822def70f0a7f738b9cdf3dea7cd212df",
        "clip": "77d03282ca725808e51ddecd9d6d651aa986cf0aa0a73440a50671df914deb86",
    },
    extractor="classifier",
    feature_dim=64,
    image={"size": 16, "channels": 1},
    labels=DIGITS,
    prompts=[f"a handwritten {name}" for name in DIGITS],
)
UNGUIDED = Sampling("ddim", 20, 0.5, guidance_interval=(0.2, 5.0))
PROTOCOL = Protocol(MEASUREMENT, "cmmd", "pixels", "label", False, UNGUIDED, replace(UNGUIDED, guidance_scale=1.5), 256)


def test_the_fingerprint_is_that_of_earlier_versions():
    """Runs in MLflow and versions in the registry carry it; a change would make all of them incomparable."""
    assert MEASUREMENT.fingerprint == "8d7f9a6b7560fb4f562021a11bed64d10d56a9d3160bb1ad10c98ac6f9572502"
    unconditional = replace(MEASUREMENT, judge={"classifier": "a" * 64}, labels=["zero", "öne"], prompts=None)
    unconditional = replace(unconditional, reference=Reference(360, "d" * 64))
    assert unconditional.fingerprint == "33b6fac47feb0d685406d0d1ae4d5d3c482222760317b8a6cf060a90a8df2734"


@pytest.mark.parametrize(
    "protocol", [PROTOCOL, replace(PROTOCOL, conditioning="none", unguided=Sampling(), guided=None)]
)
def test_a_protocol_is_read_back_as_it_was_written(protocol, tmp_path):
    protocol.write(tmp_path / FILE)
    assert Protocol.read(tmp_path / FILE) == protocol
    written = json.loads((tmp_path / FILE).read_text())
    assert (written["format"], written["fingerprint"]) == (1, protocol.fingerprint)
    assert {"headline", "sampler", "steps", "eta", "guidance_scales", "guidance_interval", "batch_size"} < set(written)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": None},
        {"measurement": PROTOCOL.to_json()["measurement"] | {"format": 2}},
        {"measurement": {}},
        {"sampler": "euler"},
    ],
    ids=str,
)
def test_a_file_of_another_version_is_refused_in_one_sentence(changes, tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"format": 1, **PROTOCOL.to_json(), **changes}))
    with pytest.raises(StageError, match=r"another version of this project; run 'dvc repro evaluate'$"):
        Protocol.read(tmp_path / FILE)


def test_a_missing_protocol_names_the_stage_that_writes_it(tmp_path: Path):
    with pytest.raises(StageError, match=r"no protocol\.json; run 'dvc repro evaluate'"):
        Protocol.read(tmp_path / FILE)
