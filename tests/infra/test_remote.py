"""`python -m infra.remote`: a DVC remote on S3 in one command, or one sentence and nothing written."""

from __future__ import annotations

import re

import boto3
import pytest

from infra import remote
from tests.support import s3_site
from tests.support.commands import call


@pytest.fixture(scope="module")
def address():
    with s3_site.serving() as found:
        yield found


@pytest.fixture
def tree(tmp_path, address, monkeypatch):
    """A work tree as far as `dvc remote` needs it."""
    root = tmp_path / "tree"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    no_scm = True\n")
    monkeypatch.chdir(root)
    s3_site.client(address, monkeypatch, tmp_path)
    return root


def test_one_command_sets_up_a_remote_whose_objects_are_verified(tree, address):
    done = call(remote.main, "s3://made/mine", "--endpoint", address, "--region", "us-east-1", "--create")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == "remote: s3://made/mine is the default DVC remote 'storage'; commit .dvc/config, then: dvc push\n"
    )
    config = (tree / ".dvc" / "config").read_text()
    for line in ("remote = storage", "url = s3://made/mine", f"endpointurl = {address}", "verify = True"):
        assert line in config
    boto3.client("s3", endpoint_url=address).delete_bucket(Bucket="made")  # nothing is left in it
    assert "very-secret" not in config and not (tree / ".dvc" / "config.local").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["s3://missing/mine"], "cannot be used: .*--create"),
        (["s3://bucket"], "names no bucket and prefix"),
        (["https://host/bucket"], "names no bucket and prefix"),
        (["s3://key:password@bucket/mine"], "holds credentials"),
        (["s3://missing/mine", "--endpoint", "ftp://127.0.0.1"], "must start with http"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_nothing_is_written(tree, address, monkeypatch, arguments, sentence):
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    before = (tree / ".dvc" / "config").read_text()
    done = call(remote.main, *arguments)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.search(sentence, done.stderr), done.stderr
    assert "password" not in done.stderr
    assert (tree / ".dvc" / "config").read_text() == before
