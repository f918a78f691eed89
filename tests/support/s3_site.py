"""A local S3 server (moto) and a client for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from moto.server import ThreadedMotoServer

if TYPE_CHECKING:
    import pytest


@contextmanager
def serving() -> Iterator[str]:
    """Serve S3 on a free port; yields its address."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def client(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A client of the server, with credentials in the environment and a separate scratch folder."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDENTITY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    return boto3.client("s3", endpoint_url=address)


@contextmanager
def bucket(client: Any, name: str) -> Iterator[Any]:
    """Create an empty bucket; yields the client, and deletes the bucket with its objects at the end."""
    client.create_bucket(Bucket=name)
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for stored in page.get("Contents", ()):
            client.delete_object(Bucket=name, Key=stored["Key"])
    client.delete_bucket(Bucket=name)
