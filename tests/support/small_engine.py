"""A small replacement for img2dataset in tests, whose installation takes 780 MB.

It accepts the same options, downloads with the same HTTP client through the same environment variables, and writes the
same file format. A slow test runs img2dataset itself and expects the same results.
"""

import hashlib
import json
import sys
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
kind, size = options["compute_hash"], int(options["number_sample_per_shard"])
target = Path(options["output_folder"])
refused = set(json.loads(options["disallowed_header_directives"]))
assert options["disable_all_reencoding"] == "True"


def download(row):
    outcome = {**row, "status": "failed_to_download", "error_message": None, kind: None, "jpg": None}
    try:
        with urllib.request.urlopen(row["url"], timeout=int(options["timeout"])) as answer:  # noqa: S310
            if refused & set(answer.headers.get_all("X-Robots-Tag", [])):
                return outcome | {"error_message": "Use of image disallowed by X-Robots-Tag directive"}
            data = answer.read()
    except Exception as error:
        return outcome | {"error_message": str(error)}
    return outcome | {"status": "success", kind: getattr(hashlib, kind)(data).hexdigest(), "jpg": data}


shard = 0
for table in sorted(Path(options["url_list"]).glob("*.parquet")):
    rows = pq.read_table(table, columns=["url", "caption", *json.loads(options["save_additional_columns"])])
    for start in range(0, rows.num_rows, size):
        stats = target / f"{shard:05d}_stats.json"
        if not stats.exists():
            part = rows.slice(start, size)
            schema = part.schema
            for name in ("status", "error_message", kind):
                schema = schema.append(pa.field(name, pa.string()))
            found = [download(row) for row in reversed(part.to_pylist())]
            pictures = schema.append(pa.field("jpg", pa.binary()))
            pq.write_table(pa.Table.from_pylist(found, pictures), target / f"{shard:05d}.parquet")
            stats.write_text(json.dumps({"count": part.num_rows}))
        shard += 1
