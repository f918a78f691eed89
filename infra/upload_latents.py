"""Upload the shards of `data/latents` to an S3 bucket, from which a training with `train.data` reads them.

    python -m infra.upload_latents s3://bucket/prefix [--latents data/latents]

Each object has the SHA-256 of its content in its metadata, by which a training recognises it. Objects that are there
already are left alone, so an interrupted upload continues. AWS_ENDPOINT_URL selects another server than Amazon's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.transfer import objects


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.upload_latents", description=__doc__)
    parser.add_argument("address", help="s3://bucket/prefix")
    parser.add_argument("--latents", type=Path, default=Path("data/latents"), help="folder that `encode` wrote")
    given = parser.parse_args()
    try:
        sent = upload(given.latents, given.address)
    except StageError as error:
        sys.exit(f"upload: error: {error}")
    print(f"upload: {sent} objects sent; train with train.data={given.address}")


def upload(folder: Path, address: str) -> int:
    """Upload the shards of splits and captions; returns how many objects were sent.

    Raises:
        StageError: if the address is no bucket, a shard is damaged, or the server refuses.
    """
    from tasks.formats import latents
    from tasks.params import S3Params
    from tasks.runtime import integrity
    from tasks.runtime.progress import progress
    from tasks.transfer import objects

    bucket, prefix = objects.split(address.rstrip("/"))
    if not address.startswith("s3://") or not bucket:
        raise StageError(f"{address} is not s3://bucket/prefix; correct it")
    index, client, sent = latents.read_index(folder), objects.client(S3Params()), 0
    shards = [*(shard for split in index.splits.values() for shard in split.shards), *(index.texts or [])]
    integrity.require(folder, {shard.file: shard.sha256 for shard in shards}, latents.STAGE)
    with objects.explained(address):
        for shard in progress(shards, desc="upload", unit="file"):
            key = "/".join(part for part in (prefix, shard.file) if part)
            if _stored(client, bucket, key) != shard.sha256:
                metadata = {"Metadata": {"sha256": shard.sha256}}
                client.upload_file(str(folder / shard.file), bucket, key, ExtraArgs=metadata)
                sent += 1
    return sent


def _stored(client: objects.Client, bucket: str, key: str) -> str | None:
    """Return the SHA-256 in the metadata of an object; None if there is no object."""
    from botocore.exceptions import ClientError

    try:
        found: str | None = client.head_object(Bucket=bucket, Key=key)["Metadata"].get("sha256")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return None
        raise
    return found


if __name__ == "__main__":
    main()
