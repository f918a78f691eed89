"""Secrets are masked in messages and refused in parameters."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows import pipeline
from tasks import params
from tasks.params.redaction import redacted, redacted_values, without_user
from tests.support.data_inputs import write_params

ROOT = Path(__file__).resolve().parents[2]
DIGITS: dict[str, Any] = params.read(ROOT / "params.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "http://user:SECRET@host/x.zip",
        "http://user:SECRET@SECRET@host/x.zip",
        "http://user:SECRET/SECRET@host:80/x.zip",
        "postgresql://user:SECRET@host/db",
        "postgresql+psycopg://user:p@SECRET/a@host:5432/db",
        "http://SECRET@host",
        "https://host/x?X-Amz-Signature=SECRET&x=1",
        "https://host/x?a=1&token=SECRET",
        "https://host/x#access_token=SECRET",
        "Authorization: Bearer SECRETSECRET",
        "host=db password=SECRET user=me",
        "the token hf_SECRETSECRETSECRETSECRET is not known",
        "AKIASECRETSECRETSECR",
    ],
)
def test_secrets_are_masked(text):
    message = redacted(f"('{text}' refused)")
    assert "SECRET" not in message and "***" in message
    assert redacted(message) == message
    assert "SECRET" not in str(redacted_values({"a": [text, {"b": text}], "c": 1}))


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/owner/name@0123456789abcdef",
        "http://127.0.0.1:5000/x@y does not answer within 2 s ([Errno 111] Connection refused)",
        "models:/afterimage-digits@champion",
        "s3://bucket/prefix/a@b.zip",
        "set HF_TOKEN to a token that may read it; train.ema has 'x'; write decay-0.999",
        "https://host/page?download=1&author=me",
    ],
)
def test_text_without_secrets_is_unchanged(text):
    assert redacted(text) == text


def test_user_and_password_are_removed_from_a_url():
    assert without_user("http://u:p@a@host:80/x?y=1") == "http://host:80/x?y=1"


def with_value(section: str, key: str, value: str) -> dict[str, Any]:
    document = copy.deepcopy(DIGITS)
    *inner, last = key.split(".")
    place = document[section]
    for name in inner:
        place = place.setdefault(name, {})
    place[last] = value
    return document


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("download", "url", "http://user:SECRET@host/x.zip?token=SECRET", "a user name or password"),
        ("download", "url", "http://user:SEC/RET@host/x.zip", "a user name or password"),
        ("download", "url", "https://host/x.zip?token=SECRET", "the query parameter 'token'"),
        ("download", "url", "https://host/x.zip?X-Amz-Signature=SECRET", "the query parameter 'X-Amz-Signature'"),
        ("download", "url", "https://host/x.zip?id=SECRET7SECRET7SECRET7SECRET7", "the query parameter 'id'"),
        ("download", "url", "s3://key:SECRET@bucket/x/", "put credentials into the environment"),
        ("download", "s3.endpoint_url", "https://key:SECRET@minio:9000", "put credentials into the environment"),
        ("judge", "extractor.weights", "https://user:SECRET@host/pt_inception.pth", "env:AFTERIMAGE_URL"),
        ("codec", "text.weights", "s3://key:SECRET@bucket/x", "a user name or password"),
        ("train", "weights", "https://user:SECRET@host/x", "a user name or password"),
    ],
)
def test_a_url_with_a_secret_is_refused_at_load(section, key, value, says):
    with pytest.raises(params.ParamsError) as refused:
        params.parse(with_value(section, key, value))
    assert f"{section}.{key} holds " in str(refused.value) and says in str(refused.value)
    assert "SEC" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["https://host/x.zip", "https://host/x.zip?download=1", "https://host:8080/a@b.zip", "env:MY_SIGNED_URL"]
)
def test_a_url_without_a_secret_is_accepted(url):
    document = with_value("download", "url", url)
    document["download"] |= {"source": "folder", "sha256": "0" * 64}
    assert params.parse(document).download.url == url


@pytest.mark.parametrize("url", ["env:", "env:1X", "env:A B", "env:https://host"])
def test_an_invalid_environment_variable_name_is_refused(url):
    document = with_value("download", "url", url)
    document["download"] |= {"source": "folder", "sha256": "0" * 64}
    with pytest.raises(params.ParamsError, match="or be env:NAME"):
        params.parse(document)


def test_a_refused_address_is_in_no_output_of_a_stage_or_preset(tmp_path):
    url = "http://user:SECRET@host/x.zip?token=SECRET"
    file = write_params(tmp_path / "params.yaml", download={"source": "folder", "url": url, "sha256": "0" * 64})
    for command in (
        ["tasks.download", str(tmp_path / "raw"), "--params", str(file)],
        ["tasks.preset", "folder", f"download.url={url}", "--params", str(tmp_path / "new.yaml")],
    ):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
        assert "download.url" in done.stderr and "SECRET" not in done.stdout + done.stderr
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize("name", ["faces/v1", "o'brien", "a:b", "a.b", "50%", 'a"b', "", " a", "a ", "a\nb", "x" * 201])
def test_a_name_that_mlflow_would_refuse_is_refused_at_load(name):
    with pytest.raises(params.ParamsError, match=r"register\.model_name .* cannot name a model in MLflow; use"):
        params.parse(with_value("register", "model_name", name))


@pytest.mark.parametrize("name", ["afterimage-digits", "faces_v1", "a", "Größe 2"])
def test_an_ordinary_model_name_is_accepted(name):
    assert params.parse(with_value("register", "model_name", name)).register_.model_name == name


def test_a_prefect_server_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "flows.pipeline"]
    environment = {"PREFECT_API_URL": "http://me:SECRET@127.0.0.1:9/api", "AFTERIMAGE_SCRATCH": str(tmp_path)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "no Prefect server answers at http://***@127.0.0.1:9/api" in done.stderr
    assert "PREFECT_API_URL" in done.stderr and pipeline.PROBE_SECONDS < 10
