"""The memory of the data's stages per row, on simulated rows."""

from __future__ import annotations

import pytest

from infra.bench.scale import runner

ROWS = 800_000
LIMIT_BYTES = 150 << 20
"""Per million rows. Stages take 2 to 117 MiB; the rest is for allocators, whose memory differs by 20 MiB between runs,
which a difference of 300,000 rows triples. Python objects for the rows took 500 to 900."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_python_objects_per_row(tmp_path):
    """Measured between 200,000 and 800,000 rows, in `ingest` between half as many; six minutes of CPU time.

    With fewer rows buffers of constant size are not full yet: reading pixels takes 159 MiB for 100,000 rows, 187 for
    200,000, 216 for 400,000 and 225 for 800,000.
    """
    stages = tuple(stage for stage in runner.STAGES if stage != "hash")
    rows = runner.measured(runner.Plan(tmp_path, ROWS, ROWS // 2, stages))
    assert [row.stage for row in rows] == list(stages)
    steep = {row.stage: row.slope_bytes / 2**20 for row in rows if row.slope_bytes > LIMIT_BYTES}
    assert not steep, f"MiB per million rows: {steep}"
