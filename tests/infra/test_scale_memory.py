"""The memory of the data's stages per row, on simulated rows."""

from __future__ import annotations

import pytest

from infra.bench.scale import runner

ROWS = 400_000
LIMIT_BYTES = 150 << 20
"""Per million rows. Stages take 60 MiB or less; the rest is for allocators, whose memory differs by 20 MiB between
runs, which a difference of 300,000 rows triples. Python objects for the rows took 500 to 900."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_python_objects_per_row(tmp_path):
    """Measured between 100,000 and 400,000 rows; three minutes of CPU time."""
    stages = tuple(stage for stage in runner.STAGES if stage != "hash")
    rows = runner.measured(runner.Plan(tmp_path, ROWS, ROWS, stages))
    assert [row.stage for row in rows] == list(stages)
    steep = {row.stage: row.slope_bytes / 2**20 for row in rows if row.slope_bytes > LIMIT_BYTES}
    assert not steep, f"MiB per million rows: {steep}"
