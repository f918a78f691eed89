"""The S3-compatible server of `make stack`: SeaweedFS on 127.0.0.1, with credentials that the first start makes."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from flows import server
from infra import buckets, private_file
from tasks.runtime import atomic
from tasks.runtime.errors import StageError

STORAGE = "storage"
"""Name of the line of the process file, and of the folder."""
PROGRAM = "weed"
ARTIFACTS, DVC = "mlflow", "dvc"
"""Names of the buckets."""
PROBE = ".ready"
REGION = "us-east-1"
INNER = (
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
)
"""Options with the ports that SeaweedFS uses itself; they follow that of S3."""
PORTS = 1 + len(INNER)
SETTINGS = {
    "ip": server.HOST,
    "ip.bind": server.HOST,
    "s3": "true",
    "s3.iam": "false",
    "s3.port.iceberg": "0",
    "s3.port.lance": "0",
    "master.telemetry": "false",
    "master.electionTimeout": "1s",  # there is one server
    "master.volumeSizeLimitMB": "1024",
    "volume.max": "0",  # as many as the disk has room for
    "volume.preStopSeconds": "0",
}


@dataclass(frozen=True)
class Identity:
    """Credentials of the store."""

    key: str
    secret: str

    def variables(self, port: int) -> dict[str, str]:
        """The variables with which S3 clients find the store."""
        return {
            "AWS_ENDPOINT_URL": server.url(port),
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": REGION,
        }


def identity(folder: Path) -> Identity:
    """Return the credentials in `folder`, a private folder; the first call makes them.

    Raises `StageError` if SeaweedFS is not installed.
    """
    if shutil.which(PROGRAM, path=server.search_path()) is None:
        raise StageError("SeaweedFS, the S3-compatible server, is not installed; install it: make install EXTRA=stack")
    file = folder / "s3.json"
    if not file.exists():
        made = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(24)}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        known = {"name": "afterimage", "credentials": [made], "actions": actions}
        private_file.write(file, json.dumps({"identities": [known]}))
    (found,) = json.loads(file.read_text(encoding="utf-8"))["identities"][0]["credentials"]
    return Identity(found["accessKey"], found["secretKey"])


def usable(identity: Identity, port: int) -> bool:
    """Whether the server stores objects; it answers before it does. Creates the buckets that are missing."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=server.url(port),
        aws_access_key_id=identity.key,
        aws_secret_access_key=identity.secret,
        region_name=REGION,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
    )
    try:
        buckets.create_missing(client, [ARTIFACTS, DVC])
        client.put_object(Bucket=DVC, Key=PROBE, Body=b"ready")
        client.get_object(Bucket=DVC, Key=PROBE)["Body"].read()
        client.delete_object(Bucket=DVC, Key=PROBE)
    except (BotoCoreError, ClientError):
        return False
    return True


def write_options(folder: Path, port: int) -> Path:
    """Write SeaweedFS's command line to a file; returns it."""
    (folder / STORAGE).mkdir(exist_ok=True, mode=0o700)
    ports = {"s3.port": port} | {name: port + 1 + number for number, name in enumerate(INNER)}
    values = SETTINGS | ports | {"dir": folder / STORAGE, "s3.config": folder / "s3.json"}
    file = folder / "storage.options"
    atomic.write_text(file, "".join(f"{name}={value}\n" for name, value in values.items()))
    return file
