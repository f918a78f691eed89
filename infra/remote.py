"""Set up the DVC remote of this work tree on S3, in one command; `dvc push` and `dvc pull` then use it.

    python -m infra.remote s3://bucket/prefix [--endpoint URL] [--region NAME] [--create]

The credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or the AWS profile, and are
never written to a file. DVC verifies every object that it pulls. Before anything is written, an object is stored and
read back.
"""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tasks.params.redaction import holds_credentials, redacted
from tasks.runtime import loopback, workspace
from tasks.runtime.errors import StageError


@dataclass(frozen=True)
class Remote:
    """A DVC remote on S3."""

    name: str
    url: str
    """s3://BUCKET/PREFIX."""
    endpoint: str | None
    """Address of a server that is compatible with S3; None uses AWS_ENDPOINT_URL, or else AWS."""
    region: str | None

    @property
    def bucket(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def prefix(self) -> str:
        return urlsplit(self.url).path.strip("/")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.remote", description="Set up the DVC remote of this work tree on S3."
    )
    parser.add_argument("url", metavar="s3://BUCKET/PREFIX")
    parser.add_argument("--endpoint", metavar="URL", help="of a compatible server; default: AWS_ENDPOINT_URL, or AWS")
    parser.add_argument("--region", help="default: AWS_DEFAULT_REGION, or that of the AWS profile")
    parser.add_argument("--name", default="storage", help="name of the remote (default storage)")
    parser.add_argument("--create", action="store_true", help="create the bucket if it is missing")
    given = parser.parse_args()
    loopback.exempt(os.environ)
    remote = Remote(given.name, given.url, given.endpoint, given.region)
    try:
        set_up(workspace.root(), remote, create=given.create)
    except StageError as error:
        sys.exit(f"remote: error: {redacted(str(error))}")
    print(f"remote: {remote.url} is the default DVC remote '{remote.name}'; commit .dvc/config, then: dvc push")


def set_up(root: Path, remote: Remote, *, create: bool) -> None:
    """Check that objects can be stored and read, and write the remote to `.dvc/config` of the work tree `root`.

    Raises:
        StageError: if the address is no bucket, holds credentials, or its server refuses.
    """
    if urlsplit(remote.url).scheme != "s3" or not remote.bucket or not remote.prefix:
        raise StageError(f"{remote.url} names no bucket and prefix; write it as s3://BUCKET/PREFIX")
    for address in (remote.url, remote.endpoint or ""):
        if holds_credentials(address):
            raise StageError(
                f"{address} holds credentials, which would be committed; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY instead"
            )
    if remote.endpoint and urlsplit(remote.endpoint).scheme not in ("http", "https"):
        raise StageError(f"the endpoint {remote.endpoint} must start with http:// or https://")
    _require_access(remote, create=create)
    from dvc.config import Config  # four commands of DVC would do the same in seconds

    with Config(str(root / ".dvc"), validate=True).edit("repo") as config:
        options = {"url": remote.url, "endpointurl": remote.endpoint, "region": remote.region, "verify": True}
        config["remote"][remote.name] = {name: value for name, value in options.items() if value}
        config["core"]["remote"] = remote.name


def _require_access(remote: Remote, *, create: bool) -> None:
    """Store, read and delete an object. Raises `StageError` if that fails."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    key, body = f"{remote.prefix}/.afterimage-{uuid.uuid4().hex}", os.urandom(1024)
    try:
        client = boto3.client("s3", endpoint_url=remote.endpoint, region_name=remote.region)
        if create and remote.bucket not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=remote.bucket)
        client.put_object(Bucket=remote.bucket, Key=key, Body=body)
        same = client.get_object(Bucket=remote.bucket, Key=key)["Body"].read() == body
        client.delete_object(Bucket=remote.bucket, Key=key)
    except (BotoCoreError, ClientError, ValueError) as error:
        remedy = "" if create else "; --create makes a bucket that is missing"
        raise StageError(f"{remote.url} cannot be used: {error}{remedy}") from None
    if not same:
        raise StageError(f"{remote.url} gives back other bytes than were stored")


if __name__ == "__main__":
    main()
