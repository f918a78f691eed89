"""Create the buckets of the shared store that are missing; safe to run at every start.

    python -m infra.buckets mlflow dvc

The address comes from AWS_ENDPOINT_URL, the credentials from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tasks.params.redaction import redacted


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.buckets", description="Create missing S3 buckets.")
    parser.add_argument("names", nargs="+", metavar="BUCKET")
    create(parser.parse_args().names)


def create(names: list[str]) -> None:
    """Create buckets; exits with one sentence if the server refuses."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3")
    try:
        for name in create_missing(client, names):
            print(f"buckets: created {name}")
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"buckets: error: {client.meta.endpoint_url} refuses: {redacted(str(error))}")


def create_missing(client: Any, names: list[str]) -> list[str]:  # the types of boto3's clients are made at run time
    """Create the buckets that the server of an S3 client does not have; returns their names."""
    present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    missing = [name for name in names if name not in present]
    for name in missing:
        client.create_bucket(Bucket=name)
    return missing


if __name__ == "__main__":
    main()
