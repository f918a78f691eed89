"""A local server with the file API of the Hugging Face hub: listings, redirects to storage, refusals."""

from __future__ import annotations

import hashlib
import io
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from tests.support.data_inputs import Site

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def table(
    pictures: list[bytes | None], features: dict[str, Any] | None = None, image: str = "image", **columns: Any
) -> bytes:
    """A Parquet file as `datasets` writes it: pictures as structs of bytes and path, the features in the metadata."""
    structs = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(pictures)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    arrays = {image: pa.array(structs, kind)} | {name: pa.array(values) for name, values in columns.items()}
    written = pa.table(arrays)
    if features is not None:
        said = json.dumps({"info": {"features": features}})
        written = written.replace_schema_metadata({"huggingface": said})
    file = io.BytesIO()
    pq.write_table(written, file, row_group_size=100)
    return file.getvalue()


def publish(site: Site, repo: str, files: dict[str, bytes], revision: str = COMMIT) -> None:
    """Have `site` answer as the hub does for a data set of these files; `main` is at `revision`."""
    siblings = []
    for name, data in files.items():
        sha256 = hashlib.sha256(data).hexdigest()
        lfs = {"sha256": sha256, "size": len(data), "pointerSize": 130}
        siblings.append({"rfilename": name, "size": len(data), "blobId": sha256[:40], "lfs": lfs})
        # Storage is another host, to which the hub redirects with a signed address.
        storage = f"/storage/{sha256}?X-Amz-Signature=secret"
        site.files[storage] = data
        site.redirects[f"/datasets/{repo}/resolve/{revision}/{name}"] = storage
    siblings.append({"rfilename": "README.md", "size": 5, "blobId": "0" * 40})
    said = {"id": repo, "sha": revision, "private": False, "gated": False, "siblings": siblings}
    for path in (f"/api/datasets/{repo}", *(f"/api/datasets/{repo}/revision/{name}" for name in (revision, "main"))):
        site.files[f"{path}?blobs=true"] = json.dumps(said).encode()


def publish_model(site: Site, repo: str, files: dict[str, bytes], revision: str = COMMIT) -> None:
    """Have `site` answer as the hub does for a model of these files, at one commit."""
    tree = []
    for name, data in files.items():
        sha256 = hashlib.sha256(data).hexdigest()
        tree.append({"type": "file", "path": name, "size": len(data), "oid": sha256[:40]})
        path = f"/{repo}/resolve/{revision}/{name}"
        site.files[path] = data
        site.headers[path] = {"ETag": f'"{sha256}"', "X-Repo-Commit": revision}
    site.files[f"/api/models/{repo}/tree/{revision}?recursive=true&expand=false"] = json.dumps(tree).encode()
