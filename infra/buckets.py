"""Create the buckets of the shared store that are missing; safe to run at every start.

    python -m infra.buckets mlflow dvc

The address comes from AWS_ENDPOINT_URL, the credentials from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
"""

from __future__ import annotations

import argparse
import sys

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
        present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for name in names:
            if name not in present:
                client.create_bucket(Bucket=name)
                print(f"buckets: created {name}")
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"buckets: error: {client.meta.endpoint_url} refuses: {redacted(str(error))}")


if __name__ == "__main__":
    main()
