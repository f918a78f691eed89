"""Publishing a registered model to a hub on this machine, through the requests that `huggingface_hub` makes."""

from __future__ import annotations

import logging
import sqlite3

import huggingface_hub.constants as hub_constants
import pytest
import yaml

from tasks import publish
from tests.support import hub_uploads
from tests.support.commands import call
from tests.support.hub_uploads import TOKEN, Hub
from tests.support.registry import NAME

MODEL = f"models:/{NAME}@champion"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_uploads.serving() as hub:
        monkeypatch.setattr(hub_constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_version_arrives_with_card_licence_base_model_and_grid(work, hub: Hub, caplog):
    caplog.set_level(logging.DEBUG)
    work.register()
    done = call(publish.main, "me/pets", "--licence", "cc0-1.0", "--model", MODEL, "--base-model", "them/base")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"publish: {MODEL} is at {hub.address}/me/pets/commit/{hub_uploads.COMMIT}\n"
    assert hub.visibility == {"me/pets": "private"}
    model = work.root / "outputs" / "model"
    expected = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    published = hub.files["me/pets"]
    assert set(published) == {*expected, "samples.png"}
    for name in expected.keys() - {"README.md"}:
        assert published[name] == expected[name], name
    assert published["samples.png"] == (work.root / "reports" / "evaluation" / "grid_guided.png").read_bytes()
    _, front, body = published["README.md"].decode().split("---", 2)
    fields = yaml.safe_load(front)
    assert (fields["license"], fields["base_model"], fields["library_name"]) == ("cc0-1.0", "them/base", "diffusers")
    assert body.startswith("\n\n# Diffusion model of pets\n\n![Samples](samples.png)\n")
    assert hub.commits[0]["summary"] == f"{NAME} version 1"

    said = done.stdout + done.stderr + caplog.text
    with sqlite3.connect(work.root / "mlflow.db") as store:
        said += "\n".join(store.iterdump())
    assert TOKEN not in said


def test_a_second_time_may_be_public_or_not_and_keeps_the_repository(work, hub: Hub):
    work.register()
    publish.publish(MODEL, "me/pets", "other", public=True)
    publish.publish(MODEL, "me/pets", "other")
    assert hub.visibility == {"me/pets": "public"}
    assert "base_model" not in hub.files["me/pets"]["README.md"].decode()


def test_refusals_are_one_sentence(work, hub: Hub, monkeypatch):
    work.register()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    arguments = ["me/pets", "--licence", "mit", "--model"]
    refused = call(publish.main, *arguments, MODEL)
    assert refused.returncode == 1
    assert refused.stderr == (
        f"publish: error: the hub at {hub.address} refuses me/pets with status 401; set HF_TOKEN to a token with write "
        "access\n"
    )
    assert "MLflow has no models:/nothing@champion" in call(publish.main, *arguments, "models:/nothing@champion").stderr
    assert "names no repository" in call(publish.main, "pets", "--licence", "mit", "--model", MODEL).stderr
    assert "is no licence identifier" in call(publish.main, "me/pets", "--licence", "My: own", "--model", MODEL).stderr
