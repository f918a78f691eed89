"""Training as it runs on a GPU: bf16, NHWC and compiled, resumed, and captions streamed from the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.train_inputs import WEIGHTS, checkpoints, history

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
FAST = {"precision": "bf16", "channels_last": True, "compile": True}


def difference(first: Path, second: Path) -> float:
    """Return the mean absolute difference of the trained weights, relative to their mean absolute value."""
    import torch
    from safetensors.torch import load_file

    a, b = (torch.cat([value.flatten() for value in load_file(file).values()]) for file in (first, second))
    return float((a - b).abs().mean() / a.abs().mean())


def test_bf16_nhwc_compiled_resumes(trained, tmp_path, capsys):
    """A run that lost its last checkpoint makes it again; the order of sums on a GPU may differ between processes."""
    folder = trained(dropout=0.1, **FAST)
    whole = history(folder)
    shutil.copy(folder / WEIGHTS, tmp_path / "whole.safetensors")
    shutil.rmtree(checkpoints(folder / "scratch")[-1])
    trained(dropout=0.1, **FAST)
    assert "continues at step 6 of 12" in capsys.readouterr().out
    again = history(folder)
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    assert float(again[-1]["loss"]) == pytest.approx(float(whole[-1]["loss"]), rel=0.02)
    assert difference(tmp_path / "whole.safetensors", folder / WEIGHTS) < 0.01


def test_bf16_nhwc_compiled_trains_as_float32(trained, tmp_path):
    plain, fast = trained(tmp_path / "plain"), trained(tmp_path / "fast", **FAST)
    assert float(history(fast)[-1]["loss"]) == pytest.approx(float(history(plain)[-1]["loss"]), rel=0.05)
    assert difference(plain / WEIGHTS, fast / WEIGHTS) < 0.05


def test_streamed_captions_train_as_those_on_the_device(trained, tmp_path):
    held, streamed = (
        trained(tmp_path / where, conditioning="text", precision="bf16", data_on_device=where)
        for where in ("device", "stream")
    )
    assert float(history(streamed)[-1]["loss"]) == pytest.approx(float(history(held)[-1]["loss"]), rel=0.02)
    assert difference(held / WEIGHTS, streamed / WEIGHTS) < 0.01
